"""Each layer: gradients, modes, initial values and the messages for inputs that do not fit."""

import re

import numpy as np
import pytest

from minires import (
    BatchNorm2d,
    Bias2d,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    check_gradients,
    summary,
)


@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (1, 7, 7, 3), (1, 3, 3, 3)])
@pytest.mark.parametrize(
    "make",
    [
        lambda rng: ReLU(),
        lambda rng: Dropout(0.2, rng=rng),
        lambda rng: Flatten(),
        lambda rng: GlobalAvgPool2d(),
        lambda rng: MaxPool2d(2),
        lambda rng: MaxPool2d(3, stride=1),
        lambda rng: MaxPool2d(1, stride=2),
        lambda rng: BatchNorm2d(3),
        lambda rng: BatchNorm2d(3, relu=True),
        lambda rng: Conv2d(3, 4, 3, padding=1, rng=rng),
        lambda rng: Conv2d(3, 4, 3, stride=2, padding=1, bias=False, rng=rng),
        lambda rng: Conv2d(3, 4, 1, stride=2, rng=rng),
        lambda rng: Conv2d(3, 4, 3, stride=3, rng=rng),
    ],
)
def test_gradients_agree_with_finite_differences(rng, make, shape):
    layer = make(rng)
    for parameter in layer.parameters():  # away from the initial zeros and ones
        parameter.data += 0.3 * rng.standard_normal(parameter.data.shape).astype(np.float32)
    check_gradients(layer, rng.standard_normal(shape))


def test_linear_gradients_agree_with_finite_differences(rng):
    check_gradients(Linear(5, 3, rng=rng), rng.standard_normal((4, 5)))
    check_gradients(Linear(5, 3, bias=False, rng=rng), rng.standard_normal((1, 5)))


def test_pooling_and_flattening_in_a_network_by_hand():
    x = np.arange(32, dtype=np.float32).reshape(1, 4, 4, 2)
    model = Sequential(MaxPool2d(2), Flatten())
    np.testing.assert_array_equal(model(x), [[10, 11, 14, 15, 26, 27, 30, 31]])  # channels last
    dx = model.backward(np.arange(1, 9, dtype=np.float32).reshape(1, 8))
    expected = np.zeros_like(x)
    expected[0, 1::2, 1::2] = np.arange(1, 9).reshape(2, 2, 2)
    np.testing.assert_array_equal(dx, expected)


def test_a_network_with_pooling_and_flattening_has_its_table_of_layers(rng):
    model = Sequential(Conv2d(3, 8, 3, padding=1, rng=rng), ReLU(), MaxPool2d(2), Flatten(), Linear(8 * 16 * 16, 10))
    rows = summary(model).splitlines()[3:5]
    assert [row.split() for row in rows] == [
        ["Conv2d-1", "[-1,", "8,", "32,", "32]", "224"],
        ["Linear-2", "[-1,", "10]", "20,490"],
    ]


def test_an_empty_batch_can_be_flattened():
    layer = Flatten()
    assert layer.backward(layer(np.zeros((0, 2, 3, 4), np.float32))).shape == (0, 2, 3, 4)


def test_dropout_in_evaluation_is_the_identity(rng):
    x = rng.standard_normal((3, 4))
    assert Dropout(0.7).eval()(x) is x


def test_dropout_draws_a_new_mask_each_step_and_the_same_in_each_run():
    x = np.ones((4, 100), np.float32)
    layer, again, other = Dropout(0.5, rng=1), Dropout(0.5, rng=1), Dropout(0.5, rng=2)
    first, second = layer(x), layer(x)
    assert (first != second).any()
    assert (first != other(x)).any()
    np.testing.assert_array_equal(again(x), first)
    again.step = 1
    np.testing.assert_array_equal(again(x), second)


def test_two_dropouts_of_one_generator_draw_different_masks():
    rng = np.random.default_rng(0)
    assert Dropout(rng=rng).key != Dropout(rng=rng).key


