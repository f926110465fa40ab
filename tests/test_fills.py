"""Learning how a schedule fills in what it skips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from training_fixtures import random_schedule

from hgc_learn import fills
from hgc_learn.fills import as_tuned, tune_fills
from hgc_learn.setting import Draft
from hgc_learn.training import RouterModule


@pytest.fixture
def draft(module: RouterModule) -> Draft:
    schedule = random_schedule(module, 0.8, seed=5)
    dead = module.router.dead(schedule.compute)
    return module.draft(replace(schedule, compute=schedule.compute | dead))


def log_error(module: RouterModule, batch: dict[str, Any], draft: Draft) -> float:
    error = module.rollout(batch, draft) - module.teacher_latents(batch)
    return float(error.square().flatten(1).mean(1).log().mean())


def test_tuned_begins_with_what_the_draft_does(module: RouterModule, batch: dict[str, Any], draft: Draft) -> None:
    start = as_tuned(module, draft)
    codes = set("".join(draft.sites.values()))
    assert len(codes) > 2
    assert set("".join(start.sites.values())) == {"C", "t"}
    torch.testing.assert_close(module.rollout(batch, start), module.rollout(batch, draft), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_learning_lowers_the_error(
    module: RouterModule,
    batch: dict[str, Any],
    draft: Draft,
    gradient_checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(module.hparams, "gradient_checkpointing", gradient_checkpointing)
    seen: list[float] = []
    tuned = tune_fills(module, draft, [batch], 40, report=lambda update, error: seen.append(error))
    assert len(seen) == 40
    assert log_error(module, batch, tuned) < log_error(module, batch, draft) - 0.1
    start = as_tuned(module, draft)
    assert tuned.sites == start.sites
    assert all((tuned.tensors[name] != tensor).any() for name, tensor in start.tensors.items() if "scale" in name)
    assert module.setting.kept(tuned) == module.setting.kept(draft)
    if gradient_checkpointing:
        monkeypatch.setitem(module.hparams, "gradient_checkpointing", False)
        other = tune_fills(module, draft, [batch], 40)
        for name, tensor in tuned.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-4, atol=1e-5)


def test_what_other_samples_do_not_confirm_is_left(
    module: RouterModule, batch: dict[str, Any], draft: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fills, "LEARNING_RATES", {"scale": 10.0, "reach": 10.0})
    assert tune_fills(module, draft, [batch], 2) is draft


def test_nothing_to_learn(module: RouterModule, batch: dict[str, Any], draft: Draft) -> None:
    full = Draft({"unet:eps": "C" * module.num_steps})
    assert tune_fills(module, full, [batch], 2) is full
    assert tune_fills(module, draft, [], 0) is draft
