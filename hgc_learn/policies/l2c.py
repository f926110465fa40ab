"""Learning-to-Cache's recipe (`hgc_learn.objectives.l2c`)."""

from __future__ import annotations

from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting


@register(
    "l2c",
    paper="Learning-to-Cache, Ma et al. 2024, arXiv 2406.01733 (reconstruction)",
    grid={"interval": range(2, 26)},  # the default, None, is the shortest of these that is trained and in the budget
)
def l2c(setting: Setting, *, ckpt_path: str = "", budget: float = 0.5, interval: int | None = None) -> Draft:
    """Every `interval`-th step in full; between them, the layers that a trained router holds dearest.

    The threshold is solved for the budget; the authors set it by hand.

    Args:
        ckpt_path: checkpoint of `train.py fit` with the objective `L2C`.
        budget: fraction of the full MACs to keep.
        interval: one of those trained; the shortest that the budget allows if not given.
    """
    from hgc_learn.export.export import load_trained
    from hgc_learn.objectives import L2C

    module, _ = load_trained(setting, ckpt_path, "l2c")
    assert isinstance(module.objective, L2C)
    return module.draft(module.objective.gates(module.router, budget, interval=interval))