def test_dropout_with_p_0_is_the_identity_both_ways(rng):
    layer, x = Dropout(0.0), rng.standard_normal((3, 4))
    assert layer(x) is x
    assert layer.backward(x) is x


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan")])
def test_dropout_refuses_a_p_that_is_no_probability(p):
    with pytest.raises(ValueError, match=f"p must be at least 0 and below 1, got {p}"):
        Dropout(p)


def test_running_statistics_in_closed_form(rng):
    layer = BatchNorm2d(2, momentum=0.3).to(dtype=np.float64)
    mean, var = np.zeros(2), np.ones(2)
    for _ in range(3):
        x = rng.standard_normal((4, 3, 3, 2)) * [1, 10] + [5, -3]
        layer(x)
        mean = 0.7 * mean + 0.3 * x.mean(axis=(0, 1, 2))
        var = 0.7 * var + 0.3 * x.var(axis=(0, 1, 2), ddof=1)
    np.testing.assert_allclose(layer.running_mean.data, mean)
    np.testing.assert_allclose(layer.running_var.data, var)
    np.testing.assert_allclose(layer.eval()(x), (x - mean) / np.sqrt(var + 1e-5))
    np.testing.assert_allclose(layer.running_mean.data, mean)


def test_batch_norm_sends_the_residual_its_gradient(rng):
    layer = BatchNorm2d(2, relu=True).to(dtype=np.float64)
    x, residual, dout = rng.standard_normal((3, 2, 3, 3, 2))
    out = layer(x, residual)
    _, dresidual = layer.backward(dout)
    np.testing.assert_array_equal(dresidual, np.where(out > 0, dout, 0))


def test_convolutions_start_with_the_variance_of_he():
    weight = Conv2d(64, 128, 3, rng=0).weight.data
    assert abs(weight.std() / np.sqrt(2 / (9 * 64)) - 1) < 0.01
    assert abs(weight.mean()) < 1e-3
    assert (Conv2d(3, 4, 1).bias.data == 0).all()


def test_linear_starts_as_in_pytorch():
    layer = Linear(100, 400, rng=0)
    for parameter in (layer.weight, layer.bias):
        assert abs(parameter.data).max() <= 0.1
        assert abs(parameter.data.std() / (0.1 / np.sqrt(3)) - 1) < 0.05


def test_a_bias_with_residual_and_relu_by_hand(rng):
    layer = Bias2d(2, relu=True)
    layer.bias.data[...] = [1, -2]
    x = np.array([[1.0, 1.0], [-3.0, 4.0]], np.float32).reshape(1, 1, 2, 2)
    residual = np.array([[0.5, 0.5], [1.0, 1.0]], np.float32).reshape(1, 1, 2, 2)
    np.testing.assert_array_equal(layer(x, residual).reshape(2, 2), [[2.5, 0], [0, 3]])
    dout = np.array([[5.0, 6.0], [7.0, 8.0]], np.float32).reshape(1, 1, 2, 2)
    dx, dresidual = layer.backward(dout)
    np.testing.assert_array_equal(dx.reshape(2, 2), [[5, 0], [0, 8]])
    np.testing.assert_array_equal(dresidual, dx)
    np.testing.assert_array_equal(layer.bias.grad, [5, 8])
    with pytest.raises(ValueError, match="Bias2d expects a residual like x"):
        layer(x, residual[:, :, :1])


def test_numpy_numbers_do_not_promote(rng):
    x = rng.standard_normal((2, 4, 4, 3)).astype(np.float32)
    tenth = np.float64(0.1)
    for layer in (Dropout(tenth), BatchNorm2d(3, tenth, tenth)):
        assert layer(x).dtype == layer.backward(x).dtype == layer.eval()(x).dtype == np.float32


