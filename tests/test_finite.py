"""The first layer of which a number is not finite is named, whether it shows in the forward or in the backward pass."""

import numpy as np
import pytest

from minires import Linear, ReLU, ResNet, Sequential, SoftmaxCrossEntropy
from minires.training.finite import all_finite, find_not_finite


def training_pass(model, x):
    def passes():
        loss_function = SoftmaxCrossEntropy()
        loss_function(model(x), np.arange(len(x)))
        model.backward(loss_function.backward())

    return passes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_among_many_arrays_is_seen(bad):
    arrays = [np.zeros((3, 4), np.float32), np.float32(1), np.ones(5)]
    assert all_finite(arrays)
    arrays[0][1, 2] = bad
    assert not all_finite(arrays)
    assert not all_finite([np.float32(bad), *arrays[1:]])


def test_on_the_device_too(strict_gpu):
    arrays = [strict_gpu.asarray(np.ones(3)), strict_gpu.asarray(np.float32(1))]
    assert all_finite(arrays)
    assert not all_finite([*arrays, strict_gpu.asarray(np.array([1, np.nan]))])


LAYERS = [name for name, part in ResNet((1, 1), (4, 6)).named_modules() if hasattr(part, "weight")]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_nan_in_the_weights_of_a_layer_is_reported_with_its_name(layer, rng):
    model = ResNet((1, 1), (4, 6))
    weight = dict(model.named_parameters())[f"{layer}.weight"].data
    weight.reshape(-1)[weight.size // 2] = np.nan
    x = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    passes = training_pass(model, x)
    assert find_not_finite(model, passes)[1] == f"the output of {layer}, whose weights are not finite"


@pytest.mark.parametrize("layer", ["linear", "layer2.0.conv2", "layer1.0.bn1", "conv1"])
def test_a_gradient_is_reported_where_it_begins(layer, rng):
    model = ResNet((1, 1), (4, 6))
    part = dict(model.named_modules())[layer]
    backward = type(part).backward

    def overflowing(*args, **kwargs):
        dx = backward(part, *args, **kwargs)
        part.weight.grad[...] = np.inf
        return dx

    part.backward = overflowing
    passes = training_pass(model, rng.standard_normal((2, 8, 8, 3)).astype(np.float32))
    assert find_not_finite(model, passes)[1] == f"the gradient of {layer}"
    assert part.backward is overflowing


def test_nothing_is_found_where_all_is_finite_and_the_model_stays_as_it_was(rng):
    model = Sequential(Linear(3, 4, rng=rng), ReLU())
    passes = training_pass(model, rng.standard_normal((2, 3)).astype(np.float32))
    before = [dict(vars(module)) for module in model.modules()]
    assert find_not_finite(model, passes)[1] is None
    assert [set(vars(module)) - {"_cache"} for module in model.modules()] == [set(b) - {"_cache"} for b in before]


def test_the_model_stays_as_it_was_when_the_pass_fails(rng):
    model = Linear(3, 4, rng=rng)
    with pytest.raises(ValueError, match="Linear expects"):
        find_not_finite(model, lambda: model(np.zeros((2, 2), np.float32)))
    assert "forward" not in vars(model)
