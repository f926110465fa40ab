"""HarmoniCa's recipe (`hgc_learn.objectives.harmonica`)."""

from __future__ import annotations

from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting


@register("harmonica", paper="HarmoniCa, Huang et al. 2025, arXiv 2410.01723 (reconstruction)", grid={})
def harmonica(setting: Setting, *, ckpt_path: str = "", budget: float = 0.5) -> Draft:
    """The layers that a router holds dearest which was trained on its own trajectory with soft caches.

    The threshold is solved for the budget; the authors fix it, and the penalty makes the budget.

    Args:
        ckpt_path: checkpoint of `train.py fit` with the objective `HarmoniCa`.
        budget: fraction of the full MACs to keep.
    """
    from hgc_learn.export.export import load_trained

    module, _ = load_trained(setting, ckpt_path, "harmonica")
    return module.draft(module.gates(budget))
