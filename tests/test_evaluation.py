"""Figures of cached against uncached pictures are of the right pair, the right way round."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_fixtures import SAMPLING

from hgc_learn.demo import journey
from hgc_learn.demo.scenes import SceneDataset
from hgc_learn.evaluation import side_by_side
from hgc_learn.inference import apply_schedule
from hgc_learn.sampling import generate
from hgc_learn.schedule import HGCSchedule
from hgc_learn.setting import Draft
from hgc_learn.training.module import RouterModule

DRAFT = Draft({"unet:eps": "C-C-C"})


def pictures(module: RouterModule, samples: list[dict[str, Any]], schedule: HGCSchedule | None = None) -> Tensor:
    """Made one by one, by the pipeline alone."""
    made = []
    for sample in samples:
        batch = {"text": [sample["text"]], "conditioning_image": sample["conditioning_image"][None]}
        batch["seed"] = [sample["seed"]]
        if schedule is None:
            made.append(generate(module.pipe, SAMPLING, batch, output_type="pt"))
        else:
            with apply_schedule(module.pipe, schedule):
                made.append(generate(module.pipe, SAMPLING, batch, output_type="pt"))
    return torch.cat(made)


def psnr(one: Tensor, other: Tensor) -> float:
    return float((-10 * (one - other).square().flatten(1).mean(1).log10()).mean())


@pytest.fixture
def schedule(module: RouterModule) -> HGCSchedule:
    return module.setting.schedule(DRAFT, policy="by_hand", settings={"budget": 0.6})


def test_the_demonstration_judges_cached_against_uncached_pictures(
    module: RouterModule, schedule: HGCSchedule, tmp_path: Path
) -> None:
    schedule.save(path := tmp_path / "schedule.json")
    summary, shown = journey.judge(path, module.pipe, SAMPLING, 2)
    scenes = SceneDataset("test", 2)
    samples = [scenes[i] for i in range(2)]
    full, cached = pictures(module, samples), pictures(module, samples, schedule)
    assert summary["psnr_db"] == pytest.approx(psnr(cached, full), abs=0.01)
    assert summary["macs_reduction"] == pytest.approx(1 - module.setting.kept(DRAFT))
    torch.testing.assert_close(shown["full"], full, rtol=0, atol=1e-3)
    torch.testing.assert_close(shown["cached"], cached, rtol=0, atol=1e-3)


def test_speed_is_the_full_time_over_the_cached_time(
    module: RouterModule, schedule: HGCSchedule, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks once for every step that computes the UNet's prediction."""
    ticks = 0

    def tick(*_: Any) -> None:
        nonlocal ticks
        ticks += 1

    hook = module.pipe.unet.conv_out.register_forward_hook(tick)
    monkeypatch.setattr(time, "perf_counter", lambda: float(ticks))
    _, _, speedup = side_by_side(module.pipe, SAMPLING, schedule, [batch] * 3)
    hook.remove()
    assert speedup == 5 / 3
