"""The kernels: cases done by hand, and the properties that their definitions promise."""

import doctest

import numpy as np
import pytest

from minires.kernels import reference
from minires.kernels.reference import (
    batch_norm_add_relu_backward_sums,
    batch_norm_add_relu_forward,
    batch_norm_backward,
    batch_norm_backward_sums,
    batch_norm_forward,
    batch_norm_statistics,
    col2im,
    conv2d_backward,
    conv2d_forward,
    dropout_backward,
    dropout_forward,
    global_avg_pool2d_backward,
    global_avg_pool2d_forward,
    im2col,
    linear_forward,
    max_pool2d_backward,
    max_pool2d_forward,
    relu_backward,
    relu_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
    sum_over_rows,
)

# height, width, channels, kernel size, stride, padding: the network's kinds, odd sizes, overlaps, windows that leave
# pixels out, and a border wider than the window
SHAPES = [
    (8, 8, 3, 3, 1, 1),
    (8, 8, 4, 3, 2, 1),
    (8, 8, 4, 1, 2, 0),
    (7, 5, 2, 3, 2, 1),
    (9, 6, 1, 2, 3, 0),
    (5, 5, 2, 5, 1, 2),
    (4, 4, 3, 4, 1, 0),
    (6, 7, 2, 3, 4, 3),
    (1, 1, 2, 1, 1, 0),
]


def batch_norm_of_its_batch(x, weight, bias, eps):
    mean, var = batch_norm_statistics(x)
    return batch_norm_forward(x, weight, bias, mean, var, eps), mean, var


def batch_norm_gradients(dout, x, weight, mean, var, eps):
    dweight, dbias = batch_norm_backward_sums(dout, x, mean, var, eps)
    return batch_norm_backward(dout, x, weight, mean, var, eps, dweight, dbias), dweight, dbias


def test_the_worked_numbers_of_the_docstrings():
    failed, tried = doctest.testmod(reference)
    assert failed == 0
    assert tried >= 20


def direct_convolution(x, weight, stride, padding):
    """The definition, position by position."""
    kh, kw, _, O = weight.shape
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    oh = (padded.shape[1] - kh) // stride + 1
    ow = (padded.shape[2] - kw) // stride + 1
    out = np.zeros((len(x), oh, ow, O))
    for i in range(oh):
        for j in range(ow):
            window = padded[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
            out[:, i, j] = np.einsum("nhwc,hwco->no", window, weight)
    return out


def test_relu_by_hand():
    x = np.array([-2.0, 0.0, 3.0])
    out = relu_forward(x)
    np.testing.assert_array_equal(out, [0, 0, 3])
    np.testing.assert_array_equal(relu_backward(np.array([5.0, 6.0, 7.0]), out), [0, 0, 7])


def test_relu_lets_a_nan_through():
    assert np.isnan(relu_forward(np.array([np.nan]))).all()


def test_linear_by_hand():
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    weight = np.array([[1.0, 0.0, -1.0], [0.5, 2.0, 1.0]])
    out = linear_forward(x, weight, bias=np.array([10.0, 20.0, 30.0]))
    np.testing.assert_array_equal(out, [[12.0, 24.0, 31.0], [15.0, 28.0, 31.0]])


def test_sums_of_many_float32_rows_lose_no_digits(rng):
    x = rng.uniform(0, 1, (131072, 3)).astype(np.float32)
    np.testing.assert_allclose(sum_over_rows(x), x.astype(np.float64).sum(axis=0), rtol=1e-7)
    assert sum_over_rows(x).dtype == np.float32


def test_dropout_zeroes_with_probability_p_and_keeps_the_expected_value():
    x = np.ones((1000, 1000), np.float32)
    out = dropout_forward(x, 0.2, key=1, step=0)
    assert abs((out == 0).mean() - 0.2) < 0.002  # 5 standard deviations
    np.testing.assert_array_equal(np.unique(out), np.array([0, 1.25], np.float32))


def test_dropout_backward_uses_the_mask_of_the_forward(rng):
    x = rng.standard_normal((5, 7)) + 10
    out = dropout_forward(x, 0.3, key=2, step=3)
    dout = rng.standard_normal((5, 7))
    np.testing.assert_allclose(dropout_backward(dout, 0.3, key=2, step=3), dout * out / x)


def test_global_average_by_hand():
    x = np.arange(8.0).reshape(1, 2, 2, 2)
    np.testing.assert_array_equal(global_avg_pool2d_forward(x), [[3, 4]])
    dx = global_avg_pool2d_backward(np.array([[4.0, 8.0]]), x.shape)
    np.testing.assert_array_equal(dx, np.broadcast_to([1.0, 2.0], x.shape))


def test_cross_entropy_by_hand():
    logits = np.log(np.array([[1.0, 2.0, 1.0], [1.0, 1.0, 6.0]]))
    labels = np.array([1, 0])
    loss, probabilities = softmax_cross_entropy_forward(logits, labels)
    np.testing.assert_allclose(probabilities, [[0.25, 0.5, 0.25], [0.125, 0.125, 0.75]])
    np.testing.assert_allclose(loss, (np.log(2) + np.log(8)) / 2)
    dlogits = softmax_cross_entropy_backward(1.0, probabilities, labels)
    np.testing.assert_allclose(dlogits, [[0.125, -0.25, 0.125], [-0.4375, 0.0625, 0.375]])


def test_cross_entropy_survives_huge_scores():
    loss, probabilities = softmax_cross_entropy_forward(
        np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32), np.array([0, 0])
    )
    np.testing.assert_array_equal(probabilities, [[1, 0], [0, 1]])
    assert loss == 1e4


