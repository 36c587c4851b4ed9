"""The GPU's kernels: each equals its reference twin, run by NumPy in float64 on the same numbers, and changes no input.

They run twice: everywhere on an emulator of the GPU (cuda_emulator.h), small, and where there is a GPU on that, large.
The bounds are relative norms: 1e-6 in float32, 1e-3 with TF32 in convolutions, 1e-2 in float16. In the last two each
number is rounded to 10 bits, and off by 2^-11 at most; there is room for sums.
"""

import inspect

import numpy as np
import pytest
import strict_array
from conftest import relative_error
from cuda_emulator import COMPILER

from minires import backend
from minires.kernels import gpu, reference

BOUNDS = {"float32": 1e-6, "tf32": 1e-3, "float16": 1e-2}


@pytest.fixture(
    params=[
        pytest.param("emulated", marks=pytest.mark.skipif(COMPILER is None, reason="needs g++ on Linux")),
        pytest.param("real", marks=pytest.mark.gpu),
    ]
)
def xp(request):
    """The library of the device's arrays: the stand-in, or CuPy."""
    return strict_array if request.param == "emulated" else backend.gpu_library()


@pytest.fixture(params=["float32", "float16"])
def dtype(request):
    return request.param


@pytest.fixture(params=["float32", "tf32", "float16"])
def precision(request):
    """How a convolution multiplies; the type of the images goes with it."""
    before = gpu.precision()
    gpu.set_precision("tf32" if request.param == "float16" else request.param)
    yield request.param
    gpu.set_precision(before)


def draw(rng, dtype, *shape):
    """Random numbers as float64 that the dtype holds exactly."""
    return rng.standard_normal(shape).astype(dtype).astype(np.float64)


def call(xp, function, *arguments, dtype="float32", parameters=(), **options):
    """Call a GPU kernel on float64 host arrays: sent in the dtype, those counted in `parameters` in float32."""
    sent = [
        xp.asarray(a.astype("float32" if i in parameters else dtype) if a.dtype == np.float64 else a)
        if isinstance(a, np.ndarray)
        else a
        for i, a in enumerate(arguments)
    ]
    before = [xp.asnumpy(a) if hasattr(a, "dtype") else a for a in sent]
    results = function(*sent, **options)
    for a, b in zip(sent, before, strict=True):
        if hasattr(a, "dtype"):
            np.testing.assert_array_equal(xp.asnumpy(a), b)
    results = results if isinstance(results, tuple) else (results,)
    return [None if r is None else xp.asnumpy(r) for r in results]


def assert_close(actual, expected, bound):
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            assert a.shape == e.shape
            assert relative_error(a, e) < bound


def test_every_name_of_the_reference_is_offered_with_the_same_arguments():
    for name, function in inspect.getmembers(reference, inspect.isfunction):
        if function.__module__ == reference.__name__:
            theirs, ours = inspect.signature(getattr(gpu, name)).parameters, inspect.signature(function).parameters
            assert list(theirs)[: len(ours)] == list(ours), name


# images, height, width, channels
BATCHES = [(3, 6, 5, 64), (2, 3, 2, 256), (2, 1, 2, 1), (5, 7, 3, 3), (3, 5, 5, 100), (33, 4, 4, 8)]
LARGE_BATCHES = [(128, 32, 32, 64), (128, 16, 16, 128), (128, 4, 4, 512), (200, 32, 32, 3)]


def batches(xp):
    return BATCHES if xp is strict_array else BATCHES + LARGE_BATCHES


