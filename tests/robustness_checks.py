"""Rows of the table in `robustness.py` that calling one pipeline and comparing with the oracle does not prove."""

from __future__ import annotations

import copy
import inspect
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import CrossFrameAttnProcessor
from oracle import by_definition
from robustness_actions import MIDDLE, freeu, when
from robustness_adapters import load_lora, mid_lora
from robustness_pipelines import arguments, assert_close, build, run, schedule_for, schedules
from tiny_models import NUM_STEPS

from hgc_learn.inference import apply_schedule, remove_schedule


def resampled(num_steps: int) -> None:
    """Each step does what the schedule does at the nearest timestep, and a warning says so."""
    pipe = build()
    rows = schedules(pipe)[1]
    schedule = schedule_for(pipe, rows)
    usual, plain = run(pipe, num_inference_steps=num_steps), run(pipe)
    pipe.scheduler.set_timesteps(num_steps)
    nearest = [min(range(NUM_STEPS), key=lambda i: abs(schedule.timesteps[i] - t)) for t in pipe.scheduler.timesteps]
    rows_there = {site: "C" + "".join(row[i] for i in nearest[1:]) for site, row in rows.items()}
    with by_definition(pipe, rows_there):
        expected = run(pipe, num_inference_steps=num_steps)
    with by_definition(pipe, rows):
        expected_at_its_own = run(pipe)
    apply_schedule(pipe, schedule, resample=True)
    with pytest.warns(UserWarning, match=f"this run visits {num_steps}.*made for {NUM_STEPS}.*It is resampled"):
        assert_close(run(pipe, num_inference_steps=num_steps), expected)
    assert_close(run(pipe), expected_at_its_own)  # without a warning
    remove_schedule(pipe)
    assert torch.equal(run(pipe, num_inference_steps=num_steps), usual)
    assert torch.equal(run(pipe), plain)


def resampled_to_other_settings() -> None:
    """The rows are run as they are, and a warning says what is not the same."""
    pipe = build()
    rows = schedules(pipe)[1]
    schedule = schedule_for(pipe, rows)
    pipe.scheduler = build(scheduler_config={"beta_end": 0.012}).scheduler
    with by_definition(pipe, rows):
        expected = run(pipe)
    apply_schedule(pipe, schedule, resample=True)
    with pytest.warns(UserWarning, match="made with beta_end=0.02, the pipeline has 0.012: its measured quality"):
        assert_close(run(pipe), expected)
    remove_schedule(pipe)


def two_threads() -> None:
    pipes = [build(), build(scheduler="UniPCMultistepScheduler")]
    for pipe in pipes:
        apply_schedule(pipe, schedule_for(pipe, schedules(pipe)[1]))
    expected = [run(pipe) for pipe in pipes]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(lambda pipe: [run(pipe) for _ in range(3)], pipe) for pipe in pipes]
    for future, latents in zip(futures, expected, strict=True):
        assert all(torch.equal(actual, latents) for actual in future.result())


def applied_in_mid_run() -> None:
    """The first step that it sees is computed in full."""
    pipe, oracle = build(), build()
    rows = schedules(pipe)[0]
    with by_definition(oracle, {site: "C" * (MIDDLE + 1) + row[MIDDLE + 1 :] for site, row in rows.items()}):
        expected = run(oracle)
    schedule = schedule_for(pipe, rows)
    assert_close(run(pipe, **when(MIDDLE, lambda pipe, _: _none(apply_schedule(pipe, schedule)))), expected)


def removed_in_mid_run() -> None:
    pipe, oracle = build(), build()
    plain = run(oracle)
    for rows in schedules(pipe):
        with by_definition(oracle, {site: row[:MIDDLE] + "C" * (NUM_STEPS - MIDDLE) for site, row in rows.items()}):
            expected = run(oracle)
        apply_schedule(pipe, schedule_for(pipe, rows))
        assert_close(run(pipe, **when(MIDDLE, lambda pipe, _: remove_schedule(pipe))), expected)
        assert torch.equal(run(pipe), plain)


def _none(_: Any) -> None:
    pass


def deepcopied(num_controlnets: int) -> None:
    """The copy has a schedule of its own, and loses it by itself."""
    pipe = build(num_controlnets=num_controlnets)
    apply_schedule(pipe, schedule_for(pipe, schedules(pipe)[0]))
    expected = run(pipe)
    twin = copy.deepcopy(pipe)
    remove_schedule(pipe)
    plain = run(pipe)
    assert torch.equal(run(twin), expected)
    remove_schedule(twin)
    assert torch.equal(run(twin), plain)


