"""Refines a hard schedule: makes the changes that measured effects promise most of and keeps what rollouts confirm.

Rounding a router ignores how gates act on each other. Here the effects of all other choices and of all weights are
measured at the schedule itself, on the student's own trajectory. A quadratic model of them (`quadratic`) says how to
move the weights, and which gates to swap; fewer of them are, or by less, whenever the error does not really fall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hgc_learn.effects import Effects
from hgc_learn.hard import HardSchedule
from hgc_learn.quadratic import QuadraticModel
from hgc_learn.setting import Draft
from hgc_learn.training import RouterModule

MAX_DAMPING = 100.0
MAX_SWAP_TRIALS = 4
"""Of swapping gates in a round, each with half as many as the one before."""


class Refiner:
    """Improves a hard schedule at its budget, round by round.

    Args:
        batches: training batches to measure on, which the rounds take in turns: a schedule refined on few samples
            fits their noise.
        budget: fraction of the full MACs that must not be exceeded.
        samples_per_round: that effects are measured on; changes are judged by as many others.
        num_directions: random ones that effects are measured in.
        max_swaps: gates switched on in the first trial.
    """

    def __init__(
        self,
        module: RouterModule,
        batches: Sequence[dict[str, Any]],
        schedule: HardSchedule,
        budget: float,
        *,
        samples_per_round: int = 16,
        num_directions: int = 2,
        max_swaps: int = 64,
    ):
        self.module, self.batches, self.schedule, self.budget = module, batches, schedule, budget
        self.batches_per_round = math.ceil(samples_per_round / len(batches[0]["text"]))
        self.num_directions = num_directions
        self.max_swaps, self.num_swaps, self.damping = max_swaps, max_swaps, 0.3
        self.num_rounds = 0
        self.log_error = math.inf

    def round(self) -> None:
        """One round: a measurement, moves of the weights, and trials of swapping gates besides. Each trial costs a
        rollout of the judging samples."""
        mine, judges = self._batches(0), self._batches(1)
        self.schedule = self._with_ways_up(self.schedule)
        self.num_rounds += 1
        effects = Effects.join([self.module.effects(b, self.schedule, self.num_directions) for b in mine])
        self.log_error = log_error(self.module, judges, self.schedule)
        model = QuadraticModel(self.module.router, self.schedule, effects)
        while self.damping <= MAX_DAMPING:
            if self._accepts(model.moved(self.damping), judges):
                self.damping /= 3
                break
            self.damping *= 3
        self.damping = min(self.damping, MAX_DAMPING)
        for _ in range(MAX_SWAP_TRIALS):
            flipped = model.swaps(self.budget, self.num_swaps)
            if not flipped.any():
                break
            # With the weights that were just found: where gates change, the model knows little of how weights act.
            compute = self.schedule.compute ^ flipped.view_as(self.schedule.compute)
            if self._accepts(replace(self.schedule, compute=compute), judges):
                self.num_swaps = min(self.max_swaps, 2 * self.num_swaps)
                break
            self.num_swaps = max(1, min(self.num_swaps, int((flipped & ~self.schedule.compute.flatten()).sum())) // 2)

    def _with_ways_up(self, schedule: HardSchedule) -> HardSchedule:
        """Sets the gates that make no difference now, in turns: all that is behind a filled-in site computes with it if
        it is flipped, or it alone does, from the kept values of what it reads."""
        dead = self.module.router.dead(schedule.compute)
        computes = torch.tensor(self.num_rounds % 2 == 0)
        weights = usual_weights(schedule, ~schedule.compute & ~dead)
        return HardSchedule(torch.where(dead, computes, schedule.compute), weights)

    def _batches(self, ahead: int) -> list[dict[str, Any]]:
        start = (self.num_rounds + ahead) * self.batches_per_round
        return [self.batches[(start + i) % len(self.batches)] for i in range(self.batches_per_round)]

    def _accepts(self, candidate: HardSchedule, batches: Sequence[dict[str, Any]]) -> bool:
        error = log_error(self.module, batches, candidate)
        if error < self.log_error:
            self.schedule, self.log_error = candidate, error
            return True
        return False


def log_error(module: RouterModule, batches: Sequence[dict[str, Any]], schedule: HardSchedule | Draft) -> float:
    """Mean over samples of the logarithm of the final latents' squared error under a schedule: as PSNR is judged,
    and not ruled by the few samples with the largest errors."""
    errors = torch.cat([module.rollout_errors(b, schedule, module.teacher_latents(b)) for b in batches])
    error = float(errors.clamp_min(1e-30).log().mean())
    return error if math.isfinite(error) else math.inf


def usual_weights(schedule: HardSchedule, filled_in: Tensor) -> Tensor:
    """The weights; where gates are not `filled_in` [steps, sites], the mean of those of the same site that are: what
    they would be filled in with. Sites that never are keep theirs."""
    share = filled_in.to(schedule.weights)
    mean = (schedule.weights * share).sum(1, keepdim=True) / share.sum(0).clamp_min(1)
    return torch.where(filled_in | ~filled_in.any(0), schedule.weights, mean)
