"""The learned router, trained on the student's own hard trajectories (`hgc_learn.objectives.rollout`)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from hgc_learn.export.learning import Learning
from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting


@register("learned", paper="this project, docs/learning.md", grid={})
def learned(
    setting: Setting,
    *,
    ckpt_path: str = "",
    other_ckpt_paths: tuple[str, ...] = (),
    budget: float = 0.5,
    learning_samples: int = Learning.learning_samples,
    reorder_trials: int = Learning.reorder_trials,
    specialise_updates: int = Learning.specialise_updates,
    fill_updates: int = Learning.fill_updates,
) -> Draft:
    """A trained router's best gates within the budget, after learning more for it alone, with learned fill-ins.

    What has been learned is kept beside the checkpoint until all is: interrupted, it goes on from there.

    Args:
        ckpt_path: checkpoint of `train.py fit`.
        other_ckpt_paths: of other trainings of the same, with other seeds: the best of all at this budget is taken.
        budget: fraction of the full MACs to keep.
        learning_samples: of the training's own samples that all of the following learn from; all, if there are fewer.
        reorder_trials: of whether steps should change places, for this budget alone; 0 for none.
        specialise_updates: of the router, for this budget alone; 0 for none.
        fill_updates: steps of learning how the schedule fills in what it skips; 0 for none.
    """
    from hgc_learn.export.choose import read_routers
    from hgc_learn.export.export import deciding, load_trained
    from hgc_learn.export.kept import Kept

    learning = Learning(
        learning_samples=learning_samples,
        reorder_trials=reorder_trials,
        specialise_updates=specialise_updates,
        fill_updates=fill_updates,
    )
    module, data = load_trained(setting, ckpt_path, "learned")
    ckpt_paths = [Path(ckpt_path), *map(Path, other_ckpt_paths)]
    routers = read_routers(module, ckpt_paths)
    kept = Kept.of(kept_path(ckpt_path, budget), ckpt_paths, {"budget": budget, **asdict(learning)})
    with deciding(module, data, budget, routers, learning, kept) as (_, draft, _, _):
        return draft


def kept_path(ckpt_path: str, budget: float) -> Path:
    """Where it is kept what has been learned for a budget so far."""
    path = Path(ckpt_path)
    return path.with_name(f"{path.stem}-{budget:g}.kept")
