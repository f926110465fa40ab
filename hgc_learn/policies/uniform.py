"""Whole steps at regular intervals."""

from __future__ import annotations

from typing import Literal

from hgc_learn.plan import row_of
from hgc_learn.policies.registry import register
from hgc_learn.predictors import PREDICTORS
from hgc_learn.setting import Draft, Setting
from hgc_learn.spacing import first_fulls, full_steps, intervals


@register(
    "uniform",
    paper="whole steps; where layers are kept or forecast, as in FORA and TaylorSeer, it is `taylorseer`",
    grid=lambda setting: {
        "interval": intervals(setting.num_steps, 20),
        "first_full": first_fulls(setting.num_steps),
        "predictor": ("hold", "linear", "taylor2", "taylor3", "taylor4", "ab2", "bdf2", "foca"),
    },
)
def uniform(
    setting: Setting,
    *,
    interval: float = 2,
    first_full: int = 1,
    predictor: Literal["hold", "linear", "taylor2", "taylor3", "taylor4", "ab2", "bdf2", "foca"] = "hold",
) -> Draft:
    """Computes every `interval`-th step; between them the prediction is held or forecast.

    Args:
        interval: steps per full step; 2.5 for the steps 0, 2, 5, 7, ...
        first_full: steps at the start that are all full; from the last of them on the interval counts. More than one
            is TaylorSeer's warm-up (Liu et al. 2025, arXiv 2503.06923).
        predictor: of the steps between.
    """
    full = set(full_steps(setting.num_steps, interval, first_full))
    code = PREDICTORS[predictor].code
    return Draft({setting.graph.output: row_of((i in full for i in range(setting.num_steps)), code)})
