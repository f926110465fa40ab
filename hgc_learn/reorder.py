"""Lets steps of a router trade places: what one step computes, another does, where real rollouts get better by it.

Updates change gates one by one. For the work of one step to move to the next takes many flips at once, each of which
is bad alone: where the steps that compute much stand, updates hardly change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hgc_learn.fills import Report
from hgc_learn.router import Router

if TYPE_CHECKING:
    from hgc_learn.training import RouterModule

FARTHEST = 3
"""How many steps apart two may be that trade places."""

NUM_SAMPLES = 12
BATCH_SIZE = 4


def reorder(
    module: RouterModule,
    budget: float,
    batches: Sequence[dict[str, Any]],
    num_trials: int,
    *,
    report: Report = lambda *_: None,
) -> None:
    """Swaps the logits and weights of steps, pair after pair and from the beginning again, wherever the mean log error
    of the router's hard schedule at the budget falls by it, until no pair is left or the trials are spent. The
    first step computes everything and stays.

    Args:
        budget: fraction of the full MACs to keep.
        batches: training batches that judge.
        num_trials: of rollouts of all batches.
    """
    if not num_trials:
        return
    router = module.router
    best, trials, since_better = module.log_error(batches, module.hard_schedule(budget)), 0, 0
    pairs = [(step, other) for step in range(1, router.num_steps) for other in range(step + 1, step + FARTHEST + 1)]
    pairs = [pair for pair in pairs if pair[1] < router.num_steps]
    while trials < num_trials and since_better < len(pairs):
        for pair in pairs:
            since_better += 1
            rows = module.hard_schedule(budget).compute[list(pair)]
            if trials == num_trials or since_better > len(pairs):
                break
            if torch.equal(*rows):
                continue
            _swap(router, *pair)
            error = module.log_error(batches, module.hard_schedule(budget))
            if error < best:
                best, since_better = error, 0
            else:
                _swap(router, *pair)
            report(trials, best)
            trials += 1


@torch.no_grad()
def _swap(router: Router, step: int, other: int) -> None:
    for rows in (router.logits, router.weights.transpose(0, 1)):
        rows[[step, other]] = rows[[other, step]]
