"""Forecast, then calibrate: BDF2 gives a forecast, the trapezoid over its slope corrects it.

A reconstruction of FoCa (arXiv 2508.16211). Off a straight line by half as much as BDF2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hgc_learn.predictors import bdf2
from hgc_learn.predictors.base import Fill, Predictor


def fill(ages: Sequence[int], step: int, parameters: Mapping[str, Tensor]) -> Fill:
    """F0 + k/2 (d0 + d*), with the slope d* = (P - F0) / k of the BDF2 forecast P (Heun's corrector).

    Reconstructed from the description of the method; no code of it is public.
    """
    if len(ages) < 2:
        return Fill((1.0,))
    a = ages[0] / (ages[1] - ages[0])
    p0, p1 = bdf2.fill(ages, step, parameters).coefficients
    return Fill(((1 + a + p0) / 2, (p1 - a) / 2))


FOCA = Predictor("foca", "F", 2, fill)
