"""The learned router, trained on the student's own hard trajectories (`hgc_learn.objectives.rollout`)."""

from __future__ import annotations

from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting


@register("learned", paper="this project, docs/learning.md", grid={})
def learned(
    setting: Setting,
    *,
    ckpt_path: str = "",
    budget: float = 0.5,
    refine_rounds: int = 4,
    refine_samples: int = 64,
    refine_batch_size: int = 8,
    tune_updates: int = 128,
) -> Draft:
    """A trained router's best gates within the budget, refined by real rollouts, with learned fill-ins.

    Args:
        ckpt_path: checkpoint of `train.py fit`.
        budget: fraction of the full MACs to keep.
        refine_rounds: rounds of local search on the training's own samples; 0 for none.
        refine_samples: samples that the rounds take in turns.
        refine_batch_size: how many of them run at once.
        tune_updates: steps of learning how the schedule fills in what it skips, on the same samples; 0 for none.
    """
    from hgc_learn.export import check_counts, decide, load_trained, refining_batches
    from hgc_learn.fills import BATCH_SIZE, tune_fills

    check_counts(refine_rounds, tune_updates)
    module, data = load_trained(setting, ckpt_path, "learned")
    batches = refining_batches(module, data, refine_samples, refine_batch_size) if refine_rounds else []
    hard = decide(module, budget, batches, num_rounds=refine_rounds)
    batches = refining_batches(module, data, refine_samples, BATCH_SIZE) if tune_updates else []
    return tune_fills(module, hard, batches, tune_updates)
