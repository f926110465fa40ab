"""Second-order Taylor expansion with backward differences (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hgc_learn.predictors import linear
from hgc_learn.predictors.base import Fill, Predictor, slope


def fill(ages: Sequence[int], step: int, parameters: Mapping[str, Tensor]) -> Fill:
    """F0 + k d0 + k^2/2 (d0 - d1) / spacing; with an even spacing N and a = k/N the weights are
    1 + a + a^2/2, -(a + a^2), a^2/2."""
    if len(ages) < 3:
        return linear.fill(ages, step, parameters)
    k, spacing = ages[0], ages[1] - ages[0]
    d0, d1 = slope(ages, 0), slope(ages, 1)
    f0 = (1.0, 0.0, 0.0)
    curvature = [(x - y) / spacing for x, y in zip(d0, d1, strict=True)]
    return Fill(tuple(f + k * d + k * k / 2 * c for f, d, c in zip(f0, d0, curvature, strict=True)))


TAYLOR2 = Predictor("taylor2", "2", 3, fill)