def test_a_constant_channel_has_no_variance(xp):
    """With a mean that is off by its last bit, numbers near 10,000 would be normalised to 0.3."""
    x = np.tile(np.linspace(9876, 9877, 40, dtype=np.float32), (2, 10, 7, 1))
    mean, var = call(xp, gpu.batch_norm_statistics, x, dtype="float32")
    np.testing.assert_array_equal(mean, x[0, 0, 0])
    assert (var >= 0).all()
    assert (var < 1e-12).all()  # a GPU that multiplies and adds in one rounding leaves 1e-14


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_batch_norm(xp, rng, dtype, with_residual, relu):
    for shape in batches(xp):
        scale = 10.0 ** rng.integers(-2, 3, shape[-1])  # channels of very different scale and offset
        offset = (scale * rng.integers(-8, 9, shape[-1])).astype("float32")
        x = (draw(rng, "float32", *shape) * scale + offset).astype(dtype).astype(np.float64)
        weight, bias = draw(rng, "float32", shape[-1]), draw(rng, "float32", shape[-1])
        residual = draw(rng, dtype, *shape) if with_residual else None
        mean, var = reference.batch_norm_statistics(x)
        assert_close(call(xp, gpu.batch_norm_statistics, x, dtype=dtype), (mean, var), 1e-5)
        arguments = (x, weight, bias, mean, var, 1e-5, residual, relu)
        out = reference.batch_norm_add_relu_forward(*arguments)
        actual = call(xp, gpu.batch_norm_add_relu_forward, *arguments, dtype=dtype, parameters=(1, 2, 3, 4))
        assert actual[0].dtype == dtype
        assert_close(actual, out, 5 * BOUNDS[dtype])
        arguments = arguments[:6]
        actual = call(xp, gpu.batch_norm_forward, *arguments, dtype=dtype, parameters=(1, 2, 3, 4))
        assert_close(actual, reference.batch_norm_forward(*arguments), 5 * BOUNDS[dtype])

        out = out.astype(dtype).astype(np.float64) if relu else None
        arguments = (draw(rng, dtype, *shape), x, out, mean, var, 1e-5)
        expected = reference.batch_norm_add_relu_backward_sums(*arguments)
        actual = call(xp, gpu.batch_norm_add_relu_backward_sums, *arguments, dtype=dtype, parameters=(3, 4))
        np.testing.assert_array_equal(actual[0], expected[0])
        assert [a.dtype for a in actual] == [dtype, "float32", "float32"]
        assert_close(actual[1:], expected[1:], 10 * BOUNDS[dtype])
        arguments = (expected[0], x, mean, var, 1e-5)
        expected = reference.batch_norm_backward_sums(*arguments)
        actual = call(xp, gpu.batch_norm_backward_sums, *arguments, dtype=dtype, parameters=(2, 3))
        assert_close(actual, expected, 10 * BOUNDS[dtype])
        arguments = (*arguments[:2], weight, mean, var, 1e-5, *expected)
        actual = call(xp, gpu.batch_norm_backward, *arguments, dtype=dtype, parameters=(2, 3, 4, 6, 7))
        assert actual[0].dtype == dtype
        assert_close(actual, reference.batch_norm_backward(*arguments), 10 * BOUNDS[dtype])


def test_the_variance_of_a_constant_channel_is_zero_far_from_zero(xp):
    x = np.full((4, 3, 3, 8), 1e4 / 3).astype(np.float32)
    mean, var = call(xp, gpu.batch_norm_statistics, x)
    assert (var == 0).all()
    assert (mean == x[0, 0, 0, 0]).all()


def test_running_statistics(xp, rng):
    arrays = [rng.standard_normal(70).astype(np.float32) for _ in range(4)]
    expected = [array.copy() for array in arrays]
    reference.update_running_statistics(*expected, 0.1, 12)
    sent = [xp.asarray(array) for array in arrays]
    gpu.update_running_statistics(*sent, 0.1, 12)
    for actual, e in zip(sent, expected, strict=True):
        assert relative_error(xp.asnumpy(actual), e) < 1e-6


