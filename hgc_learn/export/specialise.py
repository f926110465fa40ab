"""Specialises a trained router in one budget: more updates at that budget alone, from ever colder draws.

Training shares its updates among all budgets, and one set of logits holds a schedule for each. What is exported is one
of them, which gains when the updates go on for it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hgc_learn.export.kept import NOWHERE, Kept
from hgc_learn.export.learning import OnUpdate, hold_out
from hgc_learn.export.patterns import rounded
from hgc_learn.objectives import Rollout
from hgc_learn.training.gates import Gates

if TYPE_CHECKING:
    from hgc_learn.training.module import RouterModule

TEMPERATURES = 0.5, 0.1
"""At the start and at the end. Training has explored: most gates are decided."""

BATCH_SIZE = 1
"""As in training: the gates drawn vary more than the samples."""


def specialise(
    module: RouterModule,
    budget: float,
    batches: Sequence[dict[str, Any]],
    num_updates: int,
    *,
    max_patterns: int | None = None,
    kept: Kept = NOWHERE,
    on_update: OnUpdate = lambda *_: None,
) -> Gates:
    """The router's gates at a budget, after more updates for it, or rounded as they are, if samples that were
    not learned from like that better. The router's own logits and reaches are moved.

    Args:
        budget: fraction of the full MACs to keep.
        batches: training batches; a quarter of them, the last, judge.
        num_updates: of Adam, each on one batch; the batches are taken in turns.
        max_patterns: how many different steps the schedule may have (`hgc_learn.export.patterns`).
        kept: to go on from where it was interrupted.

    Raises:
        ValueError: a budget that cannot be met, or a gradient that is not finite.
    """
    objective, router = module.objective, module.router
    start = rounded(module, budget, max_patterns)
    if not num_updates:
        return start
    assert isinstance(objective, Rollout)
    learned, judges = hold_out(batches)
    temperature, (first, last) = router.temperature, TEMPERATURES
    optimizer = objective.optimizer(router)
    module.generator = torch.Generator(module.device).manual_seed(0)  # the same gates drawn find the same schedule

    def state() -> dict[str, Any]:
        states = {"router": router.state_dict(), "optimizer": optimizer.state_dict()}
        return states | {"generator": module.generator.get_state()}

    def restore(states: dict[str, Any]) -> None:
        router.load_state_dict(states["router"])
        optimizer.load_state_dict(states["optimizer"])
        module.generator.set_state(states["generator"])

    try:
        for update in kept.updates("specialise", num_updates, state, restore):
            progress = update / num_updates
            router.temperature = first * (last / first) ** progress
            for group in optimizer.param_groups:
                group["lr"] = objective.learning_rate * (1 - progress)
            logs = objective.gradients(module, learned[update % len(learned)], budget)
            router.check_gradients()
            optimizer.step()
            router.clamp()
            on_update("specialise", update, float(logs["loss"].clamp_min(1e-30).log()))
    finally:
        router.temperature = temperature
    end = rounded(module, budget, max_patterns)
    return min([end, start], key=lambda gates: module.log_error(judges, gates))
