"""A model of how the error answers when many gates and weights change together, from measured effects.

Changes add up in the final latents, to first order: where they push the same way, the whole overshoots, where they are
opposed they make up for each other. Of each sample the model knows by how much every change moves the final latents
along the error and along a few random directions; sums of these give the squared error after any set of changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hgc_learn.effects import LEAST, Effects
from hgc_learn.hard import HardSchedule
from hgc_learn.router import Router

RIDGE = 1e-3
"""Curvature, as a share of the squared error, that a weight has at least: those of next to no influence stay put."""


class QuadraticModel:
    """Of every sample's squared error around a schedule, by flips of gates and changes of weights.

    Args:
        schedule: at which the effects were measured.
    """

    def __init__(self, router: Router, schedule: HardSchedule, effects: Effects):
        self.router, self.schedule = router, schedule
        self.costs = router.marginal_costs(schedule.compute).double().flatten()
        self.slopes = 2 * effects.flips[0].flatten(1)  # [samples, gates]
        self.flips = effects.flips[1:].flatten(2)  # [directions, samples, gates]
        self.lengths = self.flips.square().sum(0)
        by_weight = effects.weights.flatten(2)
        self.fitted = (by_weight != 0).any(0).any(0).nonzero().flatten()  # weights of what is filled in
        self.weight_slope = by_weight[0][:, self.fitted]  # [samples, weights]
        self.weights = by_weight[1:, :, self.fitted]  # [directions, samples, weights]

    def swaps(self, budget: float, max_swaps: int) -> Tensor:
        """Gates to flip [gates], bool: in turns, has the gate compute that promises most per MAC, then those no longer
        that cost least per MAC until the budget is met, all in view of what has been flipped before; as long as that
        promises to pay, at most `max_swaps` times."""
        flipped, blocked = (torch.zeros_like(self.costs, dtype=torch.bool) for _ in range(2))
        for _ in range(max_swaps):
            swapped = self._swap(flipped, blocked, budget)
            if swapped is None:
                break
            flipped, blocked = swapped
        return flipped

    def _swap(self, flipped: Tensor, blocked: Tensor, budget: float) -> tuple[Tensor, Tensor] | None:
        """What is flipped and what may not be after the next swap; None if nothing promises to pay."""
        before, is_first = self._expected(flipped)[0], True
        flipped, blocked = flipped.clone(), blocked.clone()
        while True:
            compute = self.schedule.compute.flatten() ^ flipped
            if not is_first and self.router.kept(compute.view_as(self.schedule.compute)) <= budget:
                break
            free = ~blocked & (~compute & (self.costs > 0) if is_first else compute & (self.costs < 0))
            score = torch.where(free, self._changes(flipped) / self.costs.abs(), torch.inf)
            gate = int(score.argmin())
            if not score[gate] < (0 if is_first else torch.inf):
                return None
            flipped[gate], is_first = True, False
            blocked[self._neighbours(gate)] = True
        return (flipped, blocked) if _cautious((self._expected(flipped)[0] / before).log()) < 0 else None

    def _neighbours(self, gate: int) -> Tensor:
        """A gate and those of its site from the last step before that computes to the next one that does. Their effects
        do not add up: they answer for the same values."""
        num_steps, num_sites = self.schedule.compute.shape
        step, site = divmod(gate, num_sites)
        computed = self.schedule.compute[:, site].nonzero().flatten().tolist()
        first = max(i for i in computed if i < step)
        last = min((i for i in computed if i > step), default=num_steps - 1)
        return torch.arange(first, last + 1) * num_sites + site

    def _expected(self, flipped: Tensor) -> tuple[Tensor, Tensor]:
        """The samples' relative squared errors after flips [gates], and their moves [directions, samples]."""
        moves = self.flips[..., flipped].sum(-1)
        return (1 + self.slopes[:, flipped].sum(-1) + moves.square().sum(0)).clamp_min(LEAST), moves

    def _changes(self, flipped: Tensor) -> Tensor:
        """By how much one more flip changes the mean log error, after flips [gates]: [gates], cautiously."""
        errors, moves = self._expected(flipped)
        change = self.slopes + 2 * (moves[..., None] * self.flips).sum(0) + self.lengths
        return _cautious(((errors[:, None] + change).clamp_min(LEAST) / errors[:, None]).log())

    def moved(self, damping: float) -> HardSchedule:
        """The schedule with its weights moved to where they lower the error most.

        Args:
            damping: how much moving a weight costs, relative to its curvature (Levenberg-Marquardt).
        """
        weights = self.schedule.weights.flatten().clone()
        if len(self.fitted):
            share = len(self.weight_slope) ** -0.5  # of a sample
            moves = (self.weights * share).flatten(0, 1)
            slope = self.weight_slope.mean(0)
            diagonal = damping * (moves.square().sum(0) + RIDGE)
            scaled = moves / diagonal
            core = torch.eye(len(scaled), dtype=scaled.dtype) + scaled @ moves.t()
            step = slope / diagonal - scaled.t() @ torch.linalg.solve(core, scaled @ slope)
            weights[self.fitted] -= step.to(weights)
        return HardSchedule(self.schedule.compute, weights.view_as(self.schedule.weights))


def _cautious(changes: Tensor) -> Tensor:
    """The mean over samples [samples, ...] and a standard error: the best of thousands of gates is one whose few
    samples flatter it."""
    spread = changes.std(0) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
    return changes.mean(0) + spread