def deepcopied_after_compile() -> None:
    """The copy compiles its own models: those of the original are not called."""
    pipe = build("StableDiffusionPipeline")
    apply_schedule(pipe, schedule_for(pipe, {"unet:eps": "C-C-C-"})).compile(backend="eager")
    expected = run(pipe)
    twin = copy.deepcopy(pipe)
    for parameter in pipe.unet.parameters():
        parameter.data.zero_()
    assert_close(run(twin), expected)
    assert pickle.loads(pickle.dumps(twin)).unet is not twin.unet


def applied_twice() -> None:
    """It is applied once."""
    pipe = build()
    held, mixed, _ = (schedule_for(pipe, rows) for rows in schedules(pipe))
    plain = run(pipe)
    apply_schedule(pipe, held)
    expected = run(pipe)
    replaced = apply_schedule(pipe, mixed)
    apply_schedule(pipe, held)
    replaced.remove()  # no longer applied: nothing to remove
    assert torch.equal(run(pipe), expected)
    remove_schedule(pipe)
    assert torch.equal(run(pipe), plain)


def removed_twice() -> None:
    pipe = build()
    plain = run(pipe)
    handle = apply_schedule(pipe, schedule_for(pipe, schedules(pipe)[0]))
    run(pipe)
    for remove in (handle.remove, handle.remove, lambda: remove_schedule(pipe)):
        remove()
        assert torch.equal(run(pipe), plain)


def removed_while_wrapped() -> None:
    pipe = build()
    handle = apply_schedule(pipe, schedule_for(pipe, {}))
    scheduled = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: scheduled(*args, **kwargs)
    for remove in (handle.remove, lambda: remove_schedule(pipe)):
        with pytest.raises(ValueError, match=r"forward of the unet has been wrapped since .* Undo that first"):
            remove()
    pipe.unet.forward = scheduled
    remove_schedule(pipe)
    assert "forward" not in pipe.unet.__dict__


def shared_unet() -> None:
    """The schedule that is applied later takes the models; the other pipeline's calls are refused until it goes."""
    first = build()
    second = type(first)(**{**first.components, "scheduler": copy.deepcopy(first.scheduler)})
    second.set_progress_bar_config(disable=True)
    plain = run(first)
    rows = schedules(first)[0]
    with by_definition(second, rows):
        expected = run(second)
    schedule = schedule_for(first, rows)
    apply_schedule(first, schedule)
    assert_close(run(first), expected)
    apply_schedule(second, schedule)
    assert_close(run(second), expected)
    with pytest.raises(ValueError, match=r"called by other code than the pipeline .* remove_schedule\(pipe\) first"):
        run(first)
    assert_close(run(second), expected)
    remove_schedule(second)
    assert torch.equal(run(first), plain)


def shared_controlnet() -> None:
    first, second = build(), build()
    second.controlnet = first.controlnet
    schedule = schedule_for(first, {})
    apply_schedule(first, schedule)
    with pytest.raises(ValueError, match="The controlnet is shared with a pipeline that has a schedule"):
        apply_schedule(second, schedule)
    assert "forward" not in second.unet.__dict__


def controlnet_left() -> None:
    """Its new pipeline gets a schedule when that of the old one has been removed, which may be long gone."""
    first, second = build(), build()
    controlnet = first.controlnet
    apply_schedule(first, schedule_for(first, {}))
    run(first)
    del first
    second.controlnet = controlnet
    schedule = schedule_for(second, schedules(second)[0])
    with pytest.raises(ValueError, match=r"shared with a pipeline that has a schedule: remove_schedule\(pipe\)"):
        apply_schedule(second, schedule)
    remove_schedule(second)
    plain = run(second)
    with apply_schedule(second, schedule):
        assert not torch.equal(run(second), plain)
    assert torch.equal(run(second), plain)


