"""Parity with PyTorch: equal weights in, then equal outputs, gradients, statistics and steps."""

import numpy as np
import pytest
from conftest import relative_error

import minires
from minires import SGD, Adam, Dropout, ResNet, SoftmaxCrossEntropy, WeightAverage
from minires.evaluation import measure_statistics
from minires.training import load_model, save_weights

torch = pytest.importorskip("torch", reason="torch is not installed (the extra 'compare')")

pytestmark = pytest.mark.slow

TOLERANCE = {np.float32: 1e-4, np.float64: 1e-10}  # relative norms
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


def twins(dtype, **arguments):
    """A network of minires and one of PyTorch with the same weights, which are far from the initial ones and zeros.

    In float32 the biases of BatchNorm keep the ReLUs away from 0: a value within rounding of 0 falls on either side of
    it in two libraries, and the gradient of a path goes with it. (It costs a digit: BatchNorm takes the large means off
    again.) In float64 the ReLUs are what they are.
    """
    from torch_resnet import TorchResNet

    rng = np.random.default_rng(7)
    model = ResNet(**arguments, dropout=0.0).to(dtype=dtype)
    for name, parameter in model.named_parameters():
        if dtype == np.float32 and ("bn" in name or "shortcut.1" in name) and name.endswith("bias"):
            parameter.data += 4
        parameter.data += (0.1 * np.abs(parameter.data).mean() + 0.01) * rng.standard_normal(parameter.data.shape)
    twin = TorchResNet(**arguments, dropout=0.0).to(torch.float64 if dtype == np.float64 else torch.float32)
    twin.load_state_dict({name: torch.from_numpy(array) for name, array in model.state_dict().items()}, strict=True)
    return model, twin


def batch(dtype, size=4):
    rng = np.random.default_rng(8)
    images = rng.standard_normal((size, 32, 32, 3)).astype(dtype)
    labels = rng.integers(0, 10, size)
    return images, labels, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)


def assert_same_state(model, twin, tolerance):
    for name, expected in twin.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert relative_error(model.state_dict()[name], expected) < tolerance, name


@each_dtype
@pytest.mark.parametrize("shortcut", [True, False], ids=["residual", "plain"])
def test_outputs_loss_gradients_and_running_statistics(dtype, shortcut):
    model, twin = twins(dtype, shortcut=shortcut)
    x, labels, torch_x, torch_labels = batch(dtype)
    tolerance = TOLERANCE[dtype]

    loss_function = SoftmaxCrossEntropy(label_smoothing=0.1)
    logits = model(x)
    loss = loss_function(logits, labels)
    dx = model.backward(loss_function.backward())

    torch_x.requires_grad_()
    torch_logits = twin(torch_x)
    torch_loss = torch.nn.functional.cross_entropy(torch_logits, torch_labels, label_smoothing=0.1)
    torch_loss.backward()

    assert relative_error(logits, torch_logits.detach()) < tolerance
    assert relative_error(loss, torch_loss.detach()) < tolerance
    assert relative_error(dx.transpose(0, 3, 1, 2), torch_x.grad) < tolerance
    for (name, parameter), (torch_name, torch_parameter) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert name == torch_name
        assert relative_error(parameter.grad.transpose(parameter.torch_axes), torch_parameter.grad) < tolerance, name
    assert_same_state(model, twin, tolerance)
    assert relative_error(model.eval()(x), twin.eval()(torch_x).detach()) < tolerance


OPTIMIZERS = {
    "Adam": (
        lambda parameters: Adam(parameters, lr=1e-3, weight_decay=5e-4),
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3, weight_decay=5e-4),
    ),
    "SGD": (
        lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    ),
}


