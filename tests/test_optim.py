"""The optimizers against scalars computed by hand, and the schedules at their ends."""

import math

import numpy as np
import pytest

from minires import SGD, Adam, Parameter, constant, cosine, one_cycle


def parameter(value, dtype=np.float64):
    return Parameter(np.array([value], dtype))


def test_sgd_goes_down_the_gradient():
    p = parameter(1.0)
    p.grad[:] = 4.0
    SGD([p], lr=0.1).step()
    np.testing.assert_allclose(p.data, 0.6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_three_steps_by_hand(nesterov):
    p = parameter(1.0)
    optimizer = SGD([p], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    w, velocity = 1.0, 0.0
    for grad in (2.0, -1.0, 0.5):
        p.grad[:] = grad
        optimizer.step()
        g = grad + 0.01 * w
        velocity = 0.9 * velocity + g
        w -= 0.1 * (g + 0.9 * velocity if nesterov else velocity)
        np.testing.assert_allclose(p.data, w)


def test_adam_moves_by_lr_each_step_on_a_constant_gradient():
    for grad in (1e-3, 1.0, 1e3):
        p = parameter(0.0)
        optimizer = Adam([p], lr=0.01, eps=0.0)
        for step in range(1, 6):
            p.grad[:] = grad
            optimizer.step()
            np.testing.assert_allclose(p.data, -0.01 * step)


def test_adam_three_steps_by_hand():
    p = parameter(1.0)
    optimizer = Adam([p], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.01)
    w, m, v = 1.0, 0.0, 0.0
    for t, grad in enumerate((2.0, -1.0, 0.5), start=1):
        p.grad[:] = grad
        optimizer.step()
        g = grad + 0.01 * w
        m = 0.8 * m + 0.2 * g
        v = 0.95 * v + 0.05 * g * g
        w -= 0.1 * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-3)
        np.testing.assert_allclose(p.data, w)


@pytest.mark.parametrize("make", [lambda p: SGD([p], 0.1, 0.9, True, 0.01), lambda p: Adam([p], weight_decay=0.01)])
def test_float32_stays_float32_and_the_gradient_is_left_alone(make):
    p = parameter(1.0, np.float32)
    array = p.data
    p.grad[:] = 3.0
    optimizer = make(p)
    optimizer.step()
    optimizer.step()
    assert p.data is array
    assert p.data.dtype == np.float32
    assert p.grad[0] == 3.0
    state = optimizer.velocity if isinstance(optimizer, SGD) else optimizer.m + optimizer.v
    assert all(array.dtype == np.float32 for array in state)


def test_zero_grad_clears_in_place():
    p = parameter(1.0)
    p.grad[:] = 3.0
    grad = p.grad
    SGD([p], lr=0.1).zero_grad()
    assert p.grad is grad
    assert grad[0] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGD([p], lr=-1), r"SGD: lr must be at least 0 and below inf, got -1"),
        (lambda p: SGD([p], lr=1, momentum=1), r"SGD: momentum must be at least 0 and below 1, got 1"),
        (lambda p: SGD([p], lr=1, nesterov=True), "nesterov needs a momentum above 0"),
        (lambda p: Adam([p], betas=(0.9, 1.0)), r"Adam: betas\[1\] must be at least 0 and below 1, got 1.0"),
        (lambda p: Adam([p], lr=float("nan")), "Adam: lr must be .* got nan"),
        (lambda p: Adam([]), "Adam: params is empty"),
    ],
)
def test_values_outside_their_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(parameter(1.0))


def test_arrays_and_names_are_no_parameters():
    with pytest.raises(TypeError, match=r"Adam: params must be Parameters, as in model\.parameters\(\), got ndarray"):
        Adam([np.zeros(3)])


def test_schedules_begin_and_end_where_they_should():
    assert [constant(step, 10, 0.1) for step in (0, 5, 9)] == [0.1] * 3
    assert cosine(0, 10, 0.1) == 0.1
    np.testing.assert_allclose([cosine(5, 10, 0.1, 0.02), cosine(10, 10, 0.1, 0.02)], [0.06, 0.02])
    rates = [one_cycle(step, 100, 0.1) for step in range(100)]
    np.testing.assert_allclose([rates[0], max(rates), rates[-1]], [0.1 / 25, 0.1, 0.1 / 250_000])
    assert rates.index(max(rates)) == 29
    assert rates == sorted(rates[:30]) + sorted(rates[30:], reverse=True)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("warmup", [0, 0.3, 0.5])
def test_schedules_serve_the_shortest_runs(total_steps, warmup):
    for step in range(total_steps):
        assert 0 <= cosine(step, total_steps, 0.1) <= 0.1
        assert 0 < one_cycle(step, total_steps, 0.1, warmup) <= 0.1 + 1e-12
