"""The whole network on a GPU: gradients, agreement with the CPU, the same bits twice. Skipped where there is no GPU.

The kernels one by one are in test_gpu_kernels.py.
"""

import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import relative_error
from safetensors.numpy import load_file

from minires import SGD, Adam, ResNet, SoftmaxCrossEntropy, check_gradients, kernels
from minires.augment import normalize, random_crop, random_flip
from minires.backend import to_device, to_numpy
from minires.cifar10 import MEAN, STD
from minires.kernels import gpu

pytestmark = pytest.mark.gpu
TRAIN = pathlib.Path(__file__).parent.parent / "examples" / "train_cifar.py"


@pytest.fixture(autouse=True)
def strict_float32():
    before = gpu.precision()
    gpu.set_precision("float32")
    yield
    gpu.set_precision(before)


def test_gradient_check_in_float64(rng):
    errors = check_gradients(ResNet(), rng.standard_normal((2, 32, 32, 3)), device="gpu")
    assert max(errors.values()) < 1e-6


def test_gradient_check_in_float32(rng):
    """Central differences in float32 say two digits, of layers without a kink; the network's ReLUs leave one."""
    errors = check_gradients(
        ResNet(dropout=0),
        rng.standard_normal((64, 32, 32, 3)),
        device="gpu",
        dtype="float32",
        steps=(1e-2, 3e-3, 1e-3),
        tolerance=0.1,
    )
    assert np.median(list(errors.values())) < 0.03


def batch(device, N=128):
    rng = np.random.default_rng(5)
    images = to_device(rng.integers(0, 256, (N, 32, 32, 3), dtype=np.uint8), device)
    labels = to_device(rng.integers(0, 10, N, dtype=np.uint8), device)
    return normalize(random_flip(random_crop(images, 3, 7), 3, 7), MEAN, STD), labels