# images, height, width, channels in, channels out, window, stride, padding
CONVOLUTIONS = [
    (2, 8, 8, 64, 64, 3, 1, 1),
    (3, 5, 7, 64, 128, 3, 1, 1),
    (1, 1, 1, 64, 64, 3, 1, 1),
    (2, 8, 8, 64, 64, 3, 2, 1),
    (2, 9, 7, 64, 64, 3, 2, 1),  # phases of different sizes
    (2, 8, 6, 64, 64, 1, 2, 0),  # phases without a tap
    (2, 7, 7, 64, 64, 2, 3, 1),
    (2, 8, 8, 3, 64, 3, 1, 1),  # channels that fill no step
    (2, 6, 6, 20, 64, 3, 2, 1),
    (2, 6, 6, 64, 20, 3, 1, 1),  # nor a tile
    (3, 9, 7, 5, 6, 3, 2, 1),
    (2, 9, 10, 3, 4, 5, 2, 2),
    (2, 9, 6, 4, 2, 2, 3, 0),  # pixels that no window shows
    (2, 8, 8, 8, 4, 1, 1, 0),
    (140, 4, 4, 64, 64, 1, 1, 0),  # several splits of the weight gradient, the last one shorter
]
LARGE_CONVOLUTIONS = [
    (128, 32, 32, 3, 64, 3, 1, 1),  # the network's
    (128, 32, 32, 64, 64, 3, 1, 1),
    (32, 32, 32, 64, 128, 3, 2, 1),
    (128, 32, 32, 64, 128, 1, 2, 0),
    (64, 16, 16, 128, 128, 3, 1, 1),
    (32, 16, 16, 128, 256, 3, 2, 1),
    (64, 8, 8, 256, 256, 3, 1, 1),
    (64, 8, 8, 256, 512, 1, 2, 0),
    (32, 8, 8, 256, 512, 3, 2, 1),
    (128, 4, 4, 512, 512, 3, 1, 1),
    (33, 31, 17, 128, 192, 3, 1, 1),
]


@pytest.mark.slow
def test_convolution(xp, rng, precision):
    dtype = "float16" if precision == "float16" else "float32"
    for N, H, W, C, O, k, stride, padding in CONVOLUTIONS + (LARGE_CONVOLUTIONS if xp is not strict_array else []):
        x = draw(rng, dtype, N, H, W, C)
        weight, bias = draw(rng, "float32", k, k, C, O), draw(rng, "float32", O)
        for b in (None, bias):
            arguments = (x, weight, b, stride, padding)
            expected = reference.conv2d_forward(*arguments)
            actual = call(xp, gpu.conv2d_forward, *arguments, dtype=dtype, parameters=(1, 2))
            assert actual[0].dtype == dtype
            assert_close(actual, expected, BOUNDS[precision])
        dout = draw(rng, dtype, *expected.shape)
        arguments = (dout, x, weight, stride, padding)
        expected = reference.conv2d_backward(*arguments)
        actual = call(xp, gpu.conv2d_backward, *arguments, dtype=dtype, parameters=(2,))
        assert [a.dtype for a in actual] == [dtype, "float32", "float32"]
        assert_close(actual, expected, BOUNDS[precision])
        actual = call(
            xp, gpu.conv2d_backward, *arguments, dtype=dtype, parameters=(2,), need_dx=False, need_dbias=False
        )
        assert_close(actual, (None, expected[1], None), BOUNDS[precision])