def test_a_seed_fixes_the_initial_weights():
    np.testing.assert_array_equal(Conv2d(3, 4, 3, rng=5).weight.data, Conv2d(3, 4, 3, rng=5).weight.data)
    assert (Linear(3, 4, rng=5).weight.data != Linear(3, 4, rng=6).weight.data).any()
    assert (Linear(3, 4).weight.data != Linear(3, 4).weight.data).any()


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (Linear(5, 3), np.zeros((4, 6), np.float32), r"Linear expects \(N, 5\), got \(4, 6\)"),
        (Linear(5, 3), np.zeros((4, 5)), "Linear has float32 parameters, got an input of float64"),
        (GlobalAvgPool2d(), np.zeros((4, 6)), r"expects \(N, H, W, C\), got \(4, 6\)"),
        (GlobalAvgPool2d(), np.zeros((2, 0, 8, 3)), r"expects \(N, H, W, C\), got \(2, 0, 8, 3\)"),
        (MaxPool2d(2), np.zeros((4, 6)), r"MaxPool2d expects \(N, H, W, C\), got \(4, 6\)"),
        (MaxPool2d(3), np.zeros((1, 9, 2, 3)), r"MaxPool2d: with padding 0, a window of 3 does not fit into \(1, 9, 2"),
        (BatchNorm2d(3), np.zeros((4, 3, 8, 8)), r"images \(N, H, W, 3\), channels last, got \(4, 3, 8, 8\)"),
        (Bias2d(3), np.zeros((4, 8, 8, 2), np.float32), r"Bias2d expects images \(N, H, W, 3\), channels last, got"),
        (Bias2d(3), np.zeros((4, 8, 8, 3)), "Bias2d has float32 parameters, got an input of float64"),
        (BatchNorm2d(3), np.zeros((1, 1, 1, 3), np.float32), r"more than one value .* got x of shape \(1, 1, 1, 3\)"),
        (Conv2d(3, 4, 3), np.zeros((8, 8, 3)), r"Conv2d expects images \(N, H, W, 3\), channels last, got \(8, 8, 3\)"),
        (Conv2d(3, 4, 3), np.zeros((1, 8, 8, 3), np.uint8), "Conv2d has float32 parameters, got an input of uint8"),
        (Conv2d(3, 4, 5, padding=1), np.zeros((1, 9, 2, 3), np.float32), r"a window of 5 does not fit into \(1, 9, 2"),
    ],
)
def test_inputs_that_do_not_fit_are_named(layer, x, message):
    with pytest.raises(ValueError, match=message):
        layer(x)


@pytest.mark.parametrize("dout_shape", [(1,), (4, 4), (2, 1, 1, 4), (2, 4, 4, 1), (2, 4, 4, 4, 1), (3, 4, 4, 4)])
@pytest.mark.parametrize(
    "layer", [ReLU(), Dropout(0.5), Dropout(0), BatchNorm2d(4), Bias2d(4), Conv2d(4, 4, 3, padding=1)]
)
def test_a_dout_that_would_only_broadcast_is_refused(layer, dout_shape):
    layer(np.ones((2, 4, 4, 4), np.float32))
    message = f"{type(layer).__name__}.backward expects the gradient of its output, (2, 4, 4, 4), got {dout_shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.backward(np.ones(dout_shape, np.float32))


@pytest.mark.parametrize(
    ("layer", "x_shape", "out_shape"),
    [
        (Linear(5, 3), (4, 5), (4, 3)),
        (GlobalAvgPool2d(), (4, 2, 2, 3), (4, 3)),
        (Flatten(), (4, 2, 2, 3), (4, 12)),
        (MaxPool2d(2), (4, 9, 7, 3), (4, 4, 3, 3)),
        (Conv2d(3, 6, 3, stride=2), (4, 9, 7, 3), (4, 4, 3, 6)),
    ],
)
def test_a_dout_in_the_shape_of_the_input_is_refused(layer, x_shape, out_shape):
    layer(np.ones(x_shape, np.float32))
    with pytest.raises(ValueError, match=re.escape(f"the gradient of its output, {out_shape}, got {x_shape}")):
        layer.backward(np.ones(x_shape, np.float32))


