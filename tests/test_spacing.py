from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hgc_learn.spacing import first_fulls, full_steps, intervals


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
    assert {len(full_steps(50, interval)) for interval in grid} == set(range(3, 50))
    assert grid == sorted(set(grid))


@given(num_steps=st.integers(1, 200), first_full=st.integers(1, 200), interval=st.floats(1, 250) | st.just(1e12))
def test_steps_at_the_start_are_full_and_the_interval_counts_from_the_last_of_them(
    num_steps: int, first_full: int, interval: float
) -> None:
    if first_full > num_steps:
        with pytest.raises(ValueError, match=f"first_full is {first_full}; it must be 1 to {num_steps}"):
            full_steps(num_steps, interval, first_full)
        return
    full = full_steps(num_steps, interval, first_full)
    assert full[:first_full] == list(range(first_full))
    last = first_full - 1
    assert full[last:] == [last + step for step in full_steps(num_steps - last, interval)]
    assert full == sorted(set(full))


@pytest.mark.parametrize("interval", range(1, 8))
@pytest.mark.parametrize("first_full", [1, 2, 3, 5])
def test_a_warm_up_is_that_of_the_authors_code(first_full: int, interval: int) -> None:
    """TaylorSeer's: full in the first steps and whenever the interval is over since the last full step."""
    full, counter = [], 0
    for step in range(20):
        if step < first_full or counter == interval - 1:
            full.append(step)
            counter = 0
        else:
            counter += 1
    assert full_steps(20, interval, first_full) == full


def test_a_warm_up_in_a_grid_is_at_most_a_quarter_of_the_run() -> None:
    assert [first_fulls(num_steps) for num_steps in (1, 8, 20, 50)] == [[1], [1, 2], [1, 2, 3, 5], [1, 2, 3, 5, 8, 12]]
