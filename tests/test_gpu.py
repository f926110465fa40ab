"""On a real GPU: what `test_accelerator.py` cannot pretend. `pytest -m gpu`; skipped where there is none."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NUM_STEPS, SHAPES, TinyPipeline, build_pipeline, random_rows
from training_fixtures import BUDGET, SAMPLING, learn

from hgc_learn.evaluation import closeness, side_by_side
from hgc_learn.inference import apply_exact_savings, apply_schedule, remove_schedule
from hgc_learn.objectives import DEFAULT_SITES, Rollout
from hgc_learn.training.module import RouterModule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
ROWS = {"unet.up_blocks.1.resnets.0:out": "C-C-C-", "unet:guidance": "CC-CC-", "unet:eps": "CCCC-C"}
SYNCS_PER_RUN = 4
"""A run's timesteps and the halves of its first batch are read once."""


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """As on the CPU: not rounded to TF32, and the same in every run."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def on_gpu(shape: str, dtype: torch.dtype = torch.float32) -> TinyPipeline:
    tiny = build_pipeline(shape)
    tiny.pipe.to("cuda", dtype)
    return tiny


def call(tiny: TinyPipeline, **kwargs: Any) -> torch.Tensor:
    dtype = tiny.pipe.unet.dtype
    arguments = {
        name: value.to("cuda", dtype) if isinstance(value, torch.Tensor) and name != "image" else value
        for name, value in tiny.arguments().items()
    }
    return tiny.pipe(**{**arguments, **kwargs}).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_schedule_that_computes_everything_changes_no_bit(shape: str, dtype: torch.dtype) -> None:
    tiny = on_gpu(shape, dtype)
    expected = call(tiny)
    assert torch.equal(call(tiny), expected)
    apply_schedule(tiny.pipe, tiny.schedule())
    assert torch.equal(call(tiny), expected)
    remove_schedule(tiny.pipe)
    apply_exact_savings(tiny.pipe)
    assert torch.equal(call(tiny), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_schedule_gives_what_it_gives_on_the_cpu(shape: str) -> None:
    tiny = build_pipeline(shape)
    schedule = tiny.schedule(random_rows(tiny.sites(), random.Random(0)))
    with apply_schedule(tiny.pipe, schedule):
        expected = tiny()
    tiny.pipe.to("cuda")
    with apply_schedule(tiny.pipe, schedule):
        found = call(tiny).cpu()
    assert (found - expected).norm() < 1e-3 * expected.norm()


def num_syncs(action: Callable[[], object]) -> int:
    """How often the host waits for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_step_waits_for_the_device(shape: str) -> None:
    tiny = on_gpu(shape)
    call(tiny)
    of_plain = num_syncs(lambda: call(tiny))
    handle = apply_schedule(tiny.pipe, tiny.schedule(ROWS))
    call(tiny)  # coefficients are moved to the device once
    of_schedule = num_syncs(lambda: call(tiny))
    assert handle.stats()["steps_run"] == NUM_STEPS
    assert of_schedule <= of_plain + SYNCS_PER_RUN


def test_a_router_learns_and_is_exported(teacher: Path, batch: dict[str, Any]) -> None:
    sites = [*DEFAULT_SITES, "unet:guidance"]
    module = RouterModule(str(teacher), SAMPLING, budgets=[BUDGET], sites=sites, objective=Rollout()).to("cuda")
    module.pipe.to("cuda")
    batch = {name: v.to("cuda") if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    draft = learn(module, batch)
    schedule = module.setting.schedule(draft, policy="learned", settings={})
    full, cached, _ = side_by_side(module.pipe, SAMPLING, schedule, [batch])
    psnr = closeness(cached, full)["psnr_db"]
    assert ((psnr > 0) & (psnr < 120)).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_programs_give_the_same() -> None:
    tiny = on_gpu("small")
    handle = apply_schedule(tiny.pipe, tiny.schedule(ROWS))
    eager = call(tiny)
    handle.compile(fullgraph=True)
    assert (call(tiny) - eager).norm() < 1e-3 * eager.norm()
