"""A hard schedule as tensors: which gates compute, and with which weights the others are filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hgc_learn.plan import COMPUTE
from hgc_learn.predictors.fitted import FITTED
from hgc_learn.predictors.hold import HOLD
from hgc_learn.predictors.linear import LINEAR
from hgc_learn.setting import Draft


@dataclass(frozen=True)
class HardSchedule:
    """Gates [steps, sites]; its tensors are on the CPU.

    Attributes:
        compute: bool [steps, sites]; True at the first step.
        weights: scale and reach of the fitted predictor, float32 [2, steps, sites]; matter where nothing is computed.
    """

    compute: Tensor
    weights: Tensor

    @classmethod
    def full(cls, num_steps: int, num_sites: int) -> HardSchedule:
        """Computes everything."""
        return cls(torch.ones(num_steps, num_sites, dtype=torch.bool), hold_weights(num_steps, num_sites))

    def draft(self, sites: Sequence[str]) -> Draft:
        """As policies write it. Sites that are always computed are left out; where the weights are those of `hold` or
        `linear`, its code stands."""
        rows: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}
        for column, site in enumerate(sites):
            weights = self.weights[:, :, column]
            row = "".join(map(_code, self.compute[:, column].tolist(), *weights.tolist()))
            if set(row) != {COMPUTE}:
                rows[site] = row
            if FITTED.code in row:
                for parameter, values in zip(FITTED.parameters, weights, strict=True):
                    tensors[f"{site}/{parameter.name}"] = values.clone()
        return Draft(rows, tensors)


def hold_weights(num_steps: int, num_sites: int) -> Tensor:
    """Weights with which the last value is held."""
    weights = torch.zeros(2, num_steps, num_sites)
    weights[0] = 1.0
    return weights


def _code(computes: bool, scale: float, reach: float) -> str:
    if computes:
        return COMPUTE
    return {(1.0, 0.0): HOLD.code, (1.0, 1.0): LINEAR.code}.get((scale, reach), FITTED.code)
