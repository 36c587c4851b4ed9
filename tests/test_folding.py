"""BatchNorm folded into the convolution before it: the same outputs, for evaluation alone."""

import numpy as np
import pytest

import minires
from minires import kernels
from minires.folding import FoldedConv2d


def trained(model, rng):
    """A model whose BatchNorms have statistics, weights and biases of all kinds."""
    for name, value in model.named_state():
        if "bn" in name or "shortcut.1" in name:
            value.data[...] = rng.uniform(0.5, 2, value.data.shape) * (1 if "var" in name else rng.choice([-1, 1]))
    return model.eval()


@pytest.mark.parametrize("kernel_set", ["fast", "reference"])
def test_a_folded_network_has_the_outputs_of_the_network(rng, kernel_set):
    model = trained(minires.ResNet((2, 1), (16, 24), seed=0), rng)
    x = rng.standard_normal((5, 32, 32, 3)).astype(np.float32)
    before = model.state_dict()
    with kernels.use(kernel_set):
        folded = minires.fold_batch_norm(model)
        expected, actual = model(x), folded(x)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert not any(isinstance(part, minires.BatchNorm2d) for part in folded.modules())
    assert sum(isinstance(part, FoldedConv2d) for part in folded.modules()) == 8
    for name, array in model.state_dict().items():  # the model itself is as it was
        np.testing.assert_array_equal(array, before[name])


def test_in_float64_it_is_the_same_to_the_last_digits(rng):
    model = trained(minires.ResNet((1, 1), (4, 6), seed=0), rng).to(dtype=np.float64)
    x = rng.standard_normal((2, 9, 7, 3))
    np.testing.assert_allclose(minires.fold_batch_norm(model)(x), model(x), rtol=1e-12)


def test_a_convolution_with_a_bias_and_no_relu(rng):
    model = minires.Sequential(minires.Conv2d(3, 4, 3, stride=2, padding=1), minires.BatchNorm2d(4)).to(
        dtype=np.float64
    )
    for _, value in model.named_state():
        value.data[...] = rng.uniform(0.5, 2, value.data.shape)
    model.eval()
    x = rng.standard_normal((2, 6, 5, 3))
    np.testing.assert_allclose(minires.fold_batch_norm(model)(x), model(x), rtol=1e-12)


def test_a_batch_norm_that_is_behind_no_convolution_stays():
    model = minires.Sequential(
        minires.Conv2d(3, 4, 3), minires.ReLU(), minires.BatchNorm2d(4), minires.Conv2d(4, 4, 1), minires.BatchNorm2d(4)
    )
    kinds = [type(part).__name__ for part in minires.fold_batch_norm(model).layers()]
    assert kinds == ["Conv2d", "ReLU", "BatchNorm2d", "Sequential", "FoldedConv2d"]


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match=r"no BatchNorm2d stands behind a Conv2d in this ReLU"):
        minires.fold_batch_norm(minires.ReLU())


def test_a_folded_model_is_for_evaluation_alone(rng):
    folded = minires.fold_batch_norm(minires.Sequential(minires.Conv2d(3, 4, 3), minires.BatchNorm2d(4))).train()
    out = folded(rng.standard_normal((1, 5, 5, 3)).astype(np.float32))
    with pytest.raises(RuntimeError, match="for evaluation, train the one that was folded"):
        folded.backward(out)


def test_inputs_that_do_not_fit_are_refused():
    layer = FoldedConv2d(minires.Conv2d(3, 4, 3, padding=1), minires.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"FoldedConv2d expects images \(N, H, W, 3\)"):
        layer(np.zeros((1, 5, 5, 4), np.float32))
    with pytest.raises(ValueError, match=r"a residual like its output, \(1, 5, 5, 4\) float32, got \(1, 5, 5, 3\)"):
        layer(np.zeros((1, 5, 5, 3), np.float32), np.zeros((1, 5, 5, 3), np.float32))
