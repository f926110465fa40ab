"""Lets steps of a router change places: what one step computes another does, where real rollouts get better by it.

Updates change gates one by one. For the work of a step to move to the next takes many flips at once, each of which is
bad alone: where the steps stand that compute much, updates hardly change, and it is left to chance.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hgc_learn.export.kept import NOWHERE, Kept
from hgc_learn.export.learning import OnUpdate, hold_out
from hgc_learn.export.patterns import rounded
from hgc_learn.training.gates import Gates

if TYPE_CHECKING:
    from hgc_learn.training.module import RouterModule

FARTHEST = 4
"""How many steps away a step may move."""

BATCH_SIZE = 4
"""Most moves are bad enough to be given up after so few samples."""

NUM_SAMPLES = 96
"""That a move must be better on. The best of a hundred moves on few samples is good on these alone."""


def reorder(
    module: RouterModule,
    budget: float,
    batches: Sequence[dict[str, Any]],
    num_trials: int,
    *,
    max_patterns: int | None = None,
    kept: Kept = NOWHERE,
    on_update: OnUpdate = lambda *_: None,
) -> None:
    """Moves steps of the router, their logits and reaches, wherever the rounded schedule gets better by it: two change
    places, or one goes to another place and those between make room. It goes on until no such move is left or the
    trials are spent, and is undone if the samples that judge do not like the outcome better. The first step
    computes everything and stays.

    Args:
        budget: fraction of the full MACs to keep.
        batches: training batches; a quarter of them, the last, judge.
        num_trials: of schedules that are rolled out, on 4 samples if they are worse there, on up to 96 if not.
        max_patterns: how many different steps the schedule may have (`hgc_learn.export.patterns`).
        kept: to go on from where it was interrupted.
        on_update: called with the mean log error of the best so far.

    Raises:
        ValueError: a budget that cannot be met.
    """
    if not num_trials:
        return
    router, (learned, judges) = module.router, hold_out(batches)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    start = rounded(module, budget, max_patterns)
    search = _Search(module, budget, max_patterns, learned[: NUM_SAMPLES // BATCH_SIZE], start)
    for trial in kept.updates("reorder", num_trials, search.state, search.restore):
        if not search.try_next():
            break
        on_update("reorder", trial, search.log_error())
    if search.best is not start and module.log_error(judges, search.best) >= module.log_error(judges, start):
        router.load_state_dict(before)


@dataclass
class _Search:
    """The router's order of steps is the best so far; `best` are its gates.

    Attributes:
        position: in the list of moves, which is gone through again and again.
        since_better: moves since the best was found.
    """

    module: RouterModule
    budget: float
    max_patterns: int | None
    batches: Sequence[dict[str, Any]]
    best: Gates
    position: int = 0
    since_better: int = 0

    def __post_init__(self) -> None:
        self.moves = moves(self.module.router.num_steps)
        self.errors: list[Tensor] = []  # log errors of the best, of as many batches as were needed

    def state(self) -> dict[str, Any]:
        states = {"router": self.module.router.state_dict()}
        return states | {"position": self.position, "since_better": self.since_better}

    def restore(self, states: dict[str, Any]) -> None:
        self.module.router.load_state_dict(states["router"])
        self.position, self.since_better = states["position"], states["since_better"]
        self.best, self.errors = rounded(self.module, self.budget, self.max_patterns), []

    def try_next(self) -> bool:
        """Makes the next move that changes anything if it is better; False if there is none."""
        while self.since_better < len(self.moves):
            order = self.moves[self.position % len(self.moves)]
            self.position += 1
            self.since_better += 1
            self._arrange(order)
            gates = rounded(self.module, self.budget, self.max_patterns)
            is_same = torch.equal(gates.compute, self.best.compute)
            better = None if is_same else self._better(gates)
            if better:
                self.best, self.errors, self.since_better = gates, better, 0
            else:
                self._arrange([order.index(step) for step in range(len(order))])
            if not is_same:
                return True
        return False

    def log_error(self) -> float:
        """Mean of the best, on the batches that have been needed."""
        return float(torch.cat(self.errors).mean())

    @torch.no_grad()
    def _arrange(self, order: Sequence[int]) -> None:
        for rows in (self.module.router.logits, self.module.router.reach):
            rows.copy_(rows[order])

    def _better(self, gates: Gates) -> list[Tensor] | None:
        """The log errors of gates, a tensor per batch, if their mean is lower than that of the best by more than twice
        the difference's standard error; given up as soon as a batch leaves it no lower."""
        found: list[Tensor] = []
        for index, batch in enumerate(self.batches):
            if index == len(self.errors):
                self.errors.append(self._log_errors(batch, self.best))
            found.append(self._log_errors(batch, gates))
            change = torch.cat(found) - torch.cat(self.errors[: len(found)])
            if not change.mean() < 0:  # not a number, if a trajectory is lost
                return None
        return found if change.mean() < -2 * change.std(correction=0) / math.sqrt(len(change)) else None

    def _log_errors(self, batch: dict[str, Any], gates: Gates) -> Tensor:
        return self.module.rollout_errors(batch, gates).clamp_min(1e-30).log()


def moves(num_steps: int) -> list[list[int]]:
    """Orders of steps, each another one's place, shuffled: two that change places, or one that moves past others."""
    orders = []
    for one in range(1, num_steps):
        for other in range(one + 1, min(one + FARTHEST + 1, num_steps)):
            swapped = [*range(num_steps)]
            swapped[one], swapped[other] = other, one
            orders.append(swapped)
            for source, goal in ((one, other), (other, one)) if other > one + 1 else ():
                shifted = [*range(num_steps)]
                shifted.insert(goal, shifted.pop(source))
                orders.append(shifted)
    random.Random(0).shuffle(orders)
    return orders
