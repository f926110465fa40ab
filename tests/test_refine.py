"""Joint changes, and refining by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_fixtures import BUDGET, random_schedule

from hgc_learn.data import SceneDataModule
from hgc_learn.export import refining_batches
from hgc_learn.hard import HardSchedule
from hgc_learn.quadratic import QuadraticModel
from hgc_learn.refine import Refiner, log_error, usual_weights
from hgc_learn.training import RouterModule


def test_quadratic_model_predicts_joint_changes(module: RouterModule, batch: dict[str, Any]) -> None:
    """Several flips at once: better than the sum of what each does alone."""
    schedule = random_schedule(module, 0.99, seed=2)
    module.generator = torch.Generator().manual_seed(0)
    effects = module.effects(batch, schedule, num_directions=24)
    model = QuadraticModel(module.router, schedule, effects)
    target = module.teacher_latents(batch)
    error = module.rollout_errors(batch, schedule, target)
    live = (effects.flips[0].abs().mean(0) > 0).flatten().nonzero().flatten()
    joint, alone, actual = [], [], []
    for seed in range(12):
        order = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))
        flipped = torch.zeros_like(model.costs, dtype=torch.bool)
        flipped[live[order[:4]]] = True
        joint.append(model._expected(flipped)[0].log().mean())
        alone.append(effects.of_each_flip().flatten()[flipped].sum())
        after = HardSchedule(schedule.compute ^ flipped.view_as(schedule.compute), schedule.weights)
        actual.append((module.rollout_errors(batch, after, target) / error).log().mean().double())
    truth = torch.stack(actual)
    assert (torch.stack(joint) - truth).abs().mean() < (torch.stack(alone) - truth).abs().mean()
    assert torch.corrcoef(torch.stack([torch.stack(joint), truth]))[0, 1] > 0.9


def test_weights_are_moved_where_they_lower_the_error(module: RouterModule, batch: dict[str, Any]) -> None:
    schedule = random_schedule(module, 0.8, seed=5)
    module.generator = torch.Generator().manual_seed(0)
    effects = module.effects(batch, schedule, num_directions=8)
    model = QuadraticModel(module.router, schedule, effects)
    better = model.moved(damping=1.0)
    assert torch.equal(better.compute, schedule.compute)
    moved = (better.weights != schedule.weights).any(0)
    assert moved.any()
    assert not (moved & schedule.compute).any()
    assert log_error(module, [batch], better) < log_error(module, [batch], schedule)
    step = [(model.moved(damping).weights - schedule.weights).abs().sum() for damping in (1.0, 10.0, 1e4)]
    assert step[0] > step[1] > 50 * step[2]


def test_refining_lowers_the_error_within_the_budget(module: RouterModule, batch: dict[str, Any]) -> None:
    module.generator = torch.Generator().manual_seed(1)
    schedule = module.router.threshold(BUDGET)
    before = log_error(module, [batch], schedule)
    refiner = Refiner(module, [batch], schedule, BUDGET, max_swaps=16)
    flips = 0
    for _ in range(2):
        start = refiner.schedule
        refiner.round()
        flips += int((start.compute != refiner.schedule.compute).sum())
        assert module.router.kept(refiner.schedule.compute) <= BUDGET
    assert flips > 0
    assert (refiner.schedule.weights != schedule.weights).any()
    assert log_error(module, [batch], refiner.schedule) == pytest.approx(refiner.log_error)
    assert refiner.log_error < before


def test_gates_get_the_usual_weights_of_their_site() -> None:
    filled_in = torch.tensor([[False, False], [True, False], [False, False], [True, False]])
    weights = torch.stack([torch.arange(8.0).view(4, 2), torch.zeros(4, 2)])
    usual = usual_weights(HardSchedule(~filled_in, weights), filled_in)
    assert usual[0].tolist() == [[4, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "message"), [(0, 2, "refine_samples is 0"), (4, -1, "refine_batch_size is -1")]
)
def test_no_samples_to_refine_on_is_refused(
    shared_module: RouterModule, num_samples: int, batch_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"{message}; it must be at least 1"):
        refining_batches(shared_module, SceneDataModule(num_train=4, num_val=2), num_samples, batch_size)
