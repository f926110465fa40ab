"""Each block is reused until its measured change has added up to a threshold."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hgc_learn.calibration import SiteStatistics, site_statistics
from hgc_learn.plan import COMPUTE
from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import ControlNetLayers, layer_sites
from hgc_learn.spacing import geometric

PAPER = "Cache Me if You Can, Wimbauer et al., CVPR 2024, arXiv 2312.03209"
BLOCKS = {
    "transformers": ("*.attentions.*:branch",),
    "all": ("*.resnets.*:branch", "*.attentions.*:branch", "*samplers.?:out"),
}
DELTA = 0.5
GRID = {
    "delta": sorted({DELTA, *geometric(0.02, 10.0, 82)}),
    "controlnet": ("computed", "layers", "residuals"),
    "blocks": tuple(BLOCKS),
}


@register("block_caching", paper=PAPER, grid=GRID)
def block_caching(
    setting: Setting,
    *,
    delta: float = DELTA,
    controlnet: ControlNetLayers = "layers",
    blocks: Literal["transformers", "all"] = "all",
) -> Draft:
    """Recomputes a block when its relative L1 changes since the last time have added up to more than delta.

    Blocks are the residual branches of transformers, as in the paper's Fig. 4, or of resnets, too, whose MACs are most
    of a small UNet's, and what samplers put out; their changes from step to step are measured on uncached trajectories.

    Args:
        delta: threshold of the accumulated change.
        controlnet: `computed`, `layers` (like the UNet's) or `residuals` (its outputs are the blocks).
        blocks: `transformers`, or `all`, resnets and samplers among them.
    """
    draft, _ = _accumulate(setting, delta, controlnet, blocks, "-")
    return draft


@register("block_caching_scale_shift", paper=f"{PAPER} (reconstruction)", grid=GRID)
def block_caching_scale_shift(
    setting: Setting,
    *,
    delta: float = DELTA,
    controlnet: ControlNetLayers = "layers",
    blocks: Literal["transformers", "all"] = "all",
) -> Draft:
    """Block Caching that scales and shifts reused tensors per step and channel, fitted in closed form.

    The paper trains both by distillation; here they are the least-squares fit of the true value to the reused one on
    uncached trajectories.

    Args:
        delta: threshold of the accumulated change.
        controlnet: `computed`, `layers` (like the UNet's) or `residuals` (its outputs are the blocks).
        blocks: `transformers`, or `all`, resnets and samplers among them.
    """
    return fit_scale_shift(setting, *_accumulate(setting, delta, controlnet, blocks, "s"))


def _accumulate(
    setting: Setting, delta: float, controlnet: ControlNetLayers, blocks: str, code: str
) -> tuple[Draft, dict[str, SiteStatistics]]:
    """The blocks' rows, which reuse by a code, and what was measured."""
    setting.need_samples("block_caching")
    if delta < 0:
        raise ValueError(f"delta is {delta}; it must be at least 0.")
    sites = layer_sites(setting.graph, BLOCKS[blocks], controlnet)
    statistics = site_statistics(setting, sites)
    return Draft({site: accumulation_row(statistics[site].change(), delta, code) for site in sites}), statistics


def accumulation_row(change: Tensor, delta: float, code: str) -> str:
    """The row of a block; `change[i, j]` [steps, steps] is the relative L1 change from step i to j."""
    row, accumulated = COMPUTE, 0.0
    for step in range(1, len(change)):
        accumulated += float(change[step - 1, step])
        if accumulated > delta:
            row, accumulated = row + COMPUTE, 0.0
        else:
            row += code
    return row


def fit_scale_shift(setting: Setting, draft: Draft, statistics: dict[str, SiteStatistics]) -> Draft:
    """Adds `<site>/scale` and `<site>/shift` [steps, channels] for every site that is loaded."""
    tensors = {}
    for step, plan in enumerate(setting.plan(draft).steps):
        for load in plan.load:
            measured = statistics[load.site]
            if f"{load.site}/scale" not in tensors:
                shape = (setting.num_steps, len(measured.gram))
                tensors[f"{load.site}/scale"] = torch.ones(shape)
                tensors[f"{load.site}/shift"] = torch.zeros(shape)
            scale, shift = least_squares(measured, source=load.guided[0], target=step)
            tensors[f"{load.site}/scale"][step] = scale
            tensors[f"{load.site}/shift"][step] = shift
    rows = {site: row for site, row in draft.sites.items() if f"{site}/scale" in tensors}
    return Draft(rows, tensors)


def least_squares(statistics: SiteStatistics, *, source: int, target: int) -> tuple[Tensor, Tensor]:
    """Per channel, scale and shift that bring F_source nearest to F_target: float32 [channels] each. A channel that
    does not vary is shifted only."""
    mean = statistics.total / statistics.count
    covariance = statistics.gram[:, source, target] / statistics.count - mean[:, source] * mean[:, target]
    power = statistics.gram[:, source, source] / statistics.count
    variance = power - mean[:, source].square()
    varies = variance > 1e-9 * power
    scale = torch.where(varies, covariance / torch.where(varies, variance, 1.0), 1.0)
    return scale.float(), (mean[:, target] - scale * mean[:, source]).float()
