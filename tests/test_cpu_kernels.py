"""The fast CPU kernels: each equals its reference twin, writes to no input, and has the same bits on any threads.

The bounds are relative norms in float32: 1e-6 where the same numbers are added in another order, 1e-5 for Winograd's
convolution, which adds and subtracts again.
"""

import concurrent.futures
import inspect
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import relative_error

import minires
from minires.kernels import cpu, memory, reference, threads, winograd

SAME_SUMS, WINOGRAD = 1e-6, 1e-5

# images, height, width, channels in, channels out, window, stride, padding
CONVOLUTIONS = [
    (3, 32, 32, 64, 64, 3, 1, 1),  # the network's
    (5, 16, 16, 128, 128, 3, 1, 1),
    (9, 8, 8, 256, 256, 3, 1, 1),
    (5, 4, 4, 512, 512, 3, 1, 1),
    (3, 32, 32, 3, 64, 3, 1, 1),
    (3, 32, 32, 64, 128, 3, 2, 1),
    (5, 8, 8, 256, 512, 3, 2, 1),
    (3, 32, 32, 64, 128, 1, 2, 0),
    (1, 32, 32, 64, 64, 3, 1, 1),  # one image
    (1, 1, 1, 16, 16, 3, 1, 1),
    (2, 7, 5, 16, 20, 3, 1, 1),  # sizes that tiles of four do not fill
    (3, 6, 13, 32, 16, 3, 1, 1),
    (300, 2, 3, 256, 256, 3, 1, 1),
    (40, 16, 13, 256, 181, 3, 1, 1),  # more tiles than exist at one time
    (129, 7, 5, 256, 181, 3, 1, 1),
    (40, 16, 16, 16, 16, 3, 1, 1),
    (3, 9, 7, 5, 6, 3, 2, 1),
    (2, 9, 9, 3, 4, 5, 1, 2),
    (2, 9, 10, 3, 4, 5, 2, 2),
    (2, 8, 8, 4, 6, 1, 1, 0),
    (2, 9, 6, 3, 2, 2, 3, 0),  # pixels that no window shows
    (2, 6, 7, 2, 3, 3, 4, 3),  # a border as wide as the window
    (5, 1, 1, 8, 8, 3, 2, 1),  # images smaller than the stride
    (3, 2, 9, 4, 6, 3, 4, 1),
    (2, 8, 8, 4, 4, 3, 1, 0),
    (2, 8, 8, 16, 16, 3, 1, 2),
    (700, 8, 8, 4, 8, 3, 1, 1),  # more images than groups of pieces
]
# images, height, width, channels
BATCHES = [(3, 32, 32, 64), (2, 4, 4, 512), (2, 1, 2, 1), (5, 7, 3, 3), (3, 5, 5, 100), (2, 3, 5, 3000)]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def assert_close(actual, expected, bound):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            assert (a.shape, a.dtype) == (e.shape, e.dtype)
            assert relative_error(a, e) < bound


def convolution_arguments(rng, N, H, W, C, O, k):
    return normal(rng, N, H, W, C), normal(rng, k, k, C, O), normal(rng, O)


def all_convolution_results(set_of_kernels, x, weight, bias, stride, padding, dout):
    out = set_of_kernels.conv2d_forward(x, weight, bias, stride, padding)
    return out, *set_of_kernels.conv2d_backward(dout, x, weight, stride, padding)


def all_batch_norm_results(set_of_kernels, x, weight, bias, residual, relu, dout):
    mean, var = set_of_kernels.batch_norm_statistics(x)
    plain = set_of_kernels.batch_norm_forward(x, weight, bias, mean, var, 1e-5)
    out = set_of_kernels.batch_norm_add_relu_forward(x, weight, bias, mean, var, 1e-5, residual, relu)
    same_mean, same_var = reference.batch_norm_statistics(x)  # so that the masks agree
    same_out = reference.batch_norm_add_relu_forward(x, weight, bias, same_mean, same_var, 1e-5, residual, relu)
    mask = same_out if relu else None
    g, *sums = set_of_kernels.batch_norm_add_relu_backward_sums(dout, x, mask, mean, var, 1e-5)
    dx = set_of_kernels.batch_norm_backward(g, x, weight, mean, var, 1e-5, *sums)
    plain_sums = set_of_kernels.batch_norm_backward_sums(dout, x, mean, var, 1e-5)
    sums = [s.astype(x.dtype) for s in (*sums, *plain_sums)]  # which may be float64 until here
    return out, mean, var, plain, dx, g, *sums


