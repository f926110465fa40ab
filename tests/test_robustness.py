"""Every row of the table in `robustness.py`, against the oracle; and what does not fit into rows."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import psutil
import pytest
from oracle import by_definition
from robustness import PAGE, ROWS, page
from robustness_actions import MIDDLE, guidance_off, other_prompt, when
from robustness_elsewhere import ELSEWHERE, Elsewhere
from robustness_pipelines import assert_close, build, run, schedule_for, schedules
from robustness_row import Row
from torch import Tensor

from hgc_learn.inference import apply_schedule, remove_schedule


def cases(is_of_kind: Callable[[Row], bool]) -> list[Any]:
    return [
        pytest.param(row, id=f"{row.group}: {row.what}", marks=[pytest.mark.nightly] if row.is_slow else [])
        for row in ROWS
        if is_of_kind(row)
    ]


@pytest.mark.filterwarnings(
    "ignore:guidance_scale is",  # runs without guidance
    "ignore:__array_wrap__ must accept:DeprecationWarning",  # numpy about KDPM2's schedulers
)
@pytest.mark.parametrize("row", cases(lambda row: not row.refused and not row.check))
def test_right(row: Row) -> None:
    def reference() -> Any:
        pipe = build()
        if row.change and not row.is_neutral:
            row.change(pipe)
        return pipe

    build = row.build if row.change or row.refreshed else cache(row.build)
    if not row.refreshed:  # rows that change something in mid-run leave another pipeline behind
        reference = cache(reference)
    original = build()
    plain = row(reference())
    of_this_row = schedules(original)[1 if row.change else 0 :]
    for rows in of_this_row:
        schedule = schedule_for(original, rows)
        oracle = reference()
        with by_definition(oracle, rows, first_step=row.first_step, refreshed=row.refreshed):
            expected = row(oracle)
        assert (expected.double() - plain.double()).norm() > 1e-4 * plain.double().norm()
        for is_changed_before in (True, False) if row.change else (True,):
            pipe = build()
            if row.change and is_changed_before:
                row.change(pipe)
            handle = apply_schedule(pipe, schedule, allow_other_weights=row.change is not None)
            if row.change and not is_changed_before:
                row.change(pipe)
            assert_close(row(pipe), expected, row.tolerance)
            assert not handle.runtime.cache.values
            assert not handle.runtime.once.kept
            assert handle.stats()["steps_refreshed"] == len({*row.refreshed} | ({row.first_step} - {0}))
            is_repeated = rows is of_this_row[-1] and not row.refreshed
            if is_repeated:
                assert_close(row(pipe), expected, row.tolerance)
            remove_schedule(pipe)
            if is_repeated:
                assert_close(row(pipe), plain, row.tolerance)


@pytest.mark.filterwarnings("ignore:guidance_scale is")
@pytest.mark.parametrize("row", cases(lambda row: bool(row.refused) and not row.check))
def test_refused(row: Row) -> None:
    pipe = row.build()
    is_unknown = any(word in row.what for word in ("AnimateDiff", "ControlNet-Union", "a subclass with"))
    supported = build() if is_unknown else pipe
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


@pytest.mark.filterwarnings("ignore:guidance_scale is")
@pytest.mark.parametrize("row", cases(lambda row: row.check is not None))
def test_checked(row: Row) -> None:
    assert row.check is not None
    row.check()


@pytest.mark.parametrize("row", [pytest.param(row, id=row.test) for row in ELSEWHERE])
def test_what_is_tested_elsewhere_is_there(row: Elsewhere) -> None:
    assert callable(getattr(import_module(row.module), row.name))


def test_the_page_has_the_table_of_today() -> None:
    """`python tests/robustness.py` writes it."""
    assert PAGE.read_text() == page()


SAMPLERS = ["DDIMScheduler", "UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler"]


def soak(num_generations: int) -> tuple[list[int], list[float]]:
    """Random schedules, sizes, samplers, changes of guidance and ways to run, one after the other in this process.
    Returns how many tensors are alive after each, and the memory that the process has, MiB."""
    rng, alive, resident = random.Random(0), [], []
    pipes = [build(scheduler=name) for name in SAMPLERS]
    for _ in range(num_generations):
        pipe = rng.choice(pipes)
        rows = rng.choice(schedules(pipe, rng))
        call: dict[str, Any] = {
            "num_images": rng.choice([1, 1, 2]),
            "size": rng.choice([(16, 16), (16, 24), (32, 16)]),
            "guidance_scale": rng.choice([1.0, 3.0, 5.0]),
            "guess_mode": rng.random() < 0.2,
            "controlnet_conditioning_scale": rng.choice([0.0, 0.5, 1.0, 1.0]),
        }
        options = {"exact_savings": rng.random() < 0.5, "max_steps_at_once": rng.choice([1, 2, 4])}
        refreshed: tuple[int, ...] = ()
        is_guided_in_full = call["guidance_scale"] > 1 and not call["guess_mode"]
        if rng.random() < 0.3:
            call |= when(MIDDLE, other_prompt, "prompt_embeds")
            refreshed = (MIDDLE,)
        elif is_guided_in_full and call["num_images"] == 1 and rng.random() < 0.5:
            call |= when(MIDDLE, guidance_off, "prompt_embeds", "image")
            refreshed = (MIDDLE,)
        with by_definition(pipe, rows, refreshed=refreshed):
            expected = run(pipe, **call)
        with apply_schedule(pipe, schedule_for(pipe, rows), **options):
            assert_close(run(pipe, **call), expected)
        del expected
        gc.collect()
        alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
        resident.append(psutil.Process().memory_info().rss / 2**20)
    return alive, resident


@pytest.mark.filterwarnings("ignore:guidance_scale is")
def test_short_soak() -> None:
    alive, _ = soak(6)
    assert alive[-1] <= max(alive[:4]) + 8


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:guidance_scale is")
def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    alive, resident = soak(200)
    with capsys.disabled():
        for name, values in (("tensors alive", alive), ("MiB resident", resident)):
            print(
                f"\n{name} after generation 1, 50, 100, 150, 200: {[round(values[i]) for i in (0, 49, 99, 149, 199)]}"
            )
    assert max(alive[100:]) <= max(alive[:100]) + 8
    assert max(resident[100:]) <= 1.02 * max(resident[:100])
