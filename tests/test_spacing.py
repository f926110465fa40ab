from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hgc_learn.spacing import full_steps, intervals


@given(num_steps=st.integers(1, 1000), interval=st.integers(1, 1200))
def test_whole_intervals_are_every_so_many_steps(num_steps: int, interval: int) -> None:
    assert full_steps(num_steps, interval) == list(range(0, num_steps, interval))


@given(num_full=st.integers(1, 1000), more=st.integers(0, 1000))
def test_any_number_of_full_steps_can_be_spread_over_a_run(num_full: int, more: int) -> None:
    num_steps = num_full + more
    expected = [i * num_steps // num_full for i in range(num_full)]
    assert full_steps(num_steps, num_steps / num_full) == expected


def test_a_grid_holds_whole_intervals_and_every_number_of_full_steps() -> None:
    grid = intervals(50, 20)
    assert {*range(2, 21), 50 / 12, 50 / 18} <= set(grid)
    assert {len(full_steps(50, interval)) for interval in grid} == set(range(3, 26))
    assert grid == sorted(set(grid))


@pytest.mark.parametrize("interval", [0, 0.9, -3, float("nan")])
def test_intervals_below_one_are_refused(interval: float) -> None:
    with pytest.raises(ValueError, match="it must be at least 1"):
        full_steps(10, interval)
