"""Lets steps of a router trade places: what one step computes, another does, where real rollouts get better by it.

Updates change gates one by one. For the work of one step to move to the next takes many flips at once, each of which
is bad alone: where the steps that compute much stand, updates hardly change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hgc_learn.data import hold_out
from hgc_learn.fills import Report
from hgc_learn.hard import HardSchedule
from hgc_learn.router import Router

if TYPE_CHECKING:
    from hgc_learn.training import RouterModule

FARTHEST = 3
"""How many steps apart two may be that trade places."""

BATCH_SIZE = 8


def reorder(
    module: RouterModule,
    budget: float,
    batches: Sequence[dict[str, Any]],
    num_trials: int,
    *,
    report: Report = lambda *_: None,
) -> None:
    """Swaps the logits and weights of steps, pair after pair and from the beginning again, wherever the router's hard
    schedule at the budget gets better by it, until no pair is left or the trials are spent. The first step computes
    everything and stays.

    Args:
        budget: fraction of the full MACs to keep.
        batches: training batches; a quarter of them, the last, are left for what comes after to judge by.
        num_trials: of schedules that are rolled out.
    """
    if not num_trials:
        return
    router, (learned, _) = module.router, hold_out(batches)
    pairs = [(step, other) for step in range(1, router.num_steps) for other in range(step + 1, step + FARTHEST + 1)]
    pairs = [pair for pair in pairs if pair[1] < router.num_steps]
    schedule = module.hard_schedule(budget)
    errors = [module.log_errors(batch, schedule) for batch in learned]
    trials = since_better = 0
    for step, other in itertools.cycle(pairs):
        if trials == num_trials or since_better == len(pairs):
            return
        since_better += 1
        if torch.equal(*schedule.compute[[step, other]]):
            continue
        _swap(router, step, other)
        swapped = module.hard_schedule(budget)
        if better := _better(module, learned, swapped, errors):
            schedule, errors, since_better = swapped, better, 0
        else:
            _swap(router, step, other)
        report(trials, float(torch.cat(errors).mean()))
        trials += 1


@torch.no_grad()
def _swap(router: Router, step: int, other: int) -> None:
    for rows in (router.logits, router.weights.transpose(0, 1)):
        rows[[step, other]] = rows[[other, step]]


def _better(
    module: RouterModule, batches: Sequence[dict[str, Any]], schedule: HardSchedule, errors: Sequence[Tensor]
) -> list[Tensor] | None:
    """The schedule's log errors, a tensor per batch, if their mean is lower than that of `errors` by more than the
    difference's standard error; given up as soon as a batch leaves it no lower."""
    found: list[Tensor] = []
    for batch in batches:
        found.append(module.log_errors(batch, schedule))
        change = torch.cat(found) - torch.cat([*errors[: len(found)]])
        if not change.mean() < 0:  # not a number, if a trajectory is lost
            return None
    return found if change.mean() < -change.std(correction=0) / math.sqrt(len(change)) else None
