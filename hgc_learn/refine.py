"""Polishes a hard schedule: swaps gates by their measured effect and keeps what real rollouts confirm.

Rounding a router ignores how gates act on each other. Here the effects of all flips are measured at the rounded
schedule itself, on the student's own trajectory; the swaps that promise most per MAC are made together, and halved
in number until the error really falls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hgc_learn.training import RouterModule


def refine(
    module: RouterModule,
    batches: Sequence[dict[str, Any]],
    compute: Tensor,
    budget: float,
    *,
    num_rounds: int,
    max_swaps: int = 64,
    report: Callable[[int, float, int], None] = lambda *_: None,
) -> Tensor:
    """Improves a hard schedule [steps, sites] at the same budget.

    Args:
        batches: training batches to measure on; the more, the less it fits their noise.
        budget: fraction of the full MACs that must not be exceeded.
        num_rounds: how often the effects are measured; each costs three trajectories per sample and a few rollouts.
        max_swaps: gates switched on in the first trial of a round.
        report: called after each round with (round, mean squared error, swaps accepted).
    """
    router = module.router
    targets = [module.teacher_latents(batch) for batch in batches]

    def error(candidate: Tensor) -> float:
        errors = [module.rollout_errors(b, candidate, t) for b, t in zip(batches, targets, strict=True)]
        return float(torch.cat(errors).mean())

    best, num_swaps = error(compute), max_swaps
    for index in range(num_rounds):
        effects = torch.cat(
            [module.flip_effects(b, compute, t)[1] for b, t in zip(batches, targets, strict=True)]
        ).mean(0)
        costs = marginal_costs(module, compute)
        accepted = 0
        while num_swaps >= 1 and not accepted:
            candidate = swap(router.kept, compute, effects, costs, budget, num_swaps)
            candidate_error = error(candidate)
            if candidate_error < best:
                accepted = int((candidate ^ compute).sum())
                compute, best = candidate, candidate_error
            else:
                num_swaps //= 2
        report(index, best, accepted)
        if not accepted:
            break
        num_swaps = min(max_swaps, 2 * num_swaps)
    return compute


def marginal_costs(module: RouterModule, compute: Tensor) -> Tensor:
    """Change of the kept fraction [steps, sites] by flipping each gate alone (its absolute value)."""
    router = module.router
    kept = router.kept(compute)
    costs = torch.zeros(compute.shape)
    for step in range(1, compute.shape[0]):
        for site in range(compute.shape[1]):
            flipped = compute.clone()
            flipped[step, site] ^= True
            costs[step, site] = abs(router.kept(flipped) - kept)
    return costs


def swap(
    kept: Callable[[Tensor], float], compute: Tensor, effects: Tensor, costs: Tensor, budget: float, num_swaps: int
) -> Tensor:
    """Switches on the `num_swaps` reused gates that promise most per MAC, then off the computed ones that cost least
    error per MAC, until the budget is met again."""
    candidate = compute.clone()
    gain = torch.where(~compute & (costs > 0), -effects / costs.clamp_min(1e-9), -torch.inf)
    gain[0] = -torch.inf
    for index in gain.flatten().topk(num_swaps).indices:
        if gain.flatten()[index] > 0:
            candidate.view(-1)[index] = True
    loss = torch.where(compute & (costs > 0), -effects / costs.clamp_min(1e-9), torch.inf)
    loss[0] = torch.inf
    order = loss.flatten().argsort()
    position = 0
    while position < len(order) and kept(candidate) > budget and loss.flatten()[order[position]] < torch.inf:
        candidate.view(-1)[order[position]] = False
        position += 1
    return candidate if kept(candidate) <= budget else compute
