"""Steps that change places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from training_fixtures import BUDGET

from hgc_learn.export.reorder import FARTHEST, moves, reorder
from hgc_learn.setting import Draft
from hgc_learn.training.gates import Gates
from hgc_learn.training.module import RouterModule


def rows(module: RouterModule) -> list[bytes]:
    """The router's steps, logits and reaches."""
    table = torch.cat([module.router.logits.detach(), module.router.reach.detach()], dim=1)
    return [row.numpy().tobytes() for row in table]


@pytest.fixture
def distinct(module: RouterModule) -> RouterModule:
    """A router whose steps all differ, in reaches too."""
    generator = torch.Generator().manual_seed(3)
    module.router.logits.data.copy_(torch.randn(module.router.logits.shape, generator=generator))
    module.router.reach.data.copy_(0.1 * torch.rand(module.router.reach.shape, generator=generator))
    return module


def test_moves_are_orders_that_keep_the_first_step_and_go_no_farther_than_they_may() -> None:
    orders = moves(9)
    assert len(set(map(tuple, orders))) == len(orders)
    for order in orders:
        assert sorted(order) == [*range(9)]
        assert order[0] == 0
        assert 0 < max(abs(step - place) for place, step in enumerate(order)) <= FARTHEST
    neighbours = [0, 1, 3, 2, 4, 5, 6, 7, 8]
    later = [0, 2, 3, 4, 1, 5, 6, 7, 8]
    assert neighbours in orders
    assert later in orders
    assert moves(2) == []


def test_the_error_falls_and_steps_stay_whole(distinct: RouterModule, batch: dict[str, Any]) -> None:
    before, error = rows(distinct), distinct.log_error([batch], distinct.gates(BUDGET))
    errors: list[float] = []
    reorder(distinct, BUDGET, [batch], 20, on_update=lambda part, trial, error: errors.append(error))
    assert sorted(rows(distinct)) == sorted(before)
    assert rows(distinct)[0] == before[0]
    assert rows(distinct) != before
    assert errors == sorted(errors, reverse=True)
    assert len(errors) <= 20
    assert distinct.log_error([batch], distinct.gates(BUDGET)) == pytest.approx(errors[-1])
    assert errors[-1] < error


def test_no_move_is_left_that_would_do_better(distinct: RouterModule, batch: dict[str, Any]) -> None:
    def log_errors() -> Tensor:
        return distinct.rollout_errors(batch, distinct.gates(BUDGET)).log()

    reorder(distinct, BUDGET, [batch], 1000)
    best, router = log_errors(), distinct.router
    logits, reach = router.logits.data, router.reach.data
    for order in moves(router.num_steps):
        router.logits.data, router.reach.data = logits[order], reach[order]
        change = log_errors() - best
        assert change.mean() >= -2 * change.std(correction=0) / len(change) ** 0.5


def test_a_lost_trajectory_is_no_gain(
    distinct: RouterModule, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = distinct.gates(BUDGET)
    rollout_errors = RouterModule.rollout_errors

    def lost(self: RouterModule, batch: dict[str, Any], gates: Gates | Draft) -> Tensor:
        errors = rollout_errors(self, batch, gates)
        return errors if torch.equal(gates.compute, start.compute) else errors * float("nan")  # type: ignore[union-attr]

    monkeypatch.setattr(RouterModule, "rollout_errors", lost)
    before = rows(distinct)
    reorder(distinct, BUDGET, [batch], 20)
    assert rows(distinct) == before


@pytest.mark.parametrize("sign", [1, -1])
def test_what_other_samples_do_not_confirm_is_undone(
    distinct: RouterModule, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch, sign: int
) -> None:
    start = distinct.gates(BUDGET)

    def judged(batches: Any, gates: Gates) -> float:
        """The worse (or the better) the further it is from where it started."""
        return sign * float((gates.compute != start.compute).sum())

    monkeypatch.setattr(distinct, "log_error", judged)
    before = rows(distinct)
    reorder(distinct, BUDGET, [batch], 20)
    assert (rows(distinct) == before) == (sign == 1)


def test_equal_steps_are_not_tried(module: RouterModule, batch: dict[str, Any]) -> None:
    module.router.logits.data.copy_(torch.arange(len(module.router.sites)).expand_as(module.router.logits))
    assert module.gates(1.0).compute.all()
    trials: list[int] = []
    reorder(module, 1.0, [batch], 10, on_update=lambda part, trial, error: trials.append(trial))
    assert trials == []
