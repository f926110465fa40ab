"""What would fail on a GPU alone, where there is none: tensors on two devices, generators of the other one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_accelerator import PretendTensor, move, pretend_accelerator
from tiny_models import build_pipeline
from training_fixtures import BUDGET, SAMPLING, learn

from hgc_learn.calibration import site_statistics
from hgc_learn.evaluation import closeness, side_by_side
from hgc_learn.inference import apply_schedule
from hgc_learn.objectives import DEFAULT_SITES, L2C, HarmoniCa, Objective, Rollout
from hgc_learn.rollouts import mean_psnr
from hgc_learn.setting import Draft, Setting
from hgc_learn.training.module import RouterModule


def on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: values.to(device) if isinstance(values, torch.Tensor) else values for name, values in batch.items()}


@contextmanager
def on_accelerator(teacher: Path, objective: Objective, batch: dict[str, Any]) -> Iterator[tuple[RouterModule, Any]]:
    """A module and a batch that are there."""
    sites = [*DEFAULT_SITES, "unet:guidance"] if isinstance(objective, Rollout) else None
    module = RouterModule(str(teacher), SAMPLING, budgets=[0.7], sites=sites, objective=objective)
    with pretend_accelerator() as device:
        move(module, device)
        move(module.pipe, device)
        yield module, on(device, batch)


def test_tensors_of_two_devices_are_refused() -> None:
    with pretend_accelerator() as device:
        there = torch.ones(3, device=device)
        assert there.device == device
        assert (2 * there).sum().item() == 6
        with pytest.raises(RuntimeError, match="on two devices"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="generator of another device"):
            torch.rand(3, device=device, generator=torch.Generator())


def test_a_router_learns_and_is_exported(teacher: Path, batch: dict[str, Any]) -> None:
    with on_accelerator(teacher, Rollout(), batch) as (module, there):
        assert isinstance(module.router.logits.data, PretendTensor)
        for samples in (there, batch):  # an export's stay on the CPU
            module.kept_latents.clear()
            learn(module, samples)
        soft, _ = module.router.sample(BUDGET, torch.Generator(module.device))
        assert module.rollout_errors(there, soft).isfinite().all()


@pytest.mark.parametrize("objective", [L2C(intervals=[2]), HarmoniCa()], ids=["l2c", "harmonica"])
def test_other_objectives_follow_their_trajectories(teacher: Path, batch: dict[str, Any], objective: Any) -> None:
    with on_accelerator(teacher, objective, batch) as (module, batch):
        if isinstance(objective, HarmoniCa):
            objective.measure_weights(module, [batch])
            betas = torch.sigmoid(module.router.logits)

            def visit_step(step: int) -> torch.Tensor:
                return objective.forwards.full(keep=True) if step == 0 else objective.forwards.blend(betas[step])

            assert objective.forwards.follow(SAMPLING, batch, visit_step).isfinite().all()
        assert module.rollout_errors(batch, module.gates(0.7)).isfinite().all()


def test_a_schedule_gives_what_it_gives_on_the_cpu() -> None:
    tiny = build_pipeline("sd15")
    rows = {"unet.up_blocks.1.resnets.0:out": "C-C1C-", "unet:guidance": "CC-CCC", "unet:eps": "CCCC-C"}
    schedule = tiny.schedule(rows)
    with apply_schedule(tiny.pipe, schedule):
        expected = tiny()
    with pretend_accelerator() as device:
        move(tiny.pipe, device)
        with apply_schedule(tiny.pipe, schedule):
            found = tiny()
        assert isinstance(found, PretendTensor)
    assert (found.inner - expected).norm() < 1e-3 * expected.norm()


def test_policies_measure_and_pictures_are_compared(teacher: Path, batch: dict[str, Any]) -> None:
    with on_accelerator(teacher, Rollout(), batch) as (module, _):
        setting = Setting.of_pipeline(module.pipe, SAMPLING, [batch])
        assert site_statistics(setting, ["unet:eps"])["unet:eps"].change().isfinite().all()
        draft = Draft({"unet:eps": "C-C-C"})
        assert 0 < mean_psnr(setting, draft) < 120
        schedule = setting.schedule(draft, policy="by_hand", settings={})
        full, cached, _ = side_by_side(module.pipe, SAMPLING, schedule, [batch])
        assert ((closeness(cached, full)["psnr_db"] > 0) & (closeness(cached, full)["psnr_db"] < 120)).all()
        assert not isinstance(cached.pictures, PretendTensor)
