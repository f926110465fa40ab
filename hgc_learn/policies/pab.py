"""Pyramid Attention Broadcast: attention outputs reused for a few steps, in the middle of the run."""

from __future__ import annotations

from typing import Literal

from hgc_learn.plan import row_of
from hgc_learn.policies.registry import Grid, register
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import attention_sites


def _grid(setting: Setting) -> Grid:
    """Among others, what the paper has: intervals (spatial, cross) of (2, 5), (2, 6), (3, 7), (4, 9) and (5, 9); and
    the ranges of diffusers (100 to 800) and of the authors' VideoSys (also 100 to 850, 100 to 900 and 450 to 930),
    which are the same here for both attentions."""
    return {
        "cross_interval": sorted({2, 3, 5, 6, 7, 9, 10, setting.num_steps}),
        "self_interval": sorted({1, 2, 3, 4, 5, 10, setting.num_steps}),
        "min_timestep": (-1.0, 100.0, 450.0),
        "max_timestep": (800.0, 850.0, 900.0, 930.0, 1000.0),
    }


@register("pab", paper="Pyramid Attention Broadcast, Zhao et al. 2024, arXiv 2408.12588", grid=_grid)
def pab(
    setting: Setting,
    *,
    cross_interval: int = 6,
    self_interval: int = 2,
    min_timestep: float = 100.0,
    max_timestep: float = 800.0,
    controlnet: Literal["computed", "layers"] = "layers",
) -> Draft:
    """Cross-attention every `cross_interval`-th step, self-attention every `self_interval`-th; all outside a range.

    As in diffusers' `apply_pyramid_attention_broadcast`: a step reuses where its timestep lies strictly between
    `min_timestep` and `max_timestep` and its number, counted over the whole run, is no multiple of the interval. An
    interval of 1 always computes. (The third interval of the paper is that of the temporal attention of video models.)
    As there, feed-forward layers are always computed; the authors' VideoSys reuses those of a few blocks, too.

    Attention is a small part of a UNet's MACs: on SD1.5 with a ControlNet no setting keeps less than 0.88.

    Args:
        cross_interval: steps from one cross-attention to the next.
        self_interval: the same for self-attention.
        min_timestep: at it and below all are computed.
        max_timestep: at it and above all are computed.
        controlnet: `computed`, or `layers`: the ControlNets' own attention follows the rule too.
    """
    for name, interval in (("cross_interval", cross_interval), ("self_interval", self_interval)):
        if interval < 1:
            raise ValueError(f"{name} is {interval}; it must be at least 1.")

    def row(interval: int) -> str:
        return row_of(i % interval == 0 or not min_timestep < t < max_timestep for i, t in enumerate(setting.timesteps))

    return Draft(
        {
            **dict.fromkeys(attention_sites(setting.graph, "attn1", controlnet), row(self_interval)),
            **dict.fromkeys(attention_sites(setting.graph, "attn2", controlnet), row(cross_interval)),
        }
    )
