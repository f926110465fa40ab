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
        flipped = torch.zeros_like(self.costs, dtype=torch.bool)
        for _ in range(max_swaps):
            gates = self._swap(flipped, budget)
            if gates is None:
                break
            flipped[gates] = True
        return flipped

    def _swap(self, flipped: Tensor, budget: float) -> list[int] | None:
        """The next gates to flip together; None if nothing promises to pay."""
        flipped, gates = flipped.clone(), list[int]()
        before = float(self._expected(flipped)[0].log().mean())
        while True:
            compute = self.schedule.compute.flatten() ^ flipped
            if gates and self.router.kept(compute.view_as(self.schedule.compute)) <= budget:
                break
            free = ~flipped & (~compute & (self.costs > 0) if not gates else compute & (self.costs < 0))
            score = torch.where(free, self._changes(flipped) / self.costs.abs(), torch.inf)
            best = int(score.argmin())
            if not score[best] < (torch.inf if gates else 0):
                return None
            gates.append(best)
            flipped[best] = True
        return gates if float(self._expected(flipped)[0].log().mean()) < before else None

    def _expected(self, flipped: Tensor) -> tuple[Tensor, Tensor]:
        """The samples' relative squared errors after flips [gates], and their moves [directions, samples]."""
        moves = self.flips[..., flipped].sum(-1)
        return (1 + self.slopes[:, flipped].sum(-1) + moves.square().sum(0)).clamp_min(LEAST), moves

    def _changes(self, flipped: Tensor) -> Tensor:
        """By how much one more flip changes the mean log error, after flips [gates]: [gates]."""
        errors, moves = self._expected(flipped)
        change = self.slopes + 2 * (moves[..., None] * self.flips).sum(0) + self.lengths
        return ((errors[:, None] + change).clamp_min(LEAST) / errors[:, None]).log().mean(0)

    def changed(self, flipped: Tensor, damping: float) -> HardSchedule:
        """The schedule after flips [gates], its weights moved to where they lower the error most in view of them.

        Args:
            damping: how much moving a weight costs, relative to its curvature (Levenberg-Marquardt).
        """
        compute = self.schedule.compute ^ flipped.view_as(self.schedule.compute)
        weights = self.schedule.weights.flatten().clone()
        if len(self.fitted):
            errors, moves = self._expected(flipped)
            share = errors.clamp_min(1).rsqrt() / len(errors) ** 0.5  # of samples that flips harm: less
            weights_moves = (self.weights * share[:, None]).flatten(0, 1)
            slope = (self.weight_slope * share.square()[:, None]).sum(0) + weights_moves.t() @ (moves * share).flatten()
            curvature = weights_moves.square().sum(0)
            diagonal = damping * (curvature + RIDGE)
            scaled = weights_moves / diagonal
            core = torch.eye(len(scaled), dtype=scaled.dtype) + scaled @ weights_moves.t()
            step = slope / diagonal - scaled.t() @ torch.linalg.solve(core, scaled @ slope)
            weights[self.fitted] -= step.to(weights)
        return HardSchedule(compute, weights.view_as(self.schedule.weights))