def test_each_row_is_measured_by_its_own_largest_score():
    logits = np.array([[1000, 0], [-1000, -999]], np.float32)
    loss, _ = softmax_cross_entropy_forward(logits, np.array([0, 0]))
    np.testing.assert_allclose(loss, np.log(1 + np.e) / 2, rtol=1e-6)


def test_label_smoothing_spreads_the_target(rng):
    logits, labels = rng.standard_normal((4, 5)), np.array([0, 4, 2, 2])
    target = np.full((4, 5), 0.3 / 5)
    target[np.arange(4), labels] += 0.7
    loss, probabilities = softmax_cross_entropy_forward(logits, labels, 0.3)
    np.testing.assert_allclose(loss, -(target * np.log(probabilities)).sum() / 4)
    dlogits = softmax_cross_entropy_backward(2.0, probabilities, labels, 0.3)
    np.testing.assert_allclose(dlogits, 2 * (probabilities - target) / 4)


def test_batch_norm_normalises_channels_of_very_different_scale(rng):
    scale, shift = np.array([1e-2, 1.0, 1e3]), np.array([5.0, -1.0, 1e4])
    x = (rng.standard_normal((16, 5, 7, 3)) * scale + shift).astype(np.float32)
    out, mean, var = batch_norm_of_its_batch(x, np.ones(3, np.float32), np.zeros(3, np.float32), eps=0.0)
    np.testing.assert_allclose(mean, x.mean(axis=(0, 1, 2), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(var, x.var(axis=(0, 1, 2), dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(out.mean(axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(out.var(axis=(0, 1, 2)), 1, rtol=1e-4)


def test_batch_norm_of_a_constant_channel_is_its_bias():
    x = np.full((4, 8, 8, 1), 1234.567, np.float32)
    out, _, var = batch_norm_of_its_batch(x, np.ones(1, np.float32), np.full(1, 3, np.float32), eps=1e-5)
    assert 0 <= var[0] < 1e-6
    np.testing.assert_allclose(out, 3, atol=0.05)


def test_batch_norm_with_residual_and_relu_is_the_three_steps_in_a_row(rng):
    x, residual, dout = rng.standard_normal((3, 4, 5, 6, 2))
    weight, bias = rng.standard_normal((2, 2))
    plain, mean, var = batch_norm_of_its_batch(x, weight, bias, 1e-5)
    out = batch_norm_add_relu_forward(x, weight, bias, mean, var, 1e-5, residual, relu=True)
    np.testing.assert_array_equal(out, np.maximum(plain + residual, 0))
    g, *sums = batch_norm_add_relu_backward_sums(dout, x, out, mean, var, 1e-5)
    np.testing.assert_array_equal(g, dout * (out > 0))
    for actual, expected in zip(sums, batch_norm_backward_sums(g, x, mean, var, 1e-5), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_batch_norm_sends_back_nothing_along_1_and_x(rng):
    x, dout = rng.standard_normal((2, 4, 3, 3, 2))
    weight = np.array([2.0, -3.0])
    dx, *_ = batch_norm_gradients(dout, x, weight, *batch_norm_statistics(x), 0.0)
    np.testing.assert_allclose(dx.sum(axis=(0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose((dx * x).sum(axis=(0, 1, 2)), 0, atol=1e-12)


def test_batch_norm_of_a_batch_in_two_parts_whose_statistics_and_sums_are_put_together(rng):
    """What several processes do: the sums of all, times the share of the rows that a part has."""
    x, dout = rng.standard_normal((2, 6, 3, 4, 2))
    weight = np.array([2.0, -3.0])
    mean, var = batch_norm_statistics(x)
    expected, dweight, dbias = batch_norm_gradients(dout, x, weight, mean, var, 1e-5)
    parts = slice(0, 2), slice(2, 6)
    sums = [batch_norm_backward_sums(dout[part], x[part], mean, var, 1e-5) for part in parts]
    for total, both in zip((dweight, dbias), zip(*sums, strict=True), strict=True):
        np.testing.assert_allclose(sum(both), total)
    for part, share in zip(parts, (1 / 3, 2 / 3), strict=True):
        dx = batch_norm_backward(dout[part], x[part], weight, mean, var, 1e-5, dweight * share, dbias * share)
        np.testing.assert_allclose(dx, expected[part], atol=1e-12)


def direct_max_pool(x, k, stride):
    N, H, W, C = x.shape
    oh, ow = (H - k) // stride + 1, (W - k) // stride + 1
    out = np.zeros((N, oh, ow, C), x.dtype)
    for i in range(oh):
        for j in range(ow):
            out[:, i, j] = x[:, i * stride : i * stride + k, j * stride : j * stride + k].max(axis=(1, 2))
    return out


@pytest.mark.parametrize(
    ("H", "W", "k", "stride"), [(8, 8, 2, 2), (7, 5, 3, 1), (7, 9, 3, 2), (9, 6, 2, 3), (4, 4, 1, 1)]
)
def test_max_pooling_is_its_definition_and_sends_dout_to_the_largest_pixels(rng, H, W, k, stride):
    x = rng.standard_normal((3, H, W, 2))
    out = max_pool2d_forward(x, (k, k), stride)
    np.testing.assert_array_equal(out, direct_max_pool(x, k, stride))
    dout = rng.standard_normal(out.shape)
    dx = max_pool2d_backward(dout, x, out, (k, k), stride)
    np.testing.assert_allclose((dx * x).sum(), (dout * out).sum())  # out is linear in x while the largest stay so
    np.testing.assert_allclose(dx.sum(axis=(1, 2)), dout.sum(axis=(1, 2)))
    assert not np.shares_memory(out, x)


def test_on_a_tie_the_first_of_the_largest_gets_the_gradient():
    x = np.zeros((1, 4, 4, 1))
    x[0, 1, 1] = x[0, 2, 3] = x[0, 3, 2] = 5
    out = max_pool2d_forward(x, (2, 2), 2)
    dx = max_pool2d_backward(np.array([1.0, 2, 3, 4]).reshape(1, 2, 2, 1), x, out, (2, 2), 2)
    np.testing.assert_array_equal(dx.reshape(4, 4), [[0, 0, 2, 0], [0, 1, 0, 0], [3, 0, 0, 4], [0, 0, 0, 0]])


def test_max_pooling_lets_a_nan_through():
    x = np.array([[1.0, np.nan], [2.0, 0.0]]).reshape(1, 2, 2, 1)
    assert np.isnan(max_pool2d_forward(x, (2, 2), 2)).all()


def test_im2col_by_hand():
    x = np.arange(9.0).reshape(1, 3, 3, 1)
    columns = im2col(x, (2, 2), stride=1, padding=0)
    expected = [[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]
    np.testing.assert_array_equal(columns.reshape(4, 4), expected)
    pixels_times_windows = [[0, 2, 2], [6, 16, 10], [6, 14, 8]]  # each pixel as often as a window shows it
    np.testing.assert_array_equal(col2im(columns, x.shape, (2, 2), 1, 0)[0, :, :, 0], pixels_times_windows)


@pytest.mark.parametrize(("H", "W", "C", "k", "stride", "padding"), SHAPES)
def test_im2col_and_col2im_are_adjoint(rng, H, W, C, k, stride, padding):
    x = rng.standard_normal((2, H, W, C))
    columns = im2col(x, (k, k), stride, padding)
    c = rng.standard_normal(columns.shape)
    np.testing.assert_allclose((columns * c).sum(), (x * col2im(c, x.shape, (k, k), stride, padding)).sum())


@pytest.mark.parametrize(("H", "W", "C", "k", "stride", "padding"), SHAPES)
def test_convolution_is_its_definition_and_its_backward_the_adjoint(rng, H, W, C, k, stride, padding):
    x, weight, bias = rng.standard_normal((3, H, W, C)), rng.standard_normal((k, k, C, 4)), rng.standard_normal(4)
    out = conv2d_forward(x, weight, bias, stride, padding)
    np.testing.assert_allclose(out, direct_convolution(x, weight, stride, padding) + bias, rtol=1e-10, atol=1e-12)

    dout = rng.standard_normal(out.shape)
    dx, dweight, dbias = conv2d_backward(dout, x, weight, stride, padding)
    linear_part = (dout * (out - bias)).sum()  # linear in x and in weight: both ways round give the same number
    np.testing.assert_allclose((dx * x).sum(), linear_part)
    np.testing.assert_allclose((dweight * weight).sum(), linear_part)
    np.testing.assert_allclose(dbias, dout.sum(axis=(0, 1, 2)))

    no_dx, *others = conv2d_backward(dout, x, weight, stride, padding, need_dx=False)
    assert no_dx is None
    np.testing.assert_array_equal(others[0], dweight)


def test_convolution_with_a_rectangular_window(rng):
    x, weight = rng.standard_normal((2, 6, 7, 3)), rng.standard_normal((2, 4, 3, 5))
    out = conv2d_forward(x, weight)
    np.testing.assert_allclose(out, direct_convolution(x, weight, 1, 0), rtol=1e-10, atol=1e-12)
    dout = rng.standard_normal(out.shape)
    dx, dweight, _ = conv2d_backward(dout, x, weight)
    np.testing.assert_allclose((dx * x).sum(), (dout * out).sum())
    np.testing.assert_allclose((dweight * weight).sum(), (dout * out).sum())


def test_chunks_of_images_give_what_the_whole_batch_gives(rng, monkeypatch):
    x, weight = rng.standard_normal((5, 6, 6, 3)), rng.standard_normal((3, 3, 3, 4))
    dout = rng.standard_normal((5, 6, 6, 4))
    whole = conv2d_forward(x, weight, padding=1), *conv2d_backward(dout, x, weight, padding=1)
    monkeypatch.setattr(reference, "COLUMN_BYTES", 2 * 36 * 27 * 8)  # two images
    assert [c.stop - c.start for c in reference.image_chunks(dout.shape, weight.shape, 8)] == [2, 2, 2]
    chunked = conv2d_forward(x, weight, padding=1), *conv2d_backward(dout, x, weight, padding=1)
    for a, b in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_columns_of_a_batch_never_exist_at_once(rng, monkeypatch):
    largest = []
    whole = reference.im2col

    def watched(x, *args):
        columns = whole(x, *args)
        largest.append(columns.nbytes)
        return columns

    monkeypatch.setattr(reference, "im2col", watched)
    conv2d_forward(np.zeros((64, 32, 32, 64), np.float32), np.zeros((3, 3, 64, 64), np.float32), padding=1)
    assert max(largest) <= 8 * 2**20  # of 151 MB
