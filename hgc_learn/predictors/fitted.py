"""A line through the last two computed values whose height and slope are learned for every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hgc_learn.predictors.base import Fill, Parameter, Predictor


def fill(ages: Sequence[int], step: int, parameters: Mapping[str, Tensor]) -> Fill:
    """scale[step] F0 + reach[step] k d0, with k steps since F0 and d0 = (F0 - F1) / spacing; both float32 [steps].

    Scale 1 with reach 0 is `hold`, with reach 1 `linear`.
    """
    return line(ages, float(parameters["scale"][step]), float(parameters["reach"][step]))


def line(ages: Sequence[int], scale: Any, reach: Any) -> Fill:
    """scale F0 + reach k d0; numbers, or per channel [channels]."""
    if len(ages) < 2:
        return Fill((scale,))
    a = reach * ages[0] / (ages[1] - ages[0])
    return Fill((scale + a, -a))


FITTED = Predictor(
    "fitted",
    "f",
    2,
    fill,
    parameters=tuple(Parameter(name, torch.float32, ("steps",)) for name in ("scale", "reach")),
)
