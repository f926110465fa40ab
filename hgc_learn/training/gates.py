"""A schedule as the router has it: which gates compute, and how far the others are extrapolated, as tensors."""

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
class Gates:
    """Gates [steps, sites]; its tensors are on the CPU.

    Attributes:
        compute: bool [steps, sites]; True at the first step.
        reach: of the fitted predictor, with scale 1, float32 [steps, sites]; matters where nothing is computed. 0 is
            `hold`, 1 `linear`.
    """

    compute: Tensor
    reach: Tensor

    @classmethod
    def full(cls, num_steps: int, num_sites: int) -> Gates:
        """Computes everything."""
        return cls(torch.ones(num_steps, num_sites, dtype=torch.bool), torch.zeros(num_steps, num_sites))

    def draft(self, sites: Sequence[str]) -> Draft:
        """As policies write it. Sites that are always computed are left out; where a reach is that of `hold` or
        `linear`, its code stands."""
        rows: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}
        for column, site in enumerate(sites):
            reach = self.reach[:, column].clone()
            row = "".join(map(_code, self.compute[:, column].tolist(), reach.tolist()))
            if set(row) != {COMPUTE}:
                rows[site] = row
            if FITTED.code in row:
                tensors |= {f"{site}/scale": torch.ones_like(reach), f"{site}/reach": reach}
        return Draft(rows, tensors)


def _code(computes: bool, reach: float) -> str:
    return COMPUTE if computes else {0.0: HOLD.code, 1.0: LINEAR.code}.get(reach, FITTED.code)
