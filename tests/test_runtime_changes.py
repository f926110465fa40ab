"""What changes in the middle of a run, or between runs: recompute, never serve stale tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionControlNetImg2ImgPipeline
from robustness_actions import when
from robustness_pipelines import arguments, build, run, schedule_for
from tiny_models import NUM_STEPS, TinyPipeline, build_pipeline, random_rows
from torch import Tensor

from hgc_learn.inference import ScheduleError, apply_schedule, remove_schedule

CHANGED_AT = 3  # the step whose inputs differ from those of the step before
REUSE_ALL_BUT = "CC----"
"""After the change at step 3 the refreshed values are reused to the end."""


def held(tiny: TinyPipeline) -> dict[str, str]:
    """Sites in both models, inside and outside of modules, reused over the change."""
    sites = [
        "unet.up_blocks.3.attentions.1.transformer_blocks.0.attn2:out",
        "unet.down_blocks.1.attentions.0:out",
        "unet.mid_block.resnets.0:branch",
        next(s for s in tiny.sites() if s.endswith("controlnet_down_blocks.2:control")),
    ]
    return dict.fromkeys(sites, REUSE_ALL_BUT)


def run_with_cut(tiny: TinyPipeline, cut: Callable[[dict[str, Any]], dict[str, Any]], **kwargs: Any) -> Tensor:
    """Calls the pipeline; after the step before CHANGED_AT, `cut` changes prompt_embeds."""

    def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        return cut(inputs) if step == CHANGED_AT - 1 else inputs

    return tiny(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"], **kwargs)


def other_prompt(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"prompt_embeds": inputs["prompt_embeds"].flip(1)}


def other_prompt_in_place(inputs: dict[str, Any]) -> dict[str, Any]:
    inputs["prompt_embeds"].mul_(-1)
    return inputs


def assert_refreshed(tiny: TinyPipeline, run: Callable[[], Tensor], rows: dict[str, str], at: int = CHANGED_AT) -> None:
    """With `rows` reused over the change, the run must give what it gives if all is computed at the change."""
    plan_that_computes_there = {site: row[:at] + "C" + row[at + 1 :] for site, row in rows.items()}
    apply_schedule(tiny.pipe, tiny.schedule(plan_that_computes_there))
    expected = run()
    handle = apply_schedule(tiny.pipe, tiny.schedule(rows))
    latents = run()
    assert handle.stats()["steps_refreshed"] == 1
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("change", [other_prompt, other_prompt_in_place])
def test_prompt_changed_by_a_callback(own: TinyPipeline, change: Any) -> None:
    assert_refreshed(own, lambda: run_with_cut(own, change), held(own))


def test_guidance_switched_off_by_a_callback(own: TinyPipeline) -> None:
    def run() -> Tensor:
        def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            if step == CHANGED_AT - 1:
                pipe._guidance_scale = 1.0
                inputs = {name: value[-1:] for name, value in inputs.items()}
            return inputs

        latents = own(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds", "image"])
        assert len(latents) == 1
        return latents

    assert_refreshed(own, run, held(own))


def test_control_guidance_end(own: TinyPipeline) -> None:
    assert_refreshed(own, lambda: own(control_guidance_end=0.5), held(own))


@pytest.mark.parametrize("ends", [[0.5, 1.0], [1.0, 0.5]], ids=["first", "second"])
def test_control_guidance_end_of_one_of_two_controlnets(ends: list[float]) -> None:
    """Whichever of them changes: the other one ran, or will run, in the same step."""
    tiny = build_pipeline("sd15", num_controlnets=2)
    image = tiny.arguments()["image"]
    rows = held(tiny) | {"unet.up_blocks.2.resnets.0:out": REUSE_ALL_BUT}
    assert_refreshed(tiny, lambda: tiny(image=[image, image.flip(2)], control_guidance_end=ends), rows)


def test_two_controlnets_follow_a_schedule() -> None:
    tiny = build_pipeline("sd15", num_controlnets=2)
    image = tiny.arguments()["image"]
    arguments = {"image": [image, image.flip(2)], "controlnet_conditioning_scale": [0.5, 1.5]}
    expected = tiny(**arguments)
    handle = apply_schedule(tiny.pipe, tiny.schedule())
    assert torch.equal(tiny(**arguments), expected)
    handle = apply_schedule(tiny.pipe, tiny.schedule(random_rows(tiny.sites(), random.Random(0), num_sites=20)))
    first = tiny(**arguments)
    assert torch.equal(tiny(**arguments), first)
    assert not torch.equal(first, expected)
    assert handle.stats()["steps_refreshed"] == 0
    remove_schedule(tiny.pipe)
    assert torch.equal(tiny(**arguments), expected)


def test_guess_mode(tiny: TinyPipeline) -> None:
    """The ControlNet runs the guided half only; the pipeline pads its residuals with zeros."""
    expected = tiny(guess_mode=True)
    apply_schedule(tiny.pipe, tiny.schedule())
    assert torch.equal(tiny(guess_mode=True), expected)
    handle = apply_schedule(tiny.pipe, tiny.schedule(random_rows(tiny.sites(), random.Random(1))))
    first = tiny(guess_mode=True)
    assert torch.equal(tiny(guess_mode=True), first)
    assert handle.stats()["steps_refreshed"] == 0


def test_guess_mode_with_a_dead_controlnet(own: TinyPipeline) -> None:
    apply_schedule(own.pipe, own.schedule({"unet.up_blocks.3.attentions.1:out": REUSE_ALL_BUT}))
    assert own(guess_mode=True).isfinite().all()


def test_exception_in_mid_run_then_again(own: TinyPipeline) -> None:
    apply_schedule(own.pipe, own.schedule(held(own)))
    expected = own()

    class Stop(Exception):
        pass

    def stop(inputs: dict[str, Any]) -> dict[str, Any]:
        raise Stop

    with pytest.raises(Stop):
        run_with_cut(own, stop)
    assert torch.equal(own(), expected)

    # between the ControlNet and the UNet of one step
    hook = own.pipe.unet.conv_in.register_forward_pre_hook(lambda *_: stop({}))
    with pytest.raises(Stop):
        own()
    hook.remove()
    assert torch.equal(own(), expected)


def test_other_resolution_and_batch_size_between_calls(own: TinyPipeline) -> None:
    rows = held(own)
    plain = own()
    apply_schedule(own.pipe, own.schedule(rows))
    expected = own()
    large = {"height": 24, "width": 32, "image": torch.rand(1, 3, 24, 32)}
    assert own(**large).shape == (1, 4, 12, 16)
    assert torch.equal(own(), expected)
    three = own(**own.arguments(num_images=3))
    assert three.shape == (3, 4, 8, 8)
    assert torch.equal(own(), expected)
    remove_schedule(own.pipe)
    assert torch.equal(own(), plain)


def test_image_to_image_starts_inside_the_schedule(own: TinyPipeline) -> None:
    """It begins at a later step, computes everything there, then follows the rows of the steps it visits."""
    pipe = StableDiffusionControlNetImg2ImgPipeline(**own.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        arguments = own.arguments()
        return pipe(**arguments, control_image=arguments["image"], strength=0.5).images

    expected = run()
    apply_schedule(pipe, own.schedule())
    assert torch.equal(run(), expected)
    assert_refreshed(TinyPipeline(own.shape, pipe), run, held(own), at=NUM_STEPS - int(NUM_STEPS * 0.5))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_inference_steps": 4}, "num_inference_steps: the schedule has 6 steps, this run 4"),
        ({"timesteps": [900, 700, 500, 300, 200, 100]}, "timesteps: this run visits 900, 700, 500"),
    ],
)
def test_runs_that_do_not_fit_are_refused(kwargs: dict[str, Any], message: str) -> None:
    from diffusers import EulerDiscreteScheduler

    tiny = build_pipeline("sd15", scheduler=EulerDiscreteScheduler())
    expected = tiny()
    apply_schedule(tiny.pipe, tiny.schedule())
    with pytest.raises(ScheduleError, match=message):
        tiny(**kwargs)
    assert torch.equal(tiny(), expected)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # of KDPM2
@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_the_steps_to_ask_for_are_named_where_each_has_two_calls(name: str) -> None:
    tiny = build_pipeline("small", scheduler=getattr(diffusers, name)())
    schedule = tiny.schedule()
    assert schedule.num_inference_steps == 2 * NUM_STEPS - 1
    apply_schedule(tiny.pipe, schedule)
    with pytest.raises(ScheduleError, match=f"has 11 steps, this run 7. Call the pipeline with .*={NUM_STEPS}, or"):
        tiny(num_inference_steps=4)
    tiny()


def test_another_scheduler_is_refused_by_name(own: TinyPipeline) -> None:
    schedule = own.schedule(scheduler="UniPCMultistepScheduler")
    apply_schedule(own.pipe, schedule)
    with pytest.raises(ScheduleError, match="made for UniPCMultistepScheduler, the pipeline has DDIMScheduler"):
        own()


def test_calls_outside_the_pipeline_are_refused(own: TinyPipeline) -> None:
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
    with pytest.raises(ValueError, match="have a third part"):
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
