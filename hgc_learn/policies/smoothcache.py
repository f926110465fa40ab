"""Layers are reused for as many steps as their measured error stays below a threshold."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hgc_learn.calibration import site_statistics
from hgc_learn.plan import COMPUTE
from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import ControlNetLayers, layer_sites
from hgc_learn.spacing import geometric

ALPHA = 0.2
LAYER_TYPES = {
    "attn1": "*.attn1:out",
    "attn2": "*.attn2:out",
    "ff": "*.ff:out",
    "resnet": "*.resnets.*:branch",
    "sampler": "*samplers.?:out",
}
"""All but the last are residual branches. The paper's transformers have neither resnets nor samplers, the convolutions
between resolutions; here most of the MACs are the former's, and the latter's are all that is left in the end."""


@register(
    "smoothcache",
    paper="SmoothCache, Liu et al. 2024, arXiv 2411.10510 (its transformers' rule, on a UNet)",
    # The paper's max_skip is 3; a longer one is needed to reach few MACs.
    grid=lambda setting: {
        "alpha": sorted({ALPHA, *geometric(0.03, 3.0, 46)}),
        "max_skip": sorted({3, 6, 9, 12, setting.num_steps - 1}),
        "grouping": ("type", "layer"),
        "controlnet": ("computed", "layers", "residuals"),
    },
)
def smoothcache(
    setting: Setting,
    *,
    alpha: float = ALPHA,
    max_skip: int = 3,
    grouping: Literal["type", "layer"] = "type",
    controlnet: ControlNetLayers = "layers",
) -> Draft:
    """Skips a layer for the most steps (up to max_skip) after which its relative L1 error is at most alpha.

    The error of holding a value for j steps is measured on uncached trajectories and averaged over the layers of a
    type. The first and the last step are computed.

    Args:
        alpha: largest relative L1 error.
        max_skip: most steps in a row that a layer is reused; 3 in the paper.
        grouping: `type`: layers of one type (of one model) share a row, as in the paper; `layer`: each its own.
        controlnet: `computed`, `layers` (like the UNet's) or `residuals` (its outputs are the layers).
    """
    setting.need_samples("smoothcache")
    if alpha < 0 or max_skip < 1:
        raise ValueError(f"alpha is {alpha}, max_skip {max_skip}; they must be at least 0 and 1.")
    sites = layer_sites(setting.graph, LAYER_TYPES.values(), controlnet)
    statistics = site_statistics(setting, sites)
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(site if grouping == "layer" else layer_type(site), []).append(site)
    rows = {}
    for members in groups.values():
        errors = torch.stack([statistics[site].change() for site in members]).mean(0)
        rows.update(dict.fromkeys(members, skip_row(errors, alpha, max_skip)))
    return Draft(rows)


def layer_type(site: str) -> str:
    """The model that a layer is in and its type, for example `unet attn1`."""
    path, _, kind = site.partition(":")
    model = "unet" if path.startswith("unet.") else "controlnet"
    if "samplers." in path:
        return f"{model} sampler"
    kinds = {"branch": "resnet", "control": "control"}
    return f"{model} {kinds.get(kind) or path.rpartition('.')[2]}"


def skip_row(errors: Tensor, alpha: float, max_skip: int) -> str:
    """The row of a layer; `errors[i, j]` [steps, steps] is that of having step i's value at step j."""
    num_steps = len(errors)
    row = ["-"] * num_steps
    step = 0
    while step < num_steps:
        row[step] = COMPUTE
        skips = [j for j in range(1, max_skip + 1) if step + j < num_steps and errors[step, step + j] <= alpha]
        step += 1 + max(skips, default=0)
    row[-1] = COMPUTE
    return "".join(row)
