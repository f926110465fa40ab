"""Polishes a hard schedule: makes the changes that measured effects promise most of and keeps what rollouts confirm.

Rounding a router ignores how gates act on each other. Here the effects of all other choices are measured at the
schedule itself, on the student's own trajectory. In turns, gates are swapped (those that promise most per MAC compute,
those that cost least per MAC no longer do) and predictors are exchanged: many at once, half as many whenever the error
does not really fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hgc_learn.router import Router
from hgc_learn.training import RouterModule

Propose = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(schedule, effects, gates to leave alone [steps, sites], number of changes) -> schedule; the same one if there is
nothing to change."""


def refine(
    module: RouterModule,
    batches: Sequence[dict[str, Any]],
    choices: Tensor,
    budget: float,
    *,
    num_rounds: int,
    batches_per_round: int = 4,
    trials_per_round: int = 6,
    max_changes: int = 64,
    report: Callable[[int, float, int], None] = lambda *_: None,
) -> Tensor:
    """Improves a hard schedule [steps, sites] at the same budget.

    Args:
        batches: training batches to measure on, which the rounds take in turns: a schedule polished on few samples
            fits their noise.
        budget: fraction of the full MACs that must not be exceeded.
        num_rounds: how often the effects are measured; each costs three trajectories per sample and a few rollouts.
        batches_per_round: that effects and errors are measured on.
        trials_per_round: rollouts of changed schedules, for gates and for predictors each.
        max_changes: gates switched on, and predictors exchanged, in the first trial of a round.
        report: called after each round with (round, mean squared error as a geometric mean, choices changed).
    """
    router = module.router

    def swap(schedule: Tensor, effects: Tensor, frozen: Tensor, num_changes: int) -> Tensor:
        return swap_gates(router, schedule, effects, frozen, budget, num_changes)

    proposals: dict[Propose, int] = {swap: max_changes}
    if len(router.codes) > 2:
        proposals[exchange_predictors] = max_changes
    for index in range(num_rounds):
        start = choices
        mine = [batches[(index * batches_per_round + i) % len(batches)] for i in range(batches_per_round)]
        measured = [module.effects(batch, choices) for batch in mine]
        best = float(torch.cat([errors for errors, _ in measured]).clamp_min(1e-30).log().mean())
        effects = torch.stack([effects for _, effects in measured]).mean(0)
        for propose, num_changes in proposals.items():
            frozen = torch.zeros_like(choices, dtype=torch.bool)
            for _ in range(trials_per_round):
                candidate = propose(choices, effects, frozen, num_changes)
                changed = candidate != choices
                if not changed.any():
                    break
                error = log_error(module, mine, candidate)
                accepted = error < best
                if accepted:
                    choices, best = candidate, error
                if accepted or num_changes == 1:
                    frozen |= changed  # what has been tried; measured effects say nothing about trying it back
                else:
                    num_changes //= 2
            proposals[propose] = min(max_changes, 2 * num_changes)
        report(index, math.exp(best), int((choices != start).sum()))
        if torch.equal(choices, start) and batches_per_round >= len(batches):
            break
    return choices


def log_error(module: RouterModule, batches: Sequence[dict[str, Any]], choices: Tensor) -> float:
    """Mean over samples of the logarithm of the final latents' squared error under a hard schedule: as PSNR is judged,
    and not ruled by the few samples with the largest errors."""
    errors = torch.cat([module.rollout_errors(b, choices, module.teacher_latents(b)) for b in batches])
    return float(errors.clamp_min(1e-30).log().mean())


def swap_gates(
    router: Router, choices: Tensor, effects: Tensor, frozen: Tensor, budget: float, num_changes: int
) -> Tensor:
    """Has the `num_changes` reused gates compute that promise most per MAC, then computed ones no longer that cost
    least error per MAC, until the budget is met again."""
    costs = router.marginal_costs(choices).to(effects)
    candidate = choices.clone()
    computed, reused = (choices == 0) & ~frozen, (choices > 0) & ~frozen
    gain = torch.where(reused & (costs > 0), -effects[0] / costs.clamp_min(1e-9), -torch.inf)
    for index in gain.flatten().topk(num_changes).indices:
        if gain.flatten()[index] > 0:
            candidate.view(-1)[index] = 0
    fallback = usual_predictors(router, choices)
    loss = effects.gather(0, fallback[None])[0] / (-costs).clamp_min(1e-9)
    loss = torch.where(computed & (costs < 0), loss, torch.inf)
    for index in loss.flatten().argsort():
        if router.kept(candidate) <= budget or loss.flatten()[index] == torch.inf:
            break
        candidate.view(-1)[index] = fallback.flatten()[index]
    gained = (candidate == 0) & (choices > 0)
    return candidate if gained.any() and router.kept(candidate) <= budget else choices


def usual_predictors(router: Router, choices: Tensor) -> Tensor:
    """Per gate, the predictor [steps, sites] that its site is filled in by most often; the router's where it never
    is."""
    counts = torch.stack([(choices == choice).sum(0) for choice in range(1, len(router.codes))])
    usual = (1 + counts.argmax(0)).expand_as(choices)
    return torch.where(counts.sum(0) > 0, usual, router.best_predictors)


def exchange_predictors(choices: Tensor, effects: Tensor, frozen: Tensor, num_changes: int) -> Tensor:
    """Exchanges the predictors of the `num_changes` reused gates that promise most."""
    best = effects[1:].min(0)
    gain = torch.where((choices > 0) & ~frozen, -best.values, -torch.inf).flatten()
    candidate = choices.clone()
    for index in gain.topk(num_changes).indices:
        if gain[index] > 0:
            candidate.view(-1)[index] = 1 + best.indices.flatten()[index]
    return candidate
