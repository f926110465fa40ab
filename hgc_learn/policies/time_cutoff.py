"""All steps up to a cut-off in full, few after it: what learned caching rules are often close to."""

from __future__ import annotations

from typing import Literal

from hgc_learn.plan import row_of
from hgc_learn.policies.deepcache import residuals_read
from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import decoder_inputs, select_sites
from hgc_learn.spacing import full_steps, intervals

CUTOFF = 10


def _grid(setting: Setting) -> dict[str, list[object]]:
    num_steps = setting.num_steps
    inputs = [sites[0] for sites in reversed(decoder_inputs(setting.graph))]
    return {
        "cutoff": sorted({*range(1, num_steps, max(1, num_steps // 20)), min(CUTOFF, num_steps - 1)}),
        "interval": [*intervals(num_steps, 10), num_steps],
        "site": ["*:branch", setting.graph.output, *inputs],
        "control": ["fresh", "held"] if setting.graph.residuals else ["fresh"],
    }


@register(
    "time_cutoff", paper="the shape of Learning-to-Cache's patterns, Ma et al. 2024, arXiv 2406.01733", grid=_grid
)
def time_cutoff(
    setting: Setting,
    *,
    cutoff: int = CUTOFF,
    interval: float = 3,
    site: str = "*:branch",
    control: Literal["held", "fresh"] = "fresh",
) -> Draft:
    """Computes everything before step `cutoff`; from there on reuses, refreshed at every `interval`-th step.

    Args:
        cutoff: the first step that may reuse.
        interval: steps from one refresh to the next, counted from the last full step; 2.5 for every second and third in
            turns; as long as the run: never.
        site: glob pattern of what is reused: residual branches, the whole prediction, a decoder feature, ...
        control: the ControlNet's residuals that are still read are `fresh`, or `held` as well.
    """
    if cutoff < 1:
        raise ValueError(f"cutoff is {cutoff}; the first step has nothing to reuse: it must be at least 1.")
    full = full_steps(setting.num_steps, interval, min(cutoff, setting.num_steps))
    row = row_of(i in full for i in range(setting.num_steps))
    reused = select_sites(setting.graph, [site])
    if control == "held" and "-" in row:
        reused += residuals_read(setting.graph, reused)
    return Draft(dict.fromkeys(reused, row))
