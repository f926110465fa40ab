"""All steps up to a cut-off in full, few after it: what learned caching rules are often close to."""

from __future__ import annotations

from hgc_learn.plan import row_of
from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import decoder_inputs, select_sites


def _grid(setting: Setting) -> dict[str, list[object]]:
    inputs = [sites[0] for sites in reversed(decoder_inputs(setting.graph))]
    return {
        "cutoff": list(range(1, setting.num_steps)),
        "interval": [2, 3, 4, 5, 7, 10, setting.num_steps],
        "site": ["*:branch", setting.graph.output, *inputs],
    }


@register(
    "time_cutoff", paper="the shape of Learning-to-Cache's patterns, Ma et al. 2024, arXiv 2406.01733", grid=_grid
)
def time_cutoff(setting: Setting, *, cutoff: int = 10, interval: int = 3, site: str = "*:branch") -> Draft:
    """Computes everything before step `cutoff`; from there on reuses, refreshed at every `interval`-th step.

    Args:
        cutoff: the first step that may reuse.
        interval: steps from one refresh to the next, counted from the last full step; as long as the run: never.
        site: glob pattern of what is reused: residual branches, the whole prediction, a decoder feature, ...
    """
    if cutoff < 1:
        raise ValueError(f"cutoff is {cutoff}; the first step has nothing to reuse: it must be at least 1.")
    if interval < 1:
        raise ValueError(f"interval is {interval}; it must be at least 1.")
    steps = range(setting.num_steps)
    row = row_of(i < cutoff or (i - cutoff + 1) % interval == 0 for i in steps)
    return Draft(dict.fromkeys(select_sites(setting.graph, [site]), row))
