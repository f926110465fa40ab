"""Runs and calls that the table in `robustness.py` has no rows for."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from robustness_actions import when
from robustness_pipelines import arguments, build, run, schedule_for
from tiny_models import NUM_STEPS, TinyPipeline, build_pipeline
from torch import Tensor

from hgc_learn.inference import ScheduleError, apply_schedule


def test_guess_mode_with_a_dead_controlnet(own: TinyPipeline) -> None:
    apply_schedule(own.pipe, own.schedule({"unet.up_blocks.3.attentions.1:out": "CC----"}))
    assert own(guess_mode=True).isfinite().all()


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # of KDPM2
@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_the_steps_to_ask_for_are_named_where_each_has_two_calls(name: str) -> None:
    tiny = build_pipeline("small", scheduler=getattr(diffusers, name)())
    expected = tiny()
    schedule = tiny.schedule()
    assert schedule.num_steps == 2 * NUM_STEPS - 1
    handle = apply_schedule(tiny.pipe, schedule)
    with pytest.raises(ScheduleError, match=f"has 11 steps, this run 7. Call the pipeline with .*={NUM_STEPS}, or"):
        tiny(num_inference_steps=4)
    assert torch.equal(tiny(), expected)  # a run that was refused leaves nothing behind
    assert handle.stats()["steps_run"] == schedule.num_steps


def test_a_controlnet_called_by_itself_is_refused(own: TinyPipeline) -> None:
    apply_schedule(own.pipe, own.schedule())
    own()
    with pytest.raises(ValueError, match=r"remove_schedule\(pipe\) first"):
        own.pipe.controlnet(
            torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 7, 12), controlnet_cond=torch.zeros(1, 3, 16, 16)
        )


def test_nobody_writes_into_what_is_kept() -> None:
    """FreeU scales half of the channels that it is given, in place, in the oracle, too, which runs the same code."""
    pipe = build("StableDiffusionPipeline")
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.4)
    site = "unet.mid_block.resnets.1:out"
    handle = apply_schedule(pipe, schedule_for(pipe, {site: "C" + "-" * (NUM_STEPS - 1)}))
    kept: list[Tensor] = []

    def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        kept.extend(value.clone() for key, value in handle.runtime.cache.values.items() if key == (site, 0))
        return inputs

    run(pipe, callback_on_step_end=callback)
    assert len(kept) == NUM_STEPS - 1
    assert all(torch.equal(value, kept[0]) for value in kept)


def test_three_parts_are_refused_also_where_they_look_like_two() -> None:
    """Two pictures from one noise with PAG: six times the same latents."""
    pipe = build("StableDiffusionControlNetPAGPipeline", pag_applied_layers=["mid"])
    apply_schedule(pipe, schedule_for(pipe, {"unet:guidance": "CC-C-C"}))
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float64).repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="have a third"):
        pipe(**{**arguments(pipe, num_images=2), "latents": latents})


def test_an_offloaded_run_that_stopped_is_not_gone_on_with_by_another_pipeline() -> None:
    pipe = build("StableDiffusionPipeline")
    parts = {**pipe.components, "scheduler": diffusers.EulerDiscreteScheduler(steps_offset=1)}
    other = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    pipe.unet._hf_hook = object()  # as if accelerate copied its arguments
    handle = apply_schedule(pipe, schedule_for(pipe, {"unet.mid_block.resnets.1:out": "C" + "-" * (NUM_STEPS - 1)}))
    run(pipe, **when(2, lambda pipe, tensors: setattr(pipe, "_interrupt", True)))
    assert handle.runtime.is_offloaded
    with pytest.raises(ValueError, match="by another pipeline that"):
        run(other, num_inference_steps=4)