def one_step(device, dtype="float32", x_dtype=None, steps=1, scale=1.0):
    """The state after steps of training: losses, gradients of the last one, parameters and running statistics."""
    model = ResNet().to(device, dtype)
    optimizer, loss_function = Adam(model.parameters()), SoftmaxCrossEntropy()
    x, labels = batch(device)
    x = x.astype(x_dtype or dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(to_numpy(loss_function(model(x), labels)))
        model.backward(loss_function.backward(scale), need_dx=False)
        optimizer.step(1 / scale)
    gradients = {name: to_numpy(p.grad).astype(np.float64) / scale for name, p in model.named_parameters()}
    return losses, gradients, model.state_dict()


def test_augmentation_and_dropout_are_the_same_bits_as_on_the_cpu():
    for a, b in zip(batch("cpu"), batch("gpu"), strict=True):
        np.testing.assert_array_equal(a, to_numpy(b))
    x = np.ones((128, 512), np.float32)
    mask = gpu.dropout_forward(to_device(x, "gpu"), 0.5, 2**63 + 1, 2**40)
    np.testing.assert_array_equal(to_numpy(mask), kernels.reference.dropout_forward(x, 0.5, 2**63 + 1, 2**40))


@pytest.fixture(scope="module")
def truth():
    """A training step on the CPU, in float64 and float32, by the mathematics: what is right, and how far rounding goes.

    A rounding that turns a ReLU over changes gradients by more than itself, so even the reference in float32 is off by
    some 1e-3. Other formats are allowed their rounding in proportion; the kernels one by one are held to tight bounds.
    """
    with kernels.use("reference"):
        right, rounded = one_step("cpu", "float64"), one_step("cpu", "float32")
    return right, max(relative_error(rounded[1][name], right[1][name]) for name in right[1])


@pytest.mark.parametrize(
    ("precision", "dtype", "coarser"),
    [("float64", "float64", 0), ("float32", "float32", 1), ("tf32", "float32", 2**13), ("float16", "float16", 2**13)],
)
def test_a_training_step_agrees_with_the_cpu(truth, precision, dtype, coarser):
    """Loss, every gradient and the running statistics; what flips a ReLU grows with the square root of the rounding."""
    gpu.set_precision("tf32" if precision == "tf32" else "float32")
    master = "float64" if dtype == "float64" else "float32"
    losses, gradients, state = one_step("gpu", master, dtype, scale=1024.0 if dtype == "float16" else 1.0)
    (right_losses, right_gradients, right_state), rounding = truth
    errors = {name: relative_error(gradients[name], right) for name, right in right_gradients.items()}
    running = {name: relative_error(state[name], right) for name, right in right_state.items() if "running" in name}
    loss_error = abs(float(losses[0] - right_losses[0])) / right_losses[0]
    print(
        f"{precision}: loss {loss_error:.1e}, gradients median {np.median(list(errors.values())):.1e}, "
        f"largest {max(errors.values()):.1e} (float32 on the CPU {rounding:.1e}), "
        f"running statistics {max(running.values()):.1e}"
    )
    assert max(errors.values()) < 4 * rounding * coarser**0.5 + 1e-10
    assert max(running.values()) < 1e-6 * coarser + 1e-11
    assert loss_error < 1e-6 * coarser + 1e-12


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_two_runs_give_the_same_bits(precision):
    gpu.set_precision("float32" if precision == "float32" else "tf32")
    x_dtype = "float16" if precision == "float16" else None
    first, second = (one_step("gpu", x_dtype=x_dtype, steps=5, scale=256.0) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    for name, array in first[2].items():
        np.testing.assert_array_equal(array, second[2][name], err_msg=name)


@pytest.mark.parametrize("precision", ["tf32", "float16"])
def test_a_replayed_step_gives_the_bits_of_a_plain_one(precision):
    """With two sizes of batches in turn, and dropout, whose step counts on inside the recording."""
    gpu.set_precision("tf32")
    x, labels = batch("gpu")
    x = x.astype("float16" if precision == "float16" else "float32")
    results = []
    for wrap in (lambda function: function, gpu.replay):
        model = ResNet().to("gpu")
        optimizer, loss_function = Adam(model.parameters()), SoftmaxCrossEntropy()

        def gradients(x, labels, model=model, optimizer=optimizer, loss_function=loss_function):
            optimizer.zero_grad()
            loss = loss_function(model(x), labels)
            model.backward(loss_function.backward(256.0), need_dx=False)
            return loss

        step, losses = wrap(gradients), []
        for size in (128, 128, 128, 64, 128, 64, 128, 64):
            first = len(losses)
            losses.append(float(step(x[first : first + size], labels[first : first + size])))
            optimizer.step(1 / 256)
        results.append((losses, model.state_dict(), int(model.dropout.step)))
    assert results[0][0] == results[1][0]
    assert results[0][2] == results[1][2] == 8
    for name, array in results[0][1].items():
        np.testing.assert_array_equal(array, results[1][1][name], err_msg=name)


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_a_batch_can_be_overfitted(precision):
    gpu.set_precision("float32" if precision == "float32" else "tf32")
    model = ResNet(dropout=0).to("gpu")
    optimizer, loss_function = SGD(model.parameters(), 0.05, 0.9), SoftmaxCrossEntropy()
    x, labels = batch("gpu", 32)
    x = x.astype("float16" if precision == "float16" else "float32")
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_function(model(x), labels)
        model.backward(loss_function.backward(1024.0), need_dx=False)
        optimizer.step(1 / 1024)
    assert float(loss) < 0.01


def test_a_state_moves_to_the_gpu_and_back():
    model = ResNet(seed=3)
    state = model.state_dict()
    moved = ResNet(seed=4).to("gpu")
    moved.load_state_dict(state)
    for name, array in moved.to("cpu").state_dict().items():
        np.testing.assert_array_equal(array, state[name])


@pytest.mark.parametrize("recipe", ["report", "fast"])
def test_a_killed_run_is_resumed_with_the_same_bits(tmp_path, recipe):
    flags = ["--device", "gpu", "--data", "sample", "--recipe", recipe, "--epochs", "2", "--batch-size", "50"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([sys.executable, TRAIN, *flags, "--out", whole], check=True)
    run = subprocess.Popen([sys.executable, TRAIN, *flags, "--checkpoint-every", "0", "--out", killed])
    while not (killed / "previous.safetensors").exists() and run.poll() is None:
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    subprocess.run([sys.executable, TRAIN, "--resume", killed], check=True)
    expected, actual = (load_file(folder / "best.safetensors") for folder in (whole, killed))
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
