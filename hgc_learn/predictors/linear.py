"""A straight line through the last two computed values (of HyCa, arXiv 2510.04188)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hgc_learn.predictors.base import Fill, Predictor


def fill(ages: Sequence[int], step: int, parameters: Mapping[str, Tensor]) -> Fill:
    """F0 + k d0, with k steps since F0 and d0 = (F0 - F1) / spacing."""
    if len(ages) < 2:
        return Fill((1.0,))
    a = ages[0] / (ages[1] - ages[0])
    return Fill((1 + a, -a))


LINEAR = Predictor("linear", "1", 2, fill)
