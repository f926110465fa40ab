"""A line through the last two computed values whose height and slope are learned per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hgc_learn.predictors.base import Fill, Parameter, Predictor
from hgc_learn.predictors.fitted import line


def fill(ages: Sequence[int], index: int, parameters: Mapping[str, Tensor]) -> Fill:
    """scale[index] F0 + reach[index] k d0, as `fitted`; both are float32 [fills, channels], where only the steps that
    are filled in this way count."""
    return line(ages, parameters["scale"][index], parameters["reach"][index])


FITTED_PER_CHANNEL = Predictor(
    "fitted_per_channel",
    "t",
    2,
    fill,
    parameters=tuple(Parameter(name, torch.float32, ("fills", "channels")) for name in ("scale", "reach")),
)