@pytest.mark.full
@pytest.mark.parametrize("precision", ["tf32", "float16"], indirect=True)  # strict float32 uses no tiles
@pytest.mark.parametrize("which", range(3))
def test_every_tile_of_the_implicit_convolution(xp, rng, precision, which, monkeypatch):
    dtype = "float16" if precision == "float16" else "float32"
    gpu.module(xp)  # with all tiles, as it is kept for the tests that follow
    monkeypatch.setattr(gpu, "TILES", (gpu.TILES[which],))
    monkeypatch.setitem(gpu.GRADIENT_TILES, dtype, (gpu.GRADIENT_TILES[dtype][which],))
    x, weight = draw(rng, dtype, 2, 9, 8, 128), draw(rng, "float32", 3, 3, 128, 128)
    for stride in (1, 2):
        expected = reference.conv2d_forward(x, weight, None, stride, 1)
        actual = call(xp, gpu.conv2d_forward, x, weight, None, stride, 1, dtype=dtype, parameters=(1,))
        assert_close(actual, expected, BOUNDS[precision])
        dout = draw(rng, dtype, *expected.shape)
        expected = reference.conv2d_backward(dout, x, weight, stride, 1, need_dbias=False)
        actual = call(
            xp, gpu.conv2d_backward, dout, x, weight, stride, 1, dtype=dtype, parameters=(2,), need_dbias=False
        )
        assert_close(actual, expected, BOUNDS[precision])


def test_nan_and_infinity_are_kept(xp, rng, precision):
    """CUDA's own NaN has all bits set: an addition to them would turn it into 0. And a rectifier must not hide one."""
    dtype = "float16" if precision == "float16" else "float32"
    for bad in (np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0], np.float32(np.inf)):
        x, weight = draw(rng, "float32", 2, 4, 4, 64), draw(rng, "float32", 3, 3, 64, 64)
        weight[1, 1] = x[0] = 1.0
        x = x.astype(dtype)
        x[0, 1, 1, 5] = bad
        sent, weight_sent = xp.asarray(x), xp.asarray(weight.astype(np.float32))
        out = xp.asnumpy(gpu.conv2d_forward(sent, weight_sent, None, 1, 1))
        assert not np.isfinite(out[0, 1, 1]).any()
        assert np.isfinite(out[1]).all()
        ones, zeros = (xp.asarray(np.full(64, value, np.float32)) for value in (1, 0))
        normalised = xp.asnumpy(gpu.batch_norm_add_relu_forward(sent, ones, zeros, zeros, ones, 1e-5, None, True))
        assert not np.isfinite(normalised[0, 1, 1, 5])


def test_a_gradient_of_another_dtype_and_memory_with_gaps(xp, rng, dtype):
    """float32 from a loss comes to 16-bit images; and a slice may begin anywhere."""
    x, weight = draw(rng, dtype, 2, 4, 4, 64), draw(rng, "float32", 3, 3, 64, 64)
    dout = draw(rng, dtype, 2, 4, 4, 64)
    expected = reference.conv2d_backward(dout, x, weight, 1, 1)
    buffer = xp.asarray(np.concatenate([[0], x.ravel()]).astype(dtype))
    shifted = buffer[1:].reshape(x.shape)  # 2 or 4 bytes from where 16 could be read
    transposed = xp.asarray(weight.astype(np.float32).transpose(1, 0, 2, 3).copy()).transpose(1, 0, 2, 3)
    actual = gpu.conv2d_backward(xp.asarray(dout.astype(np.float32)), shifted, transposed, 1, 1)
    assert_close([xp.asnumpy(a) for a in actual], expected, 2 * BOUNDS["tf32" if dtype == "float32" else dtype])
    mean, var, weights = draw(rng, "float32", 64), draw(rng, "float32", 64) ** 2, draw(rng, "float32", 64)
    dweight, dbias = reference.batch_norm_backward_sums(dout, x, mean, var, 1e-5)
    expected = reference.batch_norm_backward(dout, x, weights, mean, var, 1e-5, dweight, dbias), dweight, dbias
    vectors = [xp.asarray(np.stack([v, v], axis=1).astype(np.float32))[:, 0] for v in (weights, mean, var)]
    sent = xp.asarray(dout.astype(np.float32)), shifted
    sums = gpu.batch_norm_backward_sums(*sent, *vectors[1:], 1e-5)
    actual = gpu.batch_norm_backward(*sent, *vectors, 1e-5, *sums), *sums
    assert_close([xp.asnumpy(a) for a in actual], expected, 10 * BOUNDS[dtype])


