"""Backward differentiation of second order, with the last slope for the new one (of HyCa, arXiv 2510.04188).

The coefficients are those of evenly spaced steps. Where the new value is further from the latest than that from the one
before it, as after a gap that has just begun, or nearer, a straight line is missed; with coefficients of the real
spacing nothing but `linear` would be left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hgc_learn.predictors.base import Fill, Predictor


def fill(ages: Sequence[int], step: int, parameters: Mapping[str, Tensor]) -> Fill:
    """4/3 F0 - 1/3 F1 + 2/3 k d0: on a straight line right where k is the number of steps from F1 to F0."""
    if len(ages) < 2:
        return Fill((1.0,))
    a = ages[0] / (ages[1] - ages[0])
    return Fill((4 / 3 + 2 / 3 * a, -1 / 3 - 2 / 3 * a))


BDF2 = Predictor("bdf2", "B", 2, fill)
