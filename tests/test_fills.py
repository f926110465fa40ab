"""Learning how a schedule fills in what it skips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from training_fixtures import random_gates

from hgc_learn.export import fills
from hgc_learn.export.fills import learn_fills, per_channel
from hgc_learn.setting import Draft
from hgc_learn.training.gates import Gates
from hgc_learn.training.module import RouterModule

NUM_UPDATES = 24


@pytest.fixture
def gates(module: RouterModule) -> Gates:
    gates = random_gates(module, 0.8, seed=5)
    return replace(gates, compute=gates.compute | module.router.dead(gates.compute))


def test_tuned_begins_with_what_the_schedule_does(module: RouterModule, batch: dict[str, Any], gates: Gates) -> None:
    start, draft = per_channel(module, gates), module.draft(gates)
    assert len(set("".join(draft.sites.values()))) > 2
    assert set("".join(start.sites.values())) == {"C", "t"}
    torch.testing.assert_close(module.rollout(batch, start), module.rollout(batch, draft), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_learning_lowers_the_error(
    module: RouterModule,
    batch: dict[str, Any],
    gates: Gates,
    gradient_checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(module.hparams, "gradient_checkpointing", gradient_checkpointing)
    seen: list[float] = []
    one_by_one: list[float] = []
    after = learn_fills(module, gates, [batch], NUM_UPDATES, on_update=lambda part, i, error: seen.append(error))
    assert len(seen) == NUM_UPDATES
    learn_fills(module, gates, [batch], 3, at_once=1, on_update=lambda part, i, error: one_by_one.append(error))
    assert one_by_one == pytest.approx(seen[:3], rel=1e-3)
    assert module.log_error([batch], after) < module.log_error([batch], gates) - 0.05
    start = per_channel(module, gates)
    assert after.sites == start.sites
    assert all((after.tensors[name] != tensor).any() for name, tensor in start.tensors.items() if "scale" in name)
    assert module.setting.kept(after) == pytest.approx(module.router.kept(gates.compute))
    if gradient_checkpointing:
        monkeypatch.setitem(module.hparams, "gradient_checkpointing", False)
        other = learn_fills(module, gates, [batch], NUM_UPDATES)
        for name, tensor in after.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], rtol=0, atol=2e-3)  # as many roundings


@pytest.mark.parametrize("learning_rate", [10.0, 1e30])
def test_what_other_samples_do_not_confirm_is_left(
    module: RouterModule,
    batch: dict[str, Any],
    gates: Gates,
    learning_rate: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the second one the trajectory is lost after the first update, and so are gradients."""
    monkeypatch.setattr(fills, "LEARNING_RATES", {"scale": learning_rate, "reach": learning_rate})
    after = learn_fills(module, gates, [batch], 2)
    assert after.sites == module.draft(gates).sites


def test_nothing_to_learn(module: RouterModule, batch: dict[str, Any], gates: Gates) -> None:
    full = Gates.full(*gates.compute.shape)
    assert learn_fills(module, full, [batch], 2) == Draft({})
    assert learn_fills(module, gates, [], 0).sites == module.draft(gates).sites
