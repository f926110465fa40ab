"""Which steps rules compute in full: every so many, as evenly as whole steps allow."""

from __future__ import annotations

import math

_ROUNDING = 1e-9  # 12 times 50 / 12 is a little less than 50


def full_steps(num_steps: int, interval: float) -> list[int]:
    """Steps 0, `interval`, 2 `interval`, ... of a run, rounded down: with 2.5, 0, 2, 5, 7, ...

    Raises:
        ValueError: an interval below 1.
    """
    if not interval >= 1:
        raise ValueError(f"interval is {interval}; it must be at least 1.")
    num_full = math.ceil(num_steps / interval - _ROUNDING)
    return [math.floor(i * interval + _ROUNDING) for i in range(num_full)]


def intervals(num_steps: int, longest: int) -> list[float]:
    """For grids: whole ones, and those that spread any number of full steps over the run; from 2 to `longest`."""
    spread = (num_steps / number for number in range(1, num_steps // 2 + 1))
    return sorted({*range(2, longest + 1), *(interval for interval in spread if interval <= longest)})