@each_dtype
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps(dtype, optimizer):
    """The same gradients go to both optimizers, as training itself multiplies a rounding error with every step."""
    rng = np.random.default_rng(9)
    start = rng.standard_normal((50, 40)).astype(dtype)
    ours, theirs = minires.Parameter(start.copy()), torch.nn.Parameter(torch.from_numpy(start.copy()))
    make, torch_make = OPTIMIZERS[optimizer]
    our_optimizer, torch_optimizer = make([ours]), torch_make([theirs])
    for _ in range(5):
        grad = (rng.standard_normal(start.shape) * 10.0 ** rng.integers(-6, 2, start.shape)).astype(dtype)
        our_optimizer.zero_grad()
        ours.grad += grad
        theirs.grad = torch.from_numpy(grad)
        our_optimizer.step()
        torch_optimizer.step()
        moved = ours.data - start, theirs.detach().numpy() - start
        assert relative_error(*moved) < (1e-10 if dtype == np.float64 else 1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_training_steps_in_float64(optimizer):
    model, twin = twins(np.float64)
    make, torch_make = OPTIMIZERS[optimizer]
    our_optimizer, torch_optimizer = make(model.parameters()), torch_make(twin.parameters())
    loss_function = SoftmaxCrossEntropy()
    x, labels, torch_x, torch_labels = batch(np.float64)
    for _ in range(5):
        our_optimizer.zero_grad()
        loss = loss_function(model(x), labels)
        model.backward(loss_function.backward(), need_dx=False)
        our_optimizer.step()

        torch_optimizer.zero_grad()
        torch_loss = torch.nn.functional.cross_entropy(twin(torch_x), torch_labels)
        torch_loss.backward()
        torch_optimizer.step()
        assert relative_error(loss, torch_loss.detach()) < 1e-10
    assert_same_state(model, twin, 1e-10)


@each_dtype
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_gradients_are_clipped_as_pytorch_does(dtype, max_norm):
    rng = np.random.default_rng(10)
    grads = [rng.standard_normal(shape).astype(dtype) for shape in ((3, 4), (400, 500), (7,))]
    ours = [minires.Parameter(np.zeros_like(grad)) for grad in grads]
    theirs = [torch.nn.Parameter(torch.zeros(grad.shape)) for grad in grads]
    for grad, our_parameter, their_parameter in zip(grads, ours, theirs, strict=True):
        our_parameter.grad[...] = grad
        their_parameter.data = their_parameter.data.to(torch.from_numpy(grad).dtype)
        their_parameter.grad = torch.from_numpy(grad.copy())
    SGD(ours, lr=1.0, max_norm=max_norm).step()
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    tolerance = 1e-10 if dtype == np.float64 else 5e-6  # PyTorch's norm in float32 is off by 1.2e-6 here, ours by 5e-8
    for our_parameter, their_parameter in zip(ours, theirs, strict=True):
        assert relative_error(-our_parameter.data, their_parameter.grad) < tolerance


def test_an_average_of_the_weights_and_its_statistics():
    """PyTorch's AveragedModel and update_bn, once the first updates, which forget faster here, are over."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    model, twin = twins(np.float64, blocks=(1, 1), channels=(4, 8))
    make, torch_make = OPTIMIZERS["SGD"]
    our_optimizer, torch_optimizer = make(model.parameters()), torch_make(twin.parameters())
    ours, theirs = WeightAverage(our_optimizer, 0.7), AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    theirs.n_averaged += 1  # as PyTorch's first update would copy the weights
    ours.updates = 20
    x, labels, torch_x, torch_labels = batch(np.float64)
    loss_function = SoftmaxCrossEntropy()
    for _ in range(3):
        our_optimizer.zero_grad()
        loss_function(model(x), labels)
        model.backward(loss_function.backward(), need_dx=False)
        our_optimizer.step()
        ours.update()
        torch_optimizer.zero_grad()
        torch.nn.functional.cross_entropy(twin(torch_x), torch_labels).backward()
        torch_optimizer.step()
        theirs.update_parameters(twin)
    ours.swap()
    parts = [slice(0, 2), slice(1, 3), slice(2, 4)]  # of one size: PyTorch counts batches, minires images
    measure_statistics(model, [x[part] for part in parts])
    update_bn([torch_x[part] for part in parts], theirs)
    assert_same_state(model, theirs.module, 1e-10)
    ours.swap()
    for (name, parameter), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        array = parameter.data.transpose(parameter.torch_axes)
        assert relative_error(array, expected.detach()) < 1e-10, name


@each_dtype
@pytest.mark.parametrize(("kernel_size", "stride"), [(2, None), (3, 2), (3, 1), (2, 3)])
def test_max_pooling_and_its_ties(dtype, kernel_size, stride):
    """Small integers, so that most windows have several largest pixels."""
    rng = np.random.default_rng(11)
    for x in (rng.integers(0, 3, (3, 9, 8, 4)), rng.standard_normal((3, 9, 8, 4))):
        x = x.astype(dtype)
        torch_x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
        layer = minires.MaxPool2d(kernel_size, stride)
        out = layer(x)
        torch_out = torch.nn.MaxPool2d(kernel_size, stride)(torch_x)
        np.testing.assert_array_equal(out.transpose(0, 3, 1, 2), torch_out.detach())
        dout = rng.integers(-9, 9, out.shape).astype(dtype)  # sums of integers are exact in any order
        torch_out.backward(torch.from_numpy(dout.transpose(0, 3, 1, 2).copy()))
        np.testing.assert_array_equal(layer.backward(dout).transpose(0, 3, 1, 2), torch_x.grad)


@each_dtype
def test_flattening_differs_by_the_order_that_its_docstring_says(dtype):
    rng = np.random.default_rng(12)
    x, weight = rng.standard_normal((3, 4, 5, 6)).astype(dtype), rng.standard_normal((7, 6 * 4 * 5)).astype(dtype)
    K, H, W, C = 7, 4, 5, 6
    torch_x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    expected = torch.nn.functional.linear(torch.nn.Flatten()(torch_x), torch.from_numpy(weight))
    model = minires.Sequential(minires.Flatten(), minires.Linear(C * H * W, K, bias=False)).to(dtype=dtype)
    model.load_state_dict({"1.weight": weight.reshape(K, C, H, W).transpose(0, 2, 3, 1).reshape(K, -1)})
    assert relative_error(model(x), expected) < TOLERANCE[dtype]


def test_dropout_scales_as_pytorch_does():
    x = torch.ones(200, 200)
    kept = torch.nn.functional.dropout(x, 0.2).unique().numpy()
    np.testing.assert_array_equal(np.unique(Dropout(0.2)(x.numpy())), kept)


def test_schedules_are_those_of_pytorch():
    def rates(make, steps):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler, result = make(optimizer), []
        for _ in range(steps):
            result.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return result

    cosine = rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50, eta_min=0.01), 50)
    np.testing.assert_allclose([minires.cosine(step, 50, 0.1, 0.01) for step in range(50)], cosine)
    one_cycle = rates(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=51), 50)
    np.testing.assert_allclose([minires.one_cycle(step, 51, 0.1) for step in range(50)], one_cycle)


def test_a_checkpoint_of_minires_loads_in_pytorch(tmp_path):
    from safetensors.torch import load_file

    model, _ = twins(np.float32)
    _, twin = twins(np.float32)
    x, _, torch_x, _ = batch(np.float32)
    model(x)  # moves the running statistics
    save_weights(tmp_path / "model.safetensors", model)
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert relative_error(model.eval()(x), twin.eval()(torch_x).detach()) < 1e-5


def test_a_checkpoint_of_pytorch_loads_in_minires(tmp_path):
    from safetensors.torch import save_file

    _, twin = twins(np.float32, blocks=(1, 2), channels=(8, 12))
    x, _, torch_x, _ = batch(np.float32)
    twin(torch_x)
    save_file(twin.state_dict(), tmp_path / "model.safetensors")
    model, metadata = load_model(tmp_path / "model.safetensors")
    assert metadata == {}
    assert relative_error(model(x), twin.eval()(torch_x).detach()) < 1e-5
    model.load_state_dict(twin.state_dict())