@pytest.fixture(params=["one piece", "many pieces"])
def pieces(request, monkeypatch):
    """Elementwise work in pieces of the usual sizes, which hold a whole array of most tests, and in small ones."""
    if request.param == "many pieces":
        for module, name, size in (
            (threads, "BLOCK", 2**12),
            (threads, "SMALLEST_BLOCK", 2**10),
            (cpu, "UPDATE_BLOCK", 2**8),
        ):
            monkeypatch.setattr(module, name, size)


@pytest.fixture
def thread_counts():
    """Set the number of threads to several values in turn, and back in the end."""

    def in_turn():
        for n in (1, 2, 3, 16):
            threads.set_num_threads(n)
            yield n

    yield in_turn()
    threads.set_num_threads(None)


def assert_same_bits_with_any_number_of_threads(thread_counts, results):
    first = None
    for _ in thread_counts:
        bits = [a.copy() for a in results()]
        first = first or bits
        for a, b in zip(bits, first, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_set_offers_every_kernel_of_the_reference_with_the_same_arguments():
    for name, function in inspect.getmembers(reference, inspect.isfunction):
        if function.__module__ == reference.__name__:
            assert inspect.signature(getattr(cpu, name)) == inspect.signature(function), name


@pytest.mark.parametrize(("N", "H", "W", "C", "O", "k", "stride", "padding"), CONVOLUTIONS)
def test_convolution_equals_its_twin(rng, N, H, W, C, O, k, stride, padding):
    x, weight, bias = convolution_arguments(rng, N, H, W, C, O, k)
    dout = normal(rng, *reference.conv2d_forward(x, weight, bias, stride, padding).shape)
    arguments = x, weight, bias, stride, padding, dout
    before = [a.copy() for a in (x, weight, bias, dout)]
    bound = WINOGRAD if winograd.is_for(x.shape, weight.shape, stride, padding) else SAME_SUMS
    actual = all_convolution_results(cpu, *arguments)
    assert_close(actual, all_convolution_results(reference, *arguments), bound)
    for a, b in zip((x, weight, bias, dout), before, strict=True):
        np.testing.assert_array_equal(a, b)
    no_dx, dweight, _ = cpu.conv2d_backward(dout, x, weight, stride, padding, need_dx=False)
    assert no_dx is None
    np.testing.assert_array_equal(dweight, actual[2])
    assert cpu.conv2d_backward(dout, x, weight, stride, padding, need_dbias=False)[2] is None


def test_winograd_is_used_for_the_networks_convolutions_and_loses_less_than_two_digits(rng):
    x, weight, _ = convolution_arguments(rng, 4, 16, 16, 128, 128, 3)
    assert winograd.is_for(x.shape, weight.shape, 1, 1)
    exact = reference.conv2d_forward(x.astype(np.float64), weight.astype(np.float64), None, 1, 1)
    by_tiles, im2col = (relative_error(s.conv2d_forward(x, weight, None, 1, 1), exact) for s in (cpu, reference))
    assert im2col < by_tiles < 100 * im2col


def test_a_rectangular_window(rng):
    x, weight = normal(rng, 2, 6, 7, 3), normal(rng, 2, 4, 3, 5)
    for stride, padding in ((1, 0), (2, 1), (3, 3)):
        dout = normal(rng, *reference.conv2d_forward(x, weight, None, stride, padding).shape)
        arguments = x, weight, None, stride, padding, dout
        assert_close(all_convolution_results(cpu, *arguments), all_convolution_results(reference, *arguments), 1e-6)


def test_arrays_with_gaps_in_memory(rng):
    x, weight, dout = normal(rng, 2, 8, 16, 32)[:, :, ::2, ::2], normal(rng, 3, 3, 16, 16), normal(rng, 2, 8, 16, 16)
    arguments = x, weight, None, 1, 1, dout[:, :, ::2]
    assert_close(all_convolution_results(cpu, *arguments), all_convolution_results(reference, *arguments), WINOGRAD)
    arguments = x, weight[0, 0, 0], weight[0, 0, 1], x + 1, True, dout[:, :, ::2]
    assert_close(all_batch_norm_results(cpu, *arguments), all_batch_norm_results(reference, *arguments), SAME_SUMS)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_equals_its_twin(rng, shape, has_residual, relu):
    x, dout = normal(rng, *shape) * 2 + 1, normal(rng, *shape)
    weight, bias = normal(rng, 2, shape[-1])
    residual = normal(rng, *shape) if has_residual else None
    before = [a.copy() for a in (x, dout, weight, bias)]
    arguments = x, weight, bias, residual, relu, dout
    assert_close(all_batch_norm_results(cpu, *arguments), all_batch_norm_results(reference, *arguments), SAME_SUMS)
    for a, b in zip((x, dout, weight, bias), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("pieces")
def test_batch_norm_keeps_its_digits_where_the_mean_is_large(rng):
    scale, shift = np.array([1e-2, 1.0, 1e3], np.float32), np.array([5.0, -1.0, 1e5], np.float32)
    x = normal(rng, 16, 16, 16, 3) * scale + shift
    mean, var = cpu.batch_norm_statistics(x)
    np.testing.assert_allclose(mean, x.mean(axis=(0, 1, 2), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(var, x.var(axis=(0, 1, 2), dtype=np.float64), rtol=1e-5)


def test_batch_norm_subtracts_a_large_mean_first(rng):
    x, dout = normal(rng, 16, 8, 8, 3) * np.float32(0.01) + 100, normal(rng, 16, 8, 8, 3)
    weight, bias = normal(rng, 2, 3)
    mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    arguments = [a.astype(np.float64) for a in (x, weight, bias, mean, var)]
    exact = reference.batch_norm_forward(*arguments, 1e-5)
    assert relative_error(cpu.batch_norm_forward(x, weight, bias, mean, var, 1e-5), exact) < 1e-6
    results = []
    for s, (a, c, d) in ((reference, (arguments[0], arguments[3], arguments[4])), (cpu, (x, mean, var))):
        sums = s.batch_norm_backward_sums(dout, a, c, d, 1e-5)
        results.append(s.batch_norm_backward(dout, a, weight, c, d, 1e-5, *sums))
    assert relative_error(results[1], results[0]) < 1e-6


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("mean_in_deviations", [0, 1, 3.9, 4.1, 100])
def test_batch_norm_loses_no_digits_at_any_distance_from_0(rng, mean_in_deviations):
    """Up to four deviations the mean is not subtracted first, but taken into account afterwards."""
    x = normal(rng, 16, 16, 16, 3) + np.float32(mean_in_deviations)
    dout, weight, bias = normal(rng, *x.shape), *normal(rng, 2, 3)
    exact, *rest = all_batch_norm_results(
        reference, *(a.astype(np.float64) for a in (x, weight, bias)), None, False, dout
    )
    actual, *others = all_batch_norm_results(cpu, x, weight, bias, None, False, dout)
    for a, e in zip([actual, *others], [exact, *rest], strict=True):
        assert relative_error(a, e) < 3e-6


def test_a_mean_far_from_0_is_subtracted_first():
    var = np.array([1.0, 4.0], np.float32)
    assert not cpu.is_far(np.array([3.9, -7.9], np.float32), var)
    assert cpu.is_far(np.array([0.0, -8.1], np.float32), var)
    assert cpu.is_far(np.array([0.0, 1.0], np.float32), np.array([1.0, 0.0], np.float32))


def test_results_stay_as_they_are_through_later_calls(rng):
    def results(x, dout):
        return [*all_convolution_results(cpu, x, weight, None, 1, 1, dout), cpu.add(x, dout)]

    weight = normal(rng, 3, 3, 64, 64)
    kept = results(normal(rng, 8, 32, 32, 64), normal(rng, 8, 32, 32, 64))
    copies = [array.copy() for array in kept]
    results(normal(rng, 8, 32, 32, 64), normal(rng, 8, 32, 32, 64))
    for array, copied in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(array, copied)


def test_images_that_tiles_do_not_suit_go_another_way():
    assert not winograd.is_for((9, 1, 1, 64), (3, 3, 64, 64), 1, 1)
    assert not winograd.is_for((9, 2, 3, 64), (3, 3, 64, 64), 1, 1)
    assert winograd.is_for((9, 3, 3, 64), (3, 3, 64, 64), 1, 1)


def test_an_empty_batch_has_empty_results():
    layer = minires.Conv2d(16, 16, 3, padding=1)
    x = np.zeros((0, 8, 8, 16), np.float32)
    assert layer.backward(layer(x)).shape == x.shape


def test_a_constant_channel_has_variance_0():
    x = np.full((8, 8, 8, 2), 1234.567, np.float32)
    _, var = cpu.batch_norm_statistics(x)
    assert (var >= 0).all()
    assert (var < 1e-6).all()


def test_relu_after_batch_norm_lets_a_nan_through(rng):
    x = normal(rng, 2, 4, 4, 16)
    x[1, 2, 3, 4] = np.nan
    ones, zeros = np.ones(16, np.float32), np.zeros(16, np.float32)
    out = cpu.batch_norm_add_relu_forward(x, ones, zeros, *cpu.batch_norm_statistics(x), 1e-5, relu=True)
    assert np.isnan(out[..., 4]).all()


@pytest.mark.usefixtures("pieces")
def test_sums_of_many_rows_lose_no_digits(rng):
    x = rng.uniform(0, 1, (131072, 3)).astype(np.float32)
    np.testing.assert_allclose(cpu.sum_over_rows(x), x.astype(np.float64).sum(axis=0), rtol=1e-6)


def test_muon_equals_its_twin_bit_for_bit_with_any_number_of_threads(rng, thread_counts):
    shapes = [(3, 3, 8, 16), (1, 1, 16, 64), (3, 3, 64, 64)]
    banks = [[normal(rng, *shape) for shape in shapes] for _ in range(3)]
    expected = [[array.copy() for array in arrays] for arrays in banks]
    with threads.one_blas_thread():
        reference.muon_update(*expected, 0.05, 0.6, 0.5)

    def results():
        copies = [[array.copy() for array in arrays] for arrays in banks]
        cpu.muon_update(*copies, 0.05, 0.6, 0.5)
        return copies[0] + copies[2]

    assert_same_bits_with_any_number_of_threads(thread_counts, results)
    for actual, array in zip(results(), expected[0] + expected[2], strict=True):
        np.testing.assert_array_equal(actual, array)
        assert actual.dtype == np.float32


@pytest.mark.usefixtures("pieces")
def test_the_sum_of_two_gradients_equals_its_twin(rng):
    a, b = normal(rng, 2, 3, 8, 8, 700)
    np.testing.assert_array_equal(cpu.add(a, b), reference.add(a, b))
    np.testing.assert_array_equal(cpu.add(a[:, ::2], b[:, 1::2]), reference.add(a[:, ::2], b[:, 1::2]))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("shape", [(3, 32, 32, 64), (40, 1, 1, 5), (1, 3, 5, 7)])
def test_average_pool_equals_its_twin(rng, shape):
    dout = normal(rng, shape[0], shape[-1])
    actual, expected = (s.global_avg_pool2d_backward(dout, shape) for s in (cpu, reference))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert actual.dtype == np.float32


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("shape", [(70000,), (3, 3, 64, 64), (1,)])
def test_updates_equal_their_twins_bit_for_bit(rng, shape):
    param, grad, m, v = (normal(rng, *shape) for _ in range(4))
    for settings in ((0.1, 0.0, False, 0.0), (0.1, 0.9, True, 1e-4), (0.1, 0.9, True, 1e-4, 1 / 128)):
        results = []
        for s in (cpu, reference):
            arrays = param.copy(), grad, m.copy()
            s.sgd_update(*arrays, *settings)
            results.append(arrays)
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)
    for grad_scale in (1.0, 1 / 128):
        results = []
        for s in (cpu, reference):
            arrays = param.copy(), grad, m.copy(), abs(v)
            s.adam_update(*arrays, 3, 1e-3, (0.9, 0.999), 1e-8, 1e-2, grad_scale)
            results.append(arrays)
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("pieces")
def test_the_running_average_equals_its_twin_bit_for_bit(rng):
    average, param = normal(rng, 2, 70_000)
    results = []
    for s in (cpu, reference):
        results.append(average.copy())
        s.average_update(results[-1], param, 0.9)
    np.testing.assert_array_equal(*results)


@pytest.mark.usefixtures("pieces")
def test_the_sum_of_squares_equals_its_twin(rng):
    for size in (1, 5, 300_000):
        x = normal(rng, size)
        actual, expected = cpu.sum_of_squares(x), reference.sum_of_squares(x.astype(np.float64))
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        np.testing.assert_allclose(reference.sum_of_squares(x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("N", "H", "W", "C", "O", "k", "stride"),
    [(37, 16, 16, 16, 32, 3, 1), (33, 4, 6, 256, 192, 3, 1), (37, 9, 9, 8, 8, 3, 2)],
)
def test_convolutions_have_the_same_bits_with_any_number_of_threads(rng, thread_counts, N, H, W, C, O, k, stride):
    x, weight, bias = convolution_arguments(rng, N, H, W, C, O, k)
    dout = normal(rng, *cpu.conv2d_forward(x, weight, bias, stride, 1).shape)
    assert_same_bits_with_any_number_of_threads(
        thread_counts, lambda: all_convolution_results(cpu, x, weight, bias, stride, 1, dout)
    )


@pytest.mark.usefixtures("pieces")
def test_batch_norm_has_the_same_bits_with_any_number_of_threads(rng, thread_counts):
    x, dout, residual = normal(rng, 3, 23, 16, 16, 48)
    weight, bias = normal(rng, 2, 48)
    assert_same_bits_with_any_number_of_threads(
        thread_counts, lambda: all_batch_norm_results(cpu, x, weight, bias, residual, True, dout)
    )


@pytest.mark.usefixtures("pieces")
def test_two_training_steps_have_the_same_bits_with_any_number_of_threads(rng, thread_counts):
    x, labels = normal(rng, 18, 16, 16, 3), rng.integers(0, 10, 18)

    def train():
        model = minires.ResNet(blocks=(1, 1), channels=(16, 32), seed=1)
        loss, optimizer = minires.SoftmaxCrossEntropy(), minires.Adam(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            loss.forward(model(x), labels)
            model.backward(loss.backward(), need_dx=False)
            optimizer.step()
        return list(model.state_dict().values())

    assert_same_bits_with_any_number_of_threads(thread_counts, train)


def test_memory_is_given_out_again_only_after_the_last_view_is_gone():
    a = memory.fresh((1 << 20,))
    a[:] = 1
    view = a[4:].reshape(-1, 3)[:, 1]
    address = a.ctypes.data
    del a
    b = memory.fresh((1 << 20,))
    assert b.ctypes.data != address
    b[:] = 2
    assert (view == 1).all()
    del view
    assert memory.fresh((1 << 20,)).ctypes.data == address


def test_memory_that_waits_makes_room_for_another_size():
    a = memory.fresh((1 << 20,))
    del a
    waiting = sum(block.nbytes for block in memory._idle)
    b = memory.fresh(((1 << 20) + 7,))
    assert sum(block.nbytes for block in memory._idle) <= max(0, waiting - b.nbytes)


def test_zeros_around_images_are_there_whatever_was_in_the_memory_before(rng):
    x = rng.standard_normal((2, 4, 4, 3)).astype(np.float32)
    for padding, size in ((1, 6), (2, 8), (0, 6), (1, 6), (1, 6), (0, 4), (1, 6)):  # one size, at two places
        images = memory.workspace(memory.frame, x.shape, padding, size, size)
        images.fill(x)
        after = size - padding - 4
        wanted = np.pad(x, ((0, 0), (padding, after), (padding, after), (0, 0)))
        np.testing.assert_array_equal(images.padded, wanted)


def test_views_are_made_once_in_each_thread_and_let_go_with_their_memory():
    made = []

    def make(count):
        made.append(count)
        return memory.scratch("of this test", (count,))

    small = memory.workspace(make, 10)
    assert memory.workspace(make, 10) is small
    assert made == [10]
    memory.workspace(make, 20)  # asks for more memory
    assert memory.workspace(make, 10).base is not small.base
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(memory.workspace, make, 10).result().base is not memory.workspace(make, 10).base
    for count in range(1, memory.MOST_VIEWS + 50):
        memory.workspace(make, count)
    assert len(memory._mine.views) <= memory.MOST_VIEWS


def test_scratch_memory_is_as_large_as_asked_for_and_apart_with_large_pages_and_without(monkeypatch):
    for large in (True, False):
        if not large:
            monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE", raising=False)
        arrays = [memory.scratch(f"{large} {i}", (count,)) for i, count in enumerate((1, 1000, 3 << 19, (1 << 19) + 1))]
        for i, array in enumerate(arrays):
            array[:] = i
        for i, array in enumerate(arrays):
            assert array.dtype == np.float32
            assert (array == i).all()
            assert not any(np.shares_memory(array, other) for other in arrays if other is not array)


@pytest.mark.skipif(not hasattr(memory.mmap, "MADV_HUGEPAGE"), reason="no large pages here")
def test_scratch_memory_begins_at_another_line_of_its_page_for_each_name_also_when_it_has_grown():
    names = [f"line {i}" for i in range(4)]
    for count in (10, 1000):
        starts = [memory.scratch(name, (count,)).ctypes.data % memory.LARGE_PAGE for name in names]
        assert all(start % memory.LINE == 0 for start in starts)
        assert len(set(starts)) == len(names)


def test_scratch_memory_beyond_what_there_is_raises_a_memory_error():
    kept = memory.scratch("small, of this test", (10,))
    kept[:] = 1
    with pytest.raises(MemoryError):
        memory.scratch("large, of this test", (2**60,))
    assert (memory.scratch("small, of this test", (10,)) == kept).all()


def test_what_the_caller_wants_told_of_overflow_holds_in_every_thread():
    threads.set_num_threads(3)
    together = threading.Barrier(3, timeout=60)  # a task for each thread
    for wanted in ("ignore", "raise"):
        with np.errstate(over=wanted):
            assert threads.run(lambda _: (together.wait(), np.geterr()["over"])[1], range(3)) == [wanted] * 3
    threads.set_num_threads(None)


def test_the_number_of_threads_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MINIRES_NUM_THREADS", "5")
    threads.set_num_threads(None)
    assert threads.num_threads() == 5
    threads.set_num_threads(2)
    assert threads.num_threads() == 2
    monkeypatch.delenv("MINIRES_NUM_THREADS")
    threads.set_num_threads(None)
    assert threads.num_threads() == threads.usable_cores()


@pytest.mark.parametrize("value", ["x", "0", "-1", "1.5", ""])
def test_a_number_of_threads_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("MINIRES_NUM_THREADS", value)
    threads.set_num_threads(None)
    with pytest.raises(ValueError, match=f"MINIRES_NUM_THREADS must be an integer of at least 1, got '{value}'"):
        threads.num_threads()
    for number in (0, 2.5, np.float32(2.5)):
        with pytest.raises(ValueError, match=f"must be an integer of at least 1, got {re.escape(repr(number))}"):
            threads.set_num_threads(number)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({}, 64),
    ],
)
def test_a_containers_limit_is_respected(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for name, text in files.items():
        path = pathlib.Path(tmp_path, name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert threads.usable_cores(tmp_path) == cores


def test_what_a_task_raises_reaches_the_caller_and_the_threads_go_on(thread_counts):
    def fail(task):
        if task == 3:
            raise RuntimeError("task 3")

    for _ in thread_counts:
        with pytest.raises(RuntimeError, match="task 3"):
            threads.run(fail, range(10))
        assert threads.run(lambda task: task * 2, range(5)) == [0, 2, 4, 6, 8]


def test_blas_gets_its_threads_back():
    tell, put = threads._blas_threads()
    before = tell()
    put(2)
    try:
        expected = tell()  # another BLAS than OpenBLAS always tells 1
        with threads.one_blas_thread(), threads.one_blas_thread():
            assert tell() == 1
        assert tell() == expected
        with pytest.raises(ZeroDivisionError):
            threads.run(lambda task: 1 // task, range(4))
        assert tell() == expected
    finally:
        put(before)


def test_after_an_exception_no_task_goes_on():
    threads.set_num_threads(2)
    done, caller = [], threading.current_thread()

    def work(task):
        if threading.current_thread() is caller:
            time.sleep(0.05)
            raise KeyboardInterrupt
        time.sleep(0.1)
        done.append(task)

    try:
        with pytest.raises(KeyboardInterrupt):
            threads.run(work, range(100))
        finished = len(done)
        time.sleep(0.3)
        assert len(done) == finished <= 2
    finally:
        threads.set_num_threads(None)


def test_several_threads_of_the_caller_get_the_same_bits(rng):
    x, weight, dout = normal(rng, 8, 16, 16, 32), normal(rng, 3, 3, 32, 32), normal(rng, 8, 16, 16, 32)
    expected = all_convolution_results(cpu, x, weight, None, 1, 1, dout)
    with concurrent.futures.ThreadPoolExecutor(4) as callers:
        calls = [callers.submit(all_convolution_results, cpu, x, weight, None, 1, 1, dout) for _ in range(12)]
    for call in calls:
        for a, b in zip(call.result(), expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_can_compute():
    code = (
        "import os, numpy as np; from minires.kernels import memory, threads; threads.set_num_threads(2); "
        "threads.run(abs, range(4)); memory._taking.acquire(); pid = os.fork(); "  # as if another thread held it
        "assert pid or len(memory.fresh((2**20,))) == 2**20; assert threads.run(abs, range(4)) == [0, 1, 2, 3]; "
        "os._exit(0) if pid == 0 else os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("shape", [(1, 301, 303, 3), (7, 101, 103, 2), (70_001, 1)])
def test_rows_that_cannot_be_folded_are_added_up_without_losing_digits(shape):
    """A float32 sum over a hundred thousand rows has lost three digits, and left a constant a variance below 0."""
    x = np.full(shape, 0.1, np.float32)
    M = x.size // shape[-1]
    np.testing.assert_allclose(cpu.sum_over_rows(x), [M * np.float64(np.float32(0.1))] * shape[-1], rtol=2e-6)
    mean, var = cpu.batch_norm_statistics(x)
    np.testing.assert_array_equal(mean, np.float32([0.1] * shape[-1]))
    np.testing.assert_array_equal(var, [0] * shape[-1])


def test_a_variance_over_rows_that_cannot_be_folded(rng):
    x = (5 + 3 * rng.standard_normal((1, 301, 303, 3))).astype(np.float32)
    mean, var = cpu.batch_norm_statistics(x)
    rows = x.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=3e-7)
    np.testing.assert_allclose(var, rows.var(axis=0), rtol=3e-7)