def test_columns_and_their_adjoint(xp, rng, dtype):
    for shape, k, stride, padding in (((2, 7, 6, 16), 3, 2, 1), ((2, 5, 5, 3), 2, 1, 0), ((1, 4, 4, 8), 1, 3, 2)):
        x = draw(rng, dtype, *shape)
        expected = reference.im2col(x, (k, k), stride, padding)
        (columns,) = call(xp, gpu.im2col, x, (k, k), stride, padding, dtype=dtype)
        np.testing.assert_array_equal(columns, expected)
        dcolumns = draw(rng, dtype, *expected.shape)
        expected = reference.col2im(dcolumns, shape, (k, k), stride, padding)
        actual = call(xp, gpu.col2im, dcolumns, shape, (k, k), stride, padding, dtype=dtype)
        assert_close(actual, expected, BOUNDS[dtype])


def test_linear(xp, rng, dtype, monkeypatch):
    for small in (2**22, 0):
        monkeypatch.setattr(gpu, "SMALL_PRODUCT", small)
        monkeypatch.setattr(gpu, "NARROW_PRODUCT", 0)
        x, weight, bias = draw(rng, dtype, 7, 70), draw(rng, "float32", 70, 10), draw(rng, "float32", 10)
        for b in (None, bias):
            actual = call(xp, gpu.linear_forward, x, weight, b, dtype=dtype, parameters=(1, 2))
            assert actual[0].dtype == dtype
            assert_close(actual, reference.linear_forward(x, weight, b), BOUNDS[dtype])
        dout = draw(rng, dtype, 7, 10)
        actual = call(xp, gpu.linear_backward, dout, x, weight, dtype=dtype, parameters=(2,))
        assert [a.dtype for a in actual] == [dtype, "float32", "float32"]
        assert_close(actual, reference.linear_backward(dout, x, weight), BOUNDS[dtype])


def test_pooling_and_sums(xp, rng, dtype):
    for shape in batches(xp):
        x, y = draw(rng, dtype, *shape), draw(rng, dtype, *shape)
        actual = call(xp, gpu.global_avg_pool2d_forward, x, dtype=dtype)
        assert_close(actual, reference.global_avg_pool2d_forward(x), BOUNDS[dtype])
        dout = draw(rng, dtype, shape[0], shape[3])
        actual = call(xp, gpu.global_avg_pool2d_backward, dout, shape, dtype=dtype)
        assert_close(actual, reference.global_avg_pool2d_backward(dout, shape), BOUNDS[dtype])
        assert_close(call(xp, gpu.add, x, y, dtype=dtype), x + y, BOUNDS[dtype])
        assert_close(call(xp, gpu.sum_over_rows, x, dtype=dtype), reference.sum_over_rows(x), 1e-6)


def test_dropout_draws_the_bits_of_the_host(xp, rng, dtype):
    x = draw(rng, dtype, 5, 37)
    key, step = 0xFEDCBA9876543210, 2**33 + 5
    expected = reference.dropout_forward(x, 0.3, key, step)
    (actual,) = call(xp, gpu.dropout_forward, x, 0.3, key, step, dtype=dtype)
    np.testing.assert_array_equal(actual == 0, expected == 0)
    assert_close([actual], expected, BOUNDS[dtype])
    assert_close(call(xp, gpu.dropout_backward, x, 0.3, key, step, dtype=dtype), expected, BOUNDS[dtype])
    for start in range(1, 6):  # x is a part of a batch
        expected = reference.dropout_forward(x, 0.3, key, step, start)
        (actual,) = call(xp, gpu.dropout_forward, x, 0.3, key, step, start, dtype=dtype)
        np.testing.assert_array_equal(actual == 0, expected == 0)
        assert_close([actual], expected, BOUNDS[dtype])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("label_dtype", ["uint8", "int64", "int32"])
