"""The learned router, trained on the student's own hard trajectories (`hgc_learn.objectives.rollout`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting


@register("learned", paper="this project, docs/learning.md", grid={})
def learned(
    setting: Setting, *, ckpt_path: str = "", budget: float = 0.5, refine_rounds: int = 4, refine_batches: int = 4
) -> Draft:
    """A trained router's best gates within the budget, polished by real rollouts.

    Args:
        ckpt_path: checkpoint of `train.py fit`.
        budget: fraction of the full MACs to keep.
        refine_rounds: rounds of local search; 0 for none.
        refine_batches: batches of the training's size that it measures on: of the setting's samples or, where there
            are none, of the training's.
    """
    from hgc_learn.export import decide, load_trained

    module, data = load_trained(setting, ckpt_path, "learned")
    # The search differentiates through whole trajectories: batches must not be larger than the training's.
    samples = _resized(setting.batches, data.hparams["batch_size"]) if setting.batches else data.train_dataloader()
    batches = list(itertools.islice(samples, refine_batches)) if refine_rounds else []
    batches = [module.transfer_batch_to_device(batch, module.device, 0) for batch in batches]
    return module.draft(decide(module, budget, batches, num_rounds=refine_rounds))


def _resized(batches: Iterable[dict[str, Any]], batch_size: int) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for start in range(0, len(batch["text"]), batch_size):
            yield {name: values[start : start + batch_size] for name, values in batch.items()}
