"""A predictor of its own for every channel, as HyCa chooses one for every cluster of channels (arXiv 2510.04188)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hgc_learn.predictors.ab2 import AB2
from hgc_learn.predictors.base import Fill, Parameter, Predictor
from hgc_learn.predictors.bdf2 import BDF2
from hgc_learn.predictors.foca import FOCA
from hgc_learn.predictors.hold import HOLD
from hgc_learn.predictors.linear import LINEAR
from hgc_learn.predictors.taylor import TAYLOR2

CHOICES = (HOLD, LINEAR, TAYLOR2, AB2, BDF2, FOCA)
"""What the tensor `<site>/predictor` (uint8 [channels]) indexes. Part of the file format: append only."""


def fill(ages: Sequence[int], step: int, parameters: Mapping[str, Tensor]) -> Fill:
    """Row j of a table [len(ages), choices] of coefficients, gathered by channel."""
    table = torch.zeros(len(ages), len(CHOICES))
    for column, predictor in enumerate(CHOICES):
        coefficients = predictor.fill(ages[: predictor.num_values], step, parameters).coefficients
        for j, c in enumerate(coefficients):
            table[j, column] = c
    return Fill(tuple(table[:, parameters["predictor"].cpu().long()].unbind(0)))


PER_CHANNEL = Predictor(
    "per_channel",
    "p",
    max(choice.num_values for choice in CHOICES),
    fill,
    parameters=(Parameter("predictor", torch.uint8, ("channels",), len(CHOICES)),),
)
