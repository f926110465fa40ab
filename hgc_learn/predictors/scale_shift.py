"""The last computed value, scaled and shifted per channel (Block Caching, arXiv 2312.03209)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hgc_learn.predictors.base import Fill, Parameter, Predictor


def fill(ages: Sequence[int], step: int, parameters: Mapping[str, Tensor]) -> Fill:
    """F0 * scale[step] + shift[step]; both are float32 [steps, channels]."""
    return Fill((parameters["scale"][step],), parameters["shift"][step])


SCALE_SHIFT = Predictor(
    "scale_shift",
    "s",
    1,
    fill,
    parameters=tuple(Parameter(name, torch.float32, ("steps", "channels")) for name in ("scale", "shift")),
)
