"""The learned router, trained on the student's own hard trajectories (`hgc_learn.objectives.rollout`)."""

from __future__ import annotations

import itertools

from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting


@register("learned", paper="this project, docs/learning.md", grid={})
def learned(
    setting: Setting, *, ckpt_path: str = "", budget: float = 0.5, refine_rounds: int = 4, refine_batches: int = 16
) -> Draft:
    """A trained router's best gates within the budget, polished by real rollouts.

    Args:
        ckpt_path: checkpoint of `train.py fit`.
        budget: fraction of the full MACs to keep.
        refine_rounds: rounds of local search on the training's own samples; 0 for none.
        refine_batches: batches that they take in turns, four in a round.
    """
    from hgc_learn.export import decide, load_trained

    module, data = load_trained(setting, ckpt_path, "learned")
    batches = list(itertools.islice(data.train_dataloader(), refine_batches)) if refine_rounds else []
    batches = [module.transfer_batch_to_device(batch, module.device, 0) for batch in batches]
    return module.draft(decide(module, budget, batches, num_rounds=refine_rounds))