def test_a_residual_that_does_not_match_is_named():
    with pytest.raises(ValueError, match=r"residual like x, \(2, 4, 4, 3\) float32, got \(2, 4, 4, 1\) float32"):
        BatchNorm2d(3)(np.zeros((2, 4, 4, 3), np.float32), np.zeros((2, 4, 4, 1), np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 3, "in_channels": 0}, "in_channels must be an integer of at least 1, got 0"),
        ({"kernel_size": 0}, "kernel_size must be an integer of at least 1, got 0"),
        ({"kernel_size": (3, 3)}, r"kernel_size must be an integer of at least 1, got \(3, 3\)"),
        ({"kernel_size": 3, "stride": 0}, "stride must be an integer of at least 1, got 0"),
        ({"kernel_size": 3, "padding": -1}, "padding must be an integer of at least 0, got -1"),
    ],
)
def test_convolution_sizes_that_are_none_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Conv2d(**{"in_channels": 3, "out_channels": 4} | arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0, 3), "Linear: in_features must be an integer of at least 1, got 0"),
        (lambda: MaxPool2d((2, 2)), r"MaxPool2d: kernel_size must be an integer of at least 1, got \(2, 2\)"),
        (lambda: MaxPool2d(2, stride=0), "MaxPool2d: stride must be an integer of at least 1, got 0"),
        (lambda: BatchNorm2d(2.5), r"BatchNorm2d: num_features must be an integer of at least 1, got 2\.5"),
        (lambda: BatchNorm2d(3, eps=-1), "eps must be above 0 in float32 and momentum from 0 to 1, got -1"),
        (lambda: BatchNorm2d(3, eps=1e-46), "eps must be above 0 in float32 and momentum from 0 to 1, got 1e-46"),
        (lambda: BatchNorm2d(3, momentum=2), "got 1e-05 and 2"),
    ],
)
def test_other_sizes_that_are_none_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("size", [512, 2048])
def test_the_average_of_a_large_constant_image_is_that_constant(size):
    """A float32 sum of four million tenths has lost 4 %."""
    x = np.full((1, size, size, 1), 0.1, np.float32)
    np.testing.assert_array_equal(GlobalAvgPool2d()(x), np.float32([[0.1]]))


@pytest.mark.parametrize("shape", [(10, 10, 10, 3), (128, 32, 32, 4), (1, 1000, 1, 2)])
@pytest.mark.parametrize("value", [9876.5, 0.1, -1e5])
def test_a_constant_channel_is_normalised_to_0(shape, value):
    out = BatchNorm2d(shape[-1])(np.full(shape, value, np.float32))
    assert abs(out).max() < 1e-6


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint64])
def test_sizes_in_numpys_integers_are_those_in_pythons(rng, dtype):
    """In uint8, 3 * 3 * 100 channels and the 4,000 numbers of a channel would wrap round."""
    x = rng.standard_normal((40, 20, 20, 100)).astype(np.float32)
    one = dtype(1)
    for make in (
        lambda n: Conv2d(100 * n, 3 * n, 3 * n, stride=2 * n, padding=70 * n, rng=0),
        lambda n: BatchNorm2d(100 * n),
        lambda n: MaxPool2d(2 * n),
    ):
        np.testing.assert_array_equal(make(one)(x), make(1)(x))
    assert Linear(100 * one, 100 * one, rng=0)(x[0, 0]).shape == (20, 100)
    assert Bias2d(100 * one)(x).shape == x.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchNorm2d(3, momentum=None), "BatchNorm2d: momentum must be a number, got None"),
        (lambda: BatchNorm2d(3, eps="1e-5"), "BatchNorm2d: eps must be a number, got '1e-5'"),
        (lambda: Dropout(None), "Dropout: p must be a number, got None"),
    ],
)
def test_settings_that_are_no_numbers_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()
