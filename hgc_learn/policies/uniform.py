"""Whole steps at regular intervals."""

from __future__ import annotations

from hgc_learn.policies.registry import register
from hgc_learn.predictors import PREDICTORS
from hgc_learn.setting import Draft, Setting


@register(
    "uniform",
    paper="FORA, Selvaraju et al. 2024, arXiv 2407.01425",
    grid={"interval": range(2, 21), "predictor": ("hold", "linear", "taylor2", "ab2", "bdf2", "foca")},
)
def uniform(setting: Setting, *, interval: int = 2, predictor: str = "hold") -> Draft:
    """Computes every `interval`-th step; between them the prediction is held or forecast."""
    if interval < 1:
        raise ValueError(f"interval is {interval}; it must be at least 1.")
    code = PREDICTORS[predictor].code
    row = "".join("C" if i % interval == 0 else code for i in range(setting.num_steps))
    return Draft({setting.graph.output: row})
