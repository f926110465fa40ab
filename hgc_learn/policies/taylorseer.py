"""Full steps at regular intervals; between them every layer's own contribution is held or forecast."""

from __future__ import annotations

from typing import Literal

from hgc_learn.plan import row_of
from hgc_learn.policies.deepcache import sites_below
from hgc_learn.policies.registry import Grid, register
from hgc_learn.predictors import PREDICTORS
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import ControlNetLayers, decoder_inputs, layer_sites
from hgc_learn.spacing import first_fulls, full_steps, intervals

LAYERS = ("*:branch", "*samplers.?:out")
"""Residual branches of resnets and transformers, and what has none."""


def _grid(setting: Setting) -> list[Grid]:
    """Few predictors, for only some of the candidates are tried; of the decoder's layers those that reuse most."""
    knobs: Grid = {
        "interval": intervals(setting.num_steps, 20),
        "first_full": first_fulls(setting.num_steps),
        "predictor": ("hold", "linear", "taylor2", "bdf2"),
    }
    has_controlnet = bool(setting.graph.residuals)
    layers: Grid = {"controlnet": ("layers", "residuals") if has_controlnet else ("layers",)}
    branches: Grid = {
        "branch": range(min(4, len(decoder_inputs(setting.graph)))),
        "controlnet": ("residuals", "computed") if has_controlnet else ("computed",),
    }
    return [{**knobs, **layers}, {**knobs, **branches}]


@register(
    "taylorseer",
    paper="TaylorSeer, Liu et al. 2025, arXiv 2503.06923 (its transformers' rule, on a UNet); held, it is FORA, "
    "Selvaraju et al. 2024, arXiv 2407.01425",
    grid=_grid,
)
def taylorseer(
    setting: Setting,
    *,
    interval: float = 3,
    first_full: int = 1,
    predictor: Literal["hold", "linear", "taylor2", "taylor3", "taylor4", "ab2", "bdf2", "foca"] = "linear",
    controlnet: ControlNetLayers = "layers",
    branch: int | None = None,
) -> Draft:
    """Forecasts what every layer adds between full steps, or what a layer of the decoder reads from below.

    Args:
        interval: steps per full step; 2.5 for the steps 0, 2, 5, 7, ...
        first_full: steps at the start that are all full; from the last of them on the interval counts.
        predictor: of the steps between: `linear` is TaylorSeer of first order, `taylor2` of second, ...
        controlnet: `computed`, `layers` (like the UNet's) or `residuals` (its outputs are forecast).
        branch: decoder layer, counted from the end, whose input from below is forecast while all outside of it runs, as
            DeepCache has it; every layer's own contribution if not given.

    Raises:
        ValueError: a branch that the UNet does not have.
    """
    full = set(full_steps(setting.num_steps, interval, first_full))
    row = row_of((i in full for i in range(setting.num_steps)), PREDICTORS[predictor].code)
    sites = layer_sites(setting.graph, LAYERS, controlnet)
    if branch is not None:
        sites = [*sites_below(setting.graph, branch), *(site for site in sites if not site.startswith("unet."))]
    return Draft(dict.fromkeys(sites, row))
