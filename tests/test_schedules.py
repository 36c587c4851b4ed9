"""The schedules by hand, at their ends, and in the shortest runs."""

import numpy as np
import pytest

from minires import constant, cosine, one_cycle, triangular


def test_a_triangle_by_hand():
    rates = [triangular(step, 10, 8.0, warmup=0.3) for step in range(10)]
    np.testing.assert_allclose(rates, [2, 4, 6, 8, 8 * 6 / 7, 8 * 5 / 7, 8 * 4 / 7, 8 * 3 / 7, 8 * 2 / 7, 8 / 7])


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
        assert 0 < triangular(step, total_steps, 0.1, warmup) <= 0.1


EVERY = [constant, cosine, one_cycle, triangular]


@pytest.mark.parametrize("total_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("schedule", EVERY)
def test_beyond_the_end_the_last_rate_holds(schedule, total_steps):
    end = total_steps if schedule is cosine else total_steps - 1
    last = schedule(end, total_steps, 0.1)
    assert 0 <= last <= schedule(total_steps - 1, total_steps, 0.1)
    assert [schedule(end + beyond, total_steps, 0.1) for beyond in (1, 2, total_steps, 10**6)] == [last] * 4


@pytest.mark.parametrize("total_steps", [0, -3, float("nan")])
@pytest.mark.parametrize("schedule", EVERY[1:])
def test_a_run_of_no_steps_is_refused(schedule, total_steps):
    with pytest.raises(ValueError, match=f"^{schedule.__name__}: total_steps must be at least 1, got {total_steps}$"):
        schedule(0, total_steps, 0.1)


@pytest.mark.parametrize("warmup", [-0.1, 1, float("nan")])
@pytest.mark.parametrize("schedule", [one_cycle, triangular])
def test_a_warmup_that_leaves_nothing_for_the_way_down_is_refused(schedule, warmup):
    with pytest.raises(ValueError, match=f"^{schedule.__name__}: warmup must be at least 0 and below 1, got {warmup}$"):
        schedule(0, 10, 0.1, warmup)
