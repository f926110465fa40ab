"""Every row of the table in `robustness.py`, against the oracle; and what does not fit into rows."""

from __future__ import annotations

import copy
import gc
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from oracle import by_definition
from robustness import PAGE, ROWS, Row, page
from robustness_actions import MIDDLE, guidance_off, other_prompt, when
from robustness_pipelines import build, run
from tiny_models import GUIDANCE_SCALE, IMAGE_SIZE, NUM_STEPS, random_rows
from torch import Tensor

from hgc_learn.fingerprint import ModelFingerprint
from hgc_learn.graph import build_graph
from hgc_learn.inference import apply_schedule, remove_schedule
from hgc_learn.schedule import HGCSchedule
from hgc_learn.sites import list_sites


def cases(*, is_refused: bool) -> list[Any]:
    return [
        pytest.param(row, id=f"{row.group}: {row.what}", marks=[pytest.mark.nightly] if row.is_slow else [])
        for row in ROWS
        if bool(row.refused) == is_refused
    ]


def schedules(pipe: Any, rng: random.Random | None = None) -> list[dict[str, str]]:
    """One with values held, one with lines, means of the halves and half steps besides."""
    pipe.scheduler.set_timesteps(NUM_STEPS)
    num_steps, rng = len(pipe.scheduler.timesteps), rng or random.Random(1)
    sites = [s for s in list_sites(build_graph(pipe.unet, getattr(pipe, "controlnet", None))) if s != "unet:guidance"]
    held = random_rows(sites, rng, num_sites=len(sites) // 3, num_steps=num_steps)
    mixed = random_rows(sites, rng, num_sites=len(sites) // 4, num_steps=num_steps)
    mixed = {site: "".join(rng.choice("-1m") if code == "-" else code for code in row) for site, row in mixed.items()}
    mixed["unet:guidance"] = "C" + "".join(rng.choice("CC-10") for _ in range(num_steps - 1))
    return [held, mixed]


def schedule_for(pipe: Any, rows: dict[str, str]) -> HGCSchedule:
    pipe.scheduler.set_timesteps(NUM_STEPS)
    return HGCSchedule(
        sites=rows,
        timesteps=tuple(pipe.scheduler.timesteps.tolist()),
        scheduler=type(pipe.scheduler).__name__,
        guidance_scale=GUIDANCE_SCALE,
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        model=ModelFingerprint.of(pipe.unet, getattr(pipe, "controlnet", None)),
    )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.filterwarnings(
    "ignore:guidance_scale is",  # runs without guidance
    "ignore:__array_wrap__ must accept:DeprecationWarning",  # numpy about KDPM2's schedulers
)
@pytest.mark.parametrize("row", cases(is_refused=False))
def test_right(row: Row) -> None:
    def reference() -> Any:  # made anew each time, for some rows leave another pipeline behind
        pipe = row.build()
        if row.change and not row.is_neutral:
            row.change(pipe)
        return pipe

    original = row.build()
    plain = row(reference())
    for rows in schedules(original)[1 if row.change else 0 :]:
        schedule = schedule_for(original, rows)
        oracle = reference()
        with by_definition(oracle, rows, first_step=row.first_step, refreshed=row.refreshed):
            expected = row(oracle)
        assert (expected.double() - plain.double()).norm() > 1e-4 * plain.double().norm()
        for is_changed_before in (True, False) if row.change else (True,):
            pipe = row.build()
            if row.change and is_changed_before:
                row.change(pipe)
            handle = apply_schedule(pipe, schedule, allow_other_weights=row.change is not None)
            if row.change and not is_changed_before:
                row.change(pipe)
            assert_close(row(pipe), expected, row.tolerance)
            assert handle.stats()["steps_refreshed"] == len({*row.refreshed} | ({row.first_step} - {0}))
            if not row.refreshed:
                assert_close(row(pipe), expected, row.tolerance)
            remove_schedule(pipe)
            if not row.refreshed:
                assert_close(row(pipe), plain, row.tolerance)


@pytest.mark.filterwarnings("ignore:guidance_scale is")
@pytest.mark.parametrize("row", cases(is_refused=True))
def test_refused(row: Row) -> None:
    pipe = row.build()
    supported = build() if row.what in ("AnimateDiff", "ControlNet-Union") else pipe
    schedule = schedule_for(supported, schedules(supported)[1])
    for is_changed_before in (True, False) if row.change else (True,):
        pipe = row.build()
        if row.change and is_changed_before:
            row.change(pipe)
        if row.change and is_changed_before and "replaced" in row.what:
            continue  # of the same weights: not another model
        with pytest.raises(ValueError, match=row.refused):
            apply_schedule(pipe, schedule)
            if row.change and not is_changed_before:
                row.change(pipe)
            row(pipe)


@pytest.mark.parametrize("num_steps", [4, 9])
def test_resampled_when_asked(num_steps: int) -> None:
    """Fewer and more steps: each does what the schedule does at the nearest timestep, and a warning says so."""
    pipe = build()
    rows = schedules(pipe)[1]
    schedule = schedule_for(pipe, rows)
    usual, plain = run(pipe, num_inference_steps=num_steps), run(pipe)
    pipe.scheduler.set_timesteps(num_steps)
    nearest = [min(range(NUM_STEPS), key=lambda i: abs(schedule.timesteps[i] - t)) for t in pipe.scheduler.timesteps]
    resampled = {site: "C" + "".join(row[i] for i in nearest[1:]) for site, row in rows.items()}
    with by_definition(pipe, resampled):
        expected = run(pipe, num_inference_steps=num_steps)
    with by_definition(pipe, rows):
        expected_at_its_own = run(pipe)
    apply_schedule(pipe, schedule, resample=True)
    with pytest.warns(UserWarning, match=f"this run visits {num_steps}.*made for {NUM_STEPS}.*It is resampled"):
        assert_close(run(pipe, num_inference_steps=num_steps), expected, 1e-9)
    assert_close(run(pipe), expected_at_its_own, 1e-9)  # without a warning
    remove_schedule(pipe)
    assert torch.equal(run(pipe, num_inference_steps=num_steps), usual)
    assert torch.equal(run(pipe), plain)


def test_two_threads_each_with_its_own_pipeline() -> None:
    pipes = [build(), build(scheduler="UniPCMultistepScheduler")]
    for pipe in pipes:
        apply_schedule(pipe, schedule_for(pipe, schedules(pipe)[1]))
    expected = [run(pipe) for pipe in pipes]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(lambda pipe: [run(pipe) for _ in range(3)], pipe) for pipe in pipes]
    for future, latents in zip(futures, expected, strict=True):
        assert all(torch.equal(actual, latents) for actual in future.result())


def test_a_deepcopy_of_several_controlnets_is_on_its_own() -> None:
    pipe = build(num_controlnets=2)
    apply_schedule(pipe, schedule_for(pipe, schedules(pipe)[0]))
    expected = run(pipe)
    twin = copy.deepcopy(pipe)
    remove_schedule(pipe)
    plain = run(pipe)
    assert torch.equal(run(twin), expected)
    remove_schedule(twin)
    remove_schedule(twin)  # twice: nothing to do
    assert torch.equal(run(twin), plain)


def test_applied_twice_is_applied_once() -> None:
    pipe = build()
    held, mixed = (schedule_for(pipe, rows) for rows in schedules(pipe))
    plain = run(pipe)
    apply_schedule(pipe, held)
    expected = run(pipe)
    apply_schedule(pipe, mixed)
    apply_schedule(pipe, held)
    assert torch.equal(run(pipe), expected)
    remove_schedule(pipe)
    assert torch.equal(run(pipe), plain)


def test_removal_is_refused_while_others_have_wrapped_the_forward() -> None:
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


def test_a_controlnet_shared_with_a_scheduled_pipeline_is_refused() -> None:
    first, second = build(), build()
    second.controlnet = first.controlnet
    schedule = schedule_for(first, {})
    apply_schedule(first, schedule)
    with pytest.raises(ValueError, match="controlnet is shared with a pipeline that has a schedule"):
        apply_schedule(second, schedule)
    assert "forward" not in second.unet.__dict__


def test_the_page_has_the_table_of_today() -> None:
    """`python tests/robustness.py` writes it."""
    assert PAGE.read_text() == page()


SAMPLERS = ["DDIMScheduler", "UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler"]


def soak(num_generations: int) -> list[int]:
    """Random schedules, sizes, samplers and changes of guidance, one after the other in this process. Returns how many
    tensors are alive after each."""
    rng, alive = random.Random(0), []
    pipes = [build(scheduler=name) for name in SAMPLERS]
    for _ in range(num_generations):
        pipe = rng.choice(pipes)
        rows = schedules(pipe, rng)[rng.randrange(2)]
        call: dict[str, Any] = {
            "num_images": rng.choice([1, 1, 2]),
            "size": rng.choice([(16, 16), (16, 24), (32, 16)]),
            "guidance_scale": rng.choice([1.0, 3.0, 5.0]),
            "guess_mode": rng.random() < 0.2,
        }
        refreshed: tuple[int, ...] = ()
        if rng.random() < 0.3:
            call |= when(MIDDLE, other_prompt, "prompt_embeds")
            refreshed = (MIDDLE,)
        elif call["guidance_scale"] > 1 and call["num_images"] == 1 and not call["guess_mode"] and rng.random() < 0.5:
            call |= when(MIDDLE, guidance_off, "prompt_embeds", "image")
            refreshed = (MIDDLE,)
        with by_definition(pipe, rows, refreshed=refreshed):
            expected = run(pipe, **call)
        with apply_schedule(pipe, schedule_for(pipe, rows)):
            assert_close(run(pipe, **call), expected, 1e-9)
        del expected
        gc.collect()
        alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    return alive


@pytest.mark.filterwarnings("ignore:guidance_scale is")
def test_short_soak() -> None:
    alive = soak(8)
    assert alive[-1] <= max(alive[:4]) + 8


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:guidance_scale is")
def test_soak() -> None:
    alive = soak(200)
    assert max(alive[100:]) <= max(alive[:100]) + 8