def test_softmax_cross_entropy(xp, rng, dtype, smoothing, label_dtype):
    for N, K in ((128, 10), (3, 100), (1, 2)):
        logits, labels = draw(rng, dtype, N, K) * 8, rng.integers(0, K, N).astype(label_dtype)
        expected = reference.softmax_cross_entropy_forward(logits, labels.astype(int), smoothing)
        actual = call(xp, gpu.softmax_cross_entropy_forward, logits, labels, smoothing, dtype=dtype)
        assert actual[0].shape == ()
        assert_close(actual, expected, 1e-6)
        expected = reference.softmax_cross_entropy_backward(3.0, expected[1], labels.astype(int), smoothing)
        actual = call(xp, gpu.softmax_cross_entropy_backward, 3.0, actual[1], labels, smoothing)
        assert_close(actual, expected, 1e-6)


def test_optimizers(xp, rng):
    size = 1000
    for momentum, nesterov, weight_decay in ((0.0, False, 0.0), (0.9, False, 1e-2), (0.9, True, 1e-2)):
        arrays = [rng.standard_normal(size) for _ in range(3 if momentum else 2)] + ([] if momentum else [None])
        sent = [None if a is None else xp.asarray(a.astype(np.float32)) for a in arrays]
        for _ in range(3):
            for update, (param, grad, velocity) in ((reference.sgd_update, arrays), (gpu.sgd_update, sent)):
                update(param, grad, velocity, 0.1, momentum, nesterov, weight_decay, 0.5)
        for a, s in zip(arrays, sent, strict=True):
            assert a is None or relative_error(xp.asnumpy(s), a) < 1e-6
    arrays = [rng.standard_normal(size), rng.standard_normal(size), np.zeros(size), np.zeros(size)]
    sent = [xp.asarray(a.astype(np.float32)) for a in arrays]
    for step in (1, 2, 3):
        reference.adam_update(*arrays, step, 1e-3, (0.9, 0.999), 1e-8, 1e-2, 0.5)
        gpu.adam_update(*sent, step, 1e-3, (0.9, 0.999), 1e-8, 1e-2, 0.5)
    for a, s in zip(arrays, sent, strict=True):
        assert relative_error(xp.asnumpy(s), a) < 1e-6
    arrays = [rng.standard_normal(size), rng.standard_normal(size)]
    sent = [xp.asarray(a.astype(np.float32)) for a in arrays]
    reference.average_update(*arrays, 0.9)
    gpu.average_update(*sent, 0.9)
    assert relative_error(xp.asnumpy(sent[0]), arrays[0]) < 1e-6


def test_the_precision_is_checked():
    with pytest.raises(ValueError, match="precision must be 'tf32' or 'float32', got 'bf16'"):
        gpu.set_precision("bf16")


def test_a_sum_of_halves_and_floats_is_one_of_halves(xp, rng):
    a, b = rng.standard_normal((3, 5)).astype(np.float16), rng.standard_normal((3, 5)).astype(np.float32)
    np.testing.assert_allclose(xp.asnumpy(gpu.add(xp.asarray(a), xp.asarray(b))), a + b, atol=0.01)


@pytest.mark.parametrize("precision", ["tf32", "float16"], indirect=True)
def test_what_indices_of_32_bits_cannot_count_goes_another_way(precision, monkeypatch):
    """The weight gradient of 16 channels and 3x3 taps takes columns of 160 numbers, more than there are in x."""
    x = np.zeros((2, 6, 6, 16), "float16" if precision == "float16" else "float32")
    assert gpu.is_implicit(x, (3, 3, 16, 64), (2, 6, 6, 64))
    monkeypatch.setattr(gpu, "INDEX_LIMIT", 2 * 6 * 6 * 160)
    assert not gpu.is_implicit(x, (3, 3, 16, 64), (2, 6, 6, 64))