def float32_after_bfloat16() -> None:
    """A run's precision leaves no trace in the numbers that a schedule fills in with."""
    pipe = build(dtype=torch.float32)
    site, num_fills = "unet.mid_block.resnets.0:out", NUM_STEPS - 2
    shape = num_fills, pipe.unet.mid_block.resnets[0].out_channels
    tensors = {f"{site}/{name}": torch.rand(shape) for name in ("scale", "reach")}
    schedule = replace(schedule_for(pipe, {}), sites={site: "CC" + "t" * num_fills}, tensors=tensors)
    apply_schedule(pipe, schedule)
    expected = run(pipe)
    apply_schedule(pipe, schedule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(pipe)
    assert torch.equal(run(pipe), expected)


def across_the_batch() -> None:
    """Frames that attend to the first one do not find that of another step there."""
    pipe = build()
    for model in (pipe.unet, pipe.controlnet):
        model.set_attn_processor(CrossFrameAttnProcessor(batch_size=2))
    decoders = {site: row.replace("m", "-") for site, row in schedules(pipe)[2].items() if site != "unet:guidance"}
    latents = []
    for max_steps_at_once in (1, 4):
        with apply_schedule(pipe, schedule_for(pipe, decoders), max_steps_at_once=max_steps_at_once):
            latents.append(run(pipe, num_images=3))
    assert torch.equal(*latents)


def weighed_control() -> None:
    """In new tensors, at single steps and at those that run as one batch."""

    def weigh(module: Any, args: Any, output: Any) -> Any:
        down, mid = output
        return [residual * 0.9**i for i, residual in enumerate(down)], mid * 0.5

    pipe = build()
    pipe.controlnet.register_forward_hook(weigh)
    plain = run(pipe)
    with apply_schedule(pipe, schedule_for(pipe, {})):
        assert torch.equal(run(pipe), plain)
    latents = []
    for max_steps_at_once in (1, 4):
        with apply_schedule(
            pipe, schedule_for(pipe, schedules(pipe)[2]), max_steps_at_once=max_steps_at_once
        ) as handle:
            latents.append(run(pipe))
    assert handle.runtime.batches
    assert_close(*latents)


def other_container() -> None:
    """Of the same ControlNets: nobody would be told that one of them has changed."""
    pipe = build(num_controlnets=2)
    apply_schedule(pipe, schedule_for(pipe, {}))
    run(pipe)
    pipe.controlnet = MultiControlNetModel([*pipe.controlnet.nets])
    with pytest.raises(ValueError, match=r"pipe.controlnet is not the one that the schedule was applied to"):
        run(pipe)
    remove_schedule(pipe)
    run(pipe)


def gradients_after_inference_mode() -> None:
    """What a schedule fills in with is made in the first run, and may be needed for a backward pass in the next."""
    pipe = build()
    site, num_fills = "unet.mid_block.resnets.0:out", NUM_STEPS - 2
    shape = num_fills, pipe.unet.mid_block.resnets[0].out_channels
    tensors = {f"{site}/{name}": torch.rand(shape) for name in ("scale", "reach")}
    apply_schedule(pipe, replace(schedule_for(pipe, {}), sites={site: "CC" + "t" * num_fills}, tensors=tensors))
    with torch.inference_mode():
        expected = run(pipe).clone()
    given = arguments(pipe)
    given["prompt_embeds"] = given["prompt_embeds"].double().requires_grad_()
    latents = inspect.unwrap(type(pipe).__call__)(pipe, **given).images
    latents.sum().backward()
    assert given["prompt_embeds"].grad.norm() > 0
    assert_close(latents.detach(), expected)


def compiled_without_halves(**call: Any) -> None:
    """Steps that the plan runs on the guided half alone find nothing to halve."""
    pipe = build()
    rows = {"unet:guidance": "C-" * (NUM_STEPS // 2), "unet.up_blocks.1.attentions.0:out": "C-" * (NUM_STEPS // 2)}
    handle = apply_schedule(pipe, schedule_for(pipe, rows), max_steps_at_once=1)
    expected = run(pipe, **call)
    handle.compile(backend="eager")
    assert_close(run(pipe, **call), expected)


def compiled_then_changed() -> None:
    """What has been compiled takes notice of what is changed on the models since."""
    pipe, oracle = build(), build()
    rows = schedules(pipe)[2]
    handle = apply_schedule(pipe, schedule_for(pipe, rows), max_steps_at_once=1)
    handle.compile(backend="eager")
    changes: list[Any] = [lambda _: None, load_lora, mid_lora, freeu, lambda pipe: pipe.disable_freeu()]
    for size in ((16, 16), (24, 16)):
        for change in changes:
            for each in (pipe, oracle):
                change(each)
            with by_definition(oracle, rows):
                expected = run(oracle, size=size)
            assert_close(run(pipe, size=size), expected)
        changes = [lambda _: None, lambda pipe: pipe.set_adapters(["style"], [0.7])]


def saved_after_a_run() -> None:
    """The whole pipeline, to be loaded elsewhere without the schedule; here it stays."""
    pipe = build()
    plain = run(pipe)
    apply_schedule(pipe, schedule_for(pipe, schedules(pipe)[0]))
    expected = run(pipe)
    with tempfile.TemporaryDirectory() as folder:
        for model in (pipe.unet, pipe.controlnet):
            model.save_pretrained(f"{folder}/{type(model).__name__}")
        loaded = build()
        for name in ("unet", "controlnet"):
            kind = type(getattr(pipe, name))
            setattr(loaded, name, kind.from_pretrained(f"{folder}/{kind.__name__}", torch_dtype=torch.float64))
    assert_close(run(loaded), plain)  # tensors that lie elsewhere in memory may round differently
    assert torch.equal(run(pipe), expected)
