"""The path of a GPU without a GPU: on arrays that refuse to mix with NumPy's, a host array that leaks in is caught."""

import types

import numpy as np
import pytest
import strict_array
from strict_array import MixedArraysError, asarray, asnumpy

from minires import (
    SGD,
    Adam,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    ResNet,
    Sequential,
    SoftmaxCrossEntropy,
    kernels,
)
from minires.augment import normalize, random_crop, random_flip
from minires.backend import to_device, to_numpy
from minires.cifar10 import MEAN, STD, load_sample
from minires.evaluation import evaluate
from minires.kernels import gpu


@pytest.fixture(autouse=True)
def reference_kernels():
    """The stand-in is served by the reference kernels; so is the host here, for the same bits."""
    with kernels.use("reference"):
        yield


@pytest.mark.parametrize(
    "mix",
    [
        lambda host, device: device + host,
        lambda host, device: host + device,
        lambda host, device: device @ host,
        lambda host, device: np.maximum(device, 0),
        lambda host, device: np.asarray(device),
        lambda host, device: strict_array.maximum(host, 0),
        lambda host, device: strict_array.concatenate([device, host]),
        lambda host, device: device[host > 0],
        lambda host, device: device.__setitem__(0, host[0:1]),
        lambda host, device: device.__iadd__(host),
    ],
)
def test_the_stand_in_refuses_to_mix(mix):
    with pytest.raises(MixedArraysError):
        mix(np.ones(3), asarray(np.ones(3)))


def steps(optimizer_class, device):
    """Two training steps on the sample; returns the losses and the state, on the host."""
    data = load_sample()
    model = ResNet((1, 1), (8, 12), dropout=0.3).to(device)
    loss_function, optimizer = SoftmaxCrossEntropy(0.1), optimizer_class(model.parameters())
    losses = []
    for step in range(2):
        images, labels = data.train_images[:10], data.train_labels[:10]
        if device == "gpu":
            images, labels = asarray(images), asarray(labels)
        x = normalize(random_flip(random_crop(images, 1, step), 1, step), MEAN, STD)
        optimizer.zero_grad()
        losses.append(loss_function(model(x), labels))
        model.backward(loss_function.backward())
        optimizer.step()
    return [to_numpy(loss) for loss in losses], model.state_dict()


@pytest.mark.parametrize(
    "optimizer",
    [Adam, lambda p: SGD(p, 0.1, 0.9, nesterov=True, weight_decay=1e-3, decay_vectors=False, max_norm=1.0)],
    ids=["Adam", "SGD"],
)
def test_training_on_the_stand_in_gives_the_same_bits(strict_gpu, optimizer):
    losses, state = steps(optimizer, "gpu")
    expected_losses, expected = steps(optimizer, "cpu")
    np.testing.assert_array_equal(losses, expected_losses)
    for name, array in state.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_arrays_on_two_devices_are_named(strict_gpu):
    x, labels = np.zeros((2, 3), np.float32), np.zeros(2, int)
    with pytest.raises(ValueError, match="Linear has parameters of numpy, got an input of strict_array: move the"):
        Linear(3, 2)(strict_gpu.asarray(x))
    with pytest.raises(ValueError, match="logits and labels on one device, got arrays of strict_array and numpy"):
        SoftmaxCrossEntropy()(strict_gpu.asarray(x), labels)


def test_an_optimizer_made_before_the_move_says_so(strict_gpu):
    model = ResNet((1,), (4,))
    optimizer = Adam(model.parameters())
    model.to("gpu")
    with pytest.raises(RuntimeError, match=r"make the optimizer after model\.to"):
        optimizer.step()


def test_the_input_gradient_too(strict_gpu, rng):
    x = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    dout = rng.standard_normal((2, 10)).astype(np.float32)
    host, device = ResNet((1,), (4,)), ResNet((1,), (4,)).to("gpu")
    host(x)
    device(asarray(x))
    np.testing.assert_array_equal(asnumpy(device.backward(asarray(dout))), host.backward(dout))


@pytest.mark.parametrize("choice", ["reference", "fast"])
def test_pooling_and_flattening(strict_gpu, rng, choice):
    """They have no fast kernels, so the reference serves them on a GPU, too: in 16 bits as in 32."""

    def make():
        return Sequential(ReLU(), MaxPool2d(3, stride=2), MaxPool2d(2, stride=1), Flatten())

    for dtype in (np.float32, np.float16):
        x = rng.standard_normal((2, 9, 8, 4)).astype(dtype)
        host, device = make(), make().to("gpu")
        with kernels.use(choice):
            out = device(asarray(x))
            dout = rng.standard_normal(out.shape).astype(dtype)
            dx = device.backward(asarray(dout))
        np.testing.assert_array_equal(asnumpy(out), host(x))
        np.testing.assert_array_equal(asnumpy(dx), host.backward(dout))
        assert out.dtype == dx.dtype == dtype


def test_a_network_with_pooling_and_flattening_learns_the_same_bits(strict_gpu, rng):
    x, dout = rng.standard_normal((2, 8, 8, 3)).astype(np.float32), rng.standard_normal((2, 5)).astype(np.float32)
    states = []
    for device in ("cpu", "gpu"):
        model = Sequential(Conv2d(3, 4, 3, padding=1, rng=1), MaxPool2d(2), Flatten(), Linear(64, 5, rng=2)).to(device)
        optimizer = SGD(model.parameters(), 0.1)
        model(to_device(x, device))
        model.backward(to_device(dout, device))
        optimizer.step()
        states.append(model.state_dict())
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name], err_msg=name)


def test_evaluation_and_loading(strict_gpu):
    data, model = load_sample(), ResNet((1,), (4,))
    arguments = (data.test_images[:20], data.test_labels[:20], MEAN, STD)
    expected = evaluate(model, *arguments)
    moved = ResNet((1,), (4,), seed=1).to("gpu")
    moved.load_state_dict(model.state_dict())
    assert evaluate(moved, *arguments) == expected


def test_dropout_goes_from_one_device_to_the_other(strict_gpu):
    x, layer, twin = np.ones((4, 8), np.float32), Dropout(0.5, rng=3), Dropout(0.5, rng=3)
    for device in ("gpu", "cpu", "gpu"):
        actual = to_numpy(layer(to_device(x, device)))
        np.testing.assert_array_equal(actual, twin(x))
    assert int(layer.step) == twin.step == 3


def test_a_gpu_without_the_instructions_is_served_by_the_reference(monkeypatch):
    """As is one older than Ampere, such as a T4."""

    class Library:
        def __init__(self, capability):
            device = types.SimpleNamespace(compute_capability=capability)
            self.cuda = types.SimpleNamespace(Device=lambda: device)

    old, new = Library("75"), Library("90")
    assert (gpu.is_for(old), gpu.is_for(new)) == (False, True)
    x = asarray(np.ones((1, 2), np.float32))
    with kernels.use("fast"):
        assert kernels.kernels_for(x) is gpu
        monkeypatch.setattr(gpu, "is_for", lambda xp: False)
        assert kernels.kernels_for(x) is kernels.reference
