"""What grids of rules are made of: full steps, as evenly spaced as whole steps allow, and thresholds."""

from __future__ import annotations

import math

_ROUNDING = 1e-9  # 12 times 50 / 12 is a little less than 50


def full_steps(num_steps: int, interval: float, first_full: int = 1) -> list[int]:
    """Steps 0, `interval`, 2 `interval`, ... of a run, rounded down: with 2.5, 0, 2, 5, 7, ...

    Args:
        num_steps: of the run.
        interval: steps per full step.
        first_full: this many steps at the start are full, and the interval counts from the last of them: with 3 and an
            interval of 2.5, 0, 1, 2, 4, 7, ... TaylorSeer's warm-up (its code's `first_enhance`, arXiv 2503.06923).

    Raises:
        ValueError: an interval below 1 or infinite; no full step at the start, or more than there are steps.
    """
    if not 1 <= interval < math.inf:
        raise ValueError(f"interval is {interval}; it must be at least 1, and finite.")
    if not 1 <= first_full <= max(1, num_steps):  # of no steps none is full
        raise ValueError(f"first_full is {first_full}; it must be 1 to {num_steps}, the steps of the run.")
    last = first_full - 1  # of those at the start
    num_full = max(min(1, num_steps), math.ceil((num_steps - last) / interval - _ROUNDING))
    return [*range(last), *(last + math.floor(i * interval + _ROUNDING) for i in range(num_full))]


def intervals(num_steps: int, longest: int) -> list[float]:
    """For grids: whole ones from 2 on, and those that spread any number of full steps over the run; up to `longest`."""
    spread = (num_steps / number for number in range(1, num_steps))
    return sorted({*range(2, longest + 1), *(interval for interval in spread if interval <= longest)})


def first_fulls(num_steps: int) -> list[int]:
    """For grids: how many steps at the start are full; at most a quarter of the run."""
    return [1, *(number for number in (2, 3, 5, 8, 12) if number <= num_steps / 4)]


def geometric(first: float, last: float, num: int) -> tuple[float, ...]:
    """Thresholds for a grid, evenly spaced on a log scale, rounded to three digits."""
    return tuple(float(f"{first * (last / first) ** (i / (num - 1)):.3g}") for i in range(num))
