"""Scheduled pipelines: what they give, and that they leave no trace."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import GUIDANCE_SCALE, NUM_STEPS, TinyPipeline, build_pipeline, random_rows

from hgc_learn.inference import apply_schedule, remove_schedule


def some_rows(tiny: TinyPipeline) -> dict[str, str]:
    return random_rows(tiny.sites(), random.Random(0))


def forwards_of(tiny: TinyPipeline) -> list[bool]:
    return ["forward" in model.__dict__ for model in (tiny.pipe.unet, tiny.pipe.controlnet)]


def test_all_compute_is_bit_identical(tiny: TinyPipeline) -> None:
    expected = tiny()
    sites = tiny.sites()
    apply_schedule(tiny.pipe, tiny.schedule())
    assert torch.equal(tiny(), expected)
    apply_schedule(tiny.pipe, tiny.schedule(dict.fromkeys(sites, "C" * NUM_STEPS)))
    assert torch.equal(tiny(), expected)


def test_context_manager_removes_also_after_an_exception(own: TinyPipeline) -> None:
    expected = own()
    with pytest.raises(KeyError), apply_schedule(own.pipe, own.schedule(some_rows(own))):
        raise KeyError
    assert forwards_of(own) == [False, False]
    assert torch.equal(own(), expected)


def test_removal_gives_back_what_offload_hooks_leave(own: TinyPipeline) -> None:
    """When accelerate takes them away, a bound method stays in the instance."""
    own.pipe.unet.forward = forward = own.pipe.unet.forward
    expected = own()
    with apply_schedule(own.pipe, own.schedule()):
        own()
    assert own.pipe.unet.__dict__["forward"] is forward
    assert torch.equal(own(), expected)


def test_reusing_the_prediction_runs_nothing(own: TinyPipeline) -> None:
    """All steps but the first reuse `eps`: the models' submodules run once."""
    calls = []
    hook = own.pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    apply_schedule(own.pipe, own.schedule({"unet:eps": "C" + "-" * (NUM_STEPS - 1)}))
    own()
    hook.remove()
    assert len(calls) == 1


def test_stats(own: TinyPipeline) -> None:
    row = "C-" * (NUM_STEPS // 2)
    handle = apply_schedule(own.pipe, own.schedule({"unet:eps": row}))
    stats = handle.stats()
    assert stats["macs_cached"] * 2 == stats["macs_full"]
    assert stats["macs_reduction"] == stats["macs_reduction_attention"] == 0.5
    assert stats["macs_full_attention"] > stats["macs_full"]
    assert stats["cache_bytes"] == 2 * 4 * 8 * 8 * 4  # two samples of 4 channels, 8x8, float32
    assert stats["steps_run"] == 0
    own()
    handle.remove()  # as on leaving a `with`
    assert handle.stats()["steps_run"] == NUM_STEPS
    assert handle.stats()["steps_refreshed"] == 0


def test_deepcopy_of_a_scheduled_pipeline(own: TinyPipeline) -> None:
    apply_schedule(own.pipe, own.schedule(some_rows(own)))
    expected = own()
    twin = TinyPipeline(own.shape, copy.deepcopy(own.pipe))
    with torch.no_grad():
        for parameter in own.pipe.unet.parameters():
            parameter.zero_()  # the twin must not use the original's modules
    assert torch.equal(twin(), expected)
    remove_schedule(own.pipe)
    assert torch.equal(twin(), expected)
    remove_schedule(twin.pipe)
    assert forwards_of(twin) == [False, False]


def test_what_was_applied_stays_where_another_is_refused(own: TinyPipeline) -> None:
    handle = apply_schedule(own.pipe, own.schedule(some_rows(own)))
    expected = own()
    other = build_pipeline("sd15")
    apply_schedule(other.pipe, other.schedule())
    controlnet, own.pipe.controlnet = own.pipe.controlnet, other.pipe.controlnet
    with pytest.raises(ValueError, match="controlnet is shared with a pipeline that has a schedule"):
        apply_schedule(own.pipe, own.schedule())
    own.pipe.controlnet = controlnet
    assert torch.equal(own(), expected)
    assert handle.stats()["steps_run"] == NUM_STEPS


def test_a_schedule_is_removed_where_the_unet_is_gone(own: TinyPipeline) -> None:
    apply_schedule(own.pipe, own.schedule())
    own.pipe.unet = None
    remove_schedule(own.pipe)
    assert forwards_of(build_pipeline("sd15")) == [False, False]
    assert "forward" not in own.pipe.controlnet.__dict__


def test_a_run_that_changes_at_every_step_is_told(own: TinyPipeline) -> None:
    def copies(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"].clone()}

    handle = apply_schedule(own.pipe, own.schedule({"unet:eps": "C" + "-" * (NUM_STEPS - 1)}))
    with pytest.warns(UserWarning, match="5 of this run's 6 steps were computed in full, because what the models"):
        own(callback_on_step_end=copies, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert handle.stats()["steps_refreshed"] == NUM_STEPS - 1


def test_accelerate_offload_hooks_before_and_after(own: TinyPipeline) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    models = (own.pipe.unet, own.pipe.controlnet)
    plain = own()
    schedule = own.schedule(some_rows(own))
    with apply_schedule(own.pipe, schedule):
        scheduled = own()
        for model in models:
            add_hook_to_module(model, ModelHook())
        assert torch.equal(own(), scheduled)
    assert torch.equal(own(), plain)

    with apply_schedule(own.pipe, schedule):  # the hooks are still there
        assert torch.equal(own(), scheduled)
        for model in models:
            remove_hook_from_module(model)
        assert torch.equal(own(), scheduled)
    assert torch.equal(own(), plain)


def test_half_precision_keeps_its_type(own: TinyPipeline) -> None:
    own.pipe.to(torch.bfloat16)
    expected = own()
    apply_schedule(own.pipe, own.schedule())
    assert torch.equal(own(), expected)
    apply_schedule(own.pipe, own.schedule(some_rows(own)))
    latents = own()
    assert latents.dtype == torch.bfloat16
    assert latents.isfinite().all()


@pytest.mark.parametrize("number", [0, 1.5])
def test_steps_at_once_are_whole_and_no_fault_of_the_schedule(own: TinyPipeline, number: Any) -> None:
    with pytest.raises(ValueError, match=f"^max_steps_at_once is {number}; it must be at least 1"):
        apply_schedule(own.pipe, own.schedule(), max_steps_at_once=number)


def test_another_weight_of_the_controlnet_is_told(own: TinyPipeline) -> None:
    sampling = {"controlnet_conditioning_scale": 1.0}
    schedule = replace(own.schedule(some_rows(own)), producer={"settings": {"sampling": sampling}})
    apply_schedule(own.pipe, schedule)
    own()
    for call, scale in (({"controlnet_conditioning_scale": 0.3}, "0.3"), ({"control_guidance_end": 0.5}, "0.0")):
        message = f"controlnet_conditioning_scale is {scale}, the schedule was made for 1.0: its measured quality"
        with pytest.warns(UserWarning, match=message):
            own(**call)


def test_a_guidance_scale_other_than_the_schedules_is_told(own: TinyPipeline) -> None:
    apply_schedule(own.pipe, own.schedule())
    with pytest.warns(UserWarning, match="guidance_scale is 2.0, the schedule was made for 5.0"):
        own(guidance_scale=2.0)
    assert GUIDANCE_SCALE == 5.0
