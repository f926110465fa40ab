"""Adams-Bashforth of second order (of HyCa, arXiv 2510.04188)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hgc_learn.predictors import linear
from hgc_learn.predictors.base import Fill, Predictor, slope


def fill(ages: Sequence[int], step: int, parameters: Mapping[str, Tensor]) -> Fill:
    """F0 + k (3/2 d0 - 1/2 d1)."""
    if len(ages) < 3:
        return linear.fill(ages, step, parameters)
    k, f0 = ages[0], (1.0, 0.0, 0.0)
    d0, d1 = slope(ages, 0), slope(ages, 1)
    return Fill(tuple(f + k * (1.5 * x - 0.5 * y) for f, x, y in zip(f0, d0, d1, strict=True)))


AB2 = Predictor("ab2", "A", 3, fill)
