"""Winograd's matrices and the worked numbers of its derivation. test_cpu_kernels.py holds it to the reference."""

import doctest

import numpy as np

from minires.kernels import winograd

POINTS = (0, 1, -1, 2, -2)


def test_the_worked_numbers_of_the_docstring():
    failed, tried = doctest.testmod(winograd)
    assert failed == 0
    assert tried >= 8


def test_winograds_matrices_make_a_filter_of_three_taps(rng):
    """Four outputs of a one-dimensional filter, from six inputs and six multiplications."""
    inputs, taps = rng.standard_normal(6), rng.standard_normal(3)
    outputs = winograd.OUTPUT @ ((winograd.WEIGHT @ taps) * (winograd.INPUT @ inputs))
    np.testing.assert_allclose(outputs, np.correlate(inputs, taps), atol=1e-5)


def test_the_matrices_are_what_the_derivation_says():
    for row, a in enumerate(POINTS):
        others = [b for b in POINTS if b != a]
        at_itself = np.prod([a - b for b in others])
        np.testing.assert_array_equal(winograd.INPUT[row], np.append(np.poly(others)[::-1], 0))
        np.testing.assert_allclose(winograd.WEIGHT[row] * at_itself, [1, a, a**2], rtol=1e-6)
        np.testing.assert_array_equal(winograd.OUTPUT[:, row], [1, a, a**2, a**3])
    np.testing.assert_allclose(winograd.INPUT[5], np.poly(POINTS)[::-1], atol=1e-12)
    np.testing.assert_array_equal(winograd.WEIGHT[5], [0, 0, 1])
    np.testing.assert_array_equal(winograd.OUTPUT[:, 5], [0, 0, 0, 1])


def test_weight_gradient_and_input_gradient_are_adjoint_to_the_convolution(rng):
    x, dout = rng.standard_normal((2, 2, 9, 10, 16)).astype(np.float32)
    weight = rng.standard_normal((3, 3, 16, 16)).astype(np.float32)
    product = np.sum(dout * winograd.conv2d(x, weight), dtype=np.float64)
    np.testing.assert_allclose(np.sum(x * winograd.input_gradient(dout, weight), dtype=np.float64), product, rtol=1e-3)
    np.testing.assert_allclose(np.sum(weight * winograd.weight_gradient(dout, x), dtype=np.float64), product, rtol=1e-3)
