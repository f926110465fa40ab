"""Steps that trade places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from training_fixtures import BUDGET

from hgc_learn.hard import HardSchedule
from hgc_learn.reorder import FARTHEST, reorder
from hgc_learn.training import RouterModule


def rows(module: RouterModule) -> list[bytes]:
    """The router's steps, logits and weights."""
    table = torch.cat([module.router.logits.detach(), *module.router.weights.detach()], dim=1)
    return [row.numpy().tobytes() for row in table]


@pytest.fixture
def distinct(module: RouterModule) -> RouterModule:
    """A router whose steps all differ, in weights too."""
    generator = torch.Generator().manual_seed(3)
    module.router.logits.data.copy_(torch.randn(module.router.logits.shape, generator=generator))
    module.router.weights.data[1] += 0.1 * torch.rand(module.router.weights.shape[1:], generator=generator)
    return module


def test_the_error_falls_and_steps_stay_whole(distinct: RouterModule, batch: dict[str, Any]) -> None:
    before, error = rows(distinct), distinct.log_error([batch], distinct.hard_schedule(BUDGET))
    errors: list[float] = []
    reorder(distinct, BUDGET, [batch], 20, report=lambda trial, error: errors.append(error))
    assert sorted(rows(distinct)) == sorted(before)
    assert rows(distinct)[0] == before[0]
    assert rows(distinct) != before
    assert errors == sorted(errors, reverse=True)
    assert len(errors) <= 20
    assert distinct.log_error([batch], distinct.hard_schedule(BUDGET)) == errors[-1] < error


def test_no_pair_is_left_that_would_do_better(distinct: RouterModule, batch: dict[str, Any]) -> None:
    reorder(distinct, BUDGET, [batch], 1000)
    best = distinct.log_errors(batch, distinct.hard_schedule(BUDGET))
    logits, weights = distinct.router.logits.data, distinct.router.weights.data
    num_steps = distinct.router.num_steps
    for step in range(1, num_steps):
        for other in range(step + 1, min(step + FARTHEST + 1, num_steps)):
            swapped = list(range(num_steps))
            swapped[step], swapped[other] = other, step
            distinct.router.logits.data, distinct.router.weights.data = logits[swapped], weights[:, swapped]
            change = distinct.log_errors(batch, distinct.hard_schedule(BUDGET)) - best
            assert change.mean() >= -change.std(correction=0) / len(change) ** 0.5


def test_a_lost_trajectory_is_no_gain(
    distinct: RouterModule, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = distinct.hard_schedule(BUDGET)
    log_errors = RouterModule.log_errors

    def lost(self: RouterModule, batch: dict[str, Any], schedule: HardSchedule) -> Tensor:
        errors = log_errors(self, batch, schedule)
        return errors if torch.equal(schedule.compute, start.compute) else errors * float("nan")

    monkeypatch.setattr(RouterModule, "log_errors", lost)
    before = rows(distinct)
    reorder(distinct, BUDGET, [batch], 20)
    assert rows(distinct) == before


def test_equal_steps_are_not_tried(module: RouterModule, batch: dict[str, Any]) -> None:
    module.router.logits.data.copy_(torch.arange(len(module.router.sites)).expand_as(module.router.logits))
    schedule = module.hard_schedule(1.0)
    assert schedule.compute.all()
    trials: list[int] = []
    reorder(module, 1.0, [batch], 10, report=lambda trial, error: trials.append(trial))
    assert trials == []
