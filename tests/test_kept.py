"""An export that is interrupted goes on from what it has learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from training_fixtures import fit

from hgc_learn.__main__ import guarded
from hgc_learn.export import kept
from hgc_learn.export.export import KEPT_NAME, Bars, export, load_run
from hgc_learn.export.learning import Learning
from hgc_learn.plan import compile_plan
from hgc_learn.policies import POLICIES
from hgc_learn.policies.learned import kept_path
from hgc_learn.schedule import HGCSchedule
from hgc_learn.setting import Draft

LEARNING = Learning(learning_samples=4, reorder_trials=2, specialise_updates=3, fill_updates=3)
BUDGET = 0.5


@pytest.fixture(scope="module")
def ckpt_path(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(teacher, tmp_path_factory.mktemp("run"), 1)


def count_updates(patch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[Path]:
    """Of those that are kept, and of the beginning, which writes a file as well; after so many comes Ctrl-C."""
    seen: list[Path] = []

    def write_saved(path: Path, value: Any) -> None:
        original(path, value)
        seen.append(path)
        if len(seen) == stop_after:
            raise KeyboardInterrupt

    original = kept.write_saved
    patch.setattr(kept, "write_saved", write_saved)
    return seen


def test_an_interrupted_export_goes_on_to_the_same_schedule(
    ckpt_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(ckpt_path, tmp_path / "whole", BUDGET, LEARNING)
    folder = tmp_path / "parts"
    for stop_after in (2, 4, 3, None):  # in the midst of trials, of specialising, of the fill-ins, and never
        with pytest.MonkeyPatch.context() as patch:
            seen = count_updates(patch, stop_after)
            status = guarded(lambda: export(ckpt_path, folder, BUDGET, LEARNING))
        assert len(seen) == (stop_after or 3)
        assert status == (130 if stop_after else 0)
        assert (folder / KEPT_NAME).is_file() == bool(stop_after)
    assert capsys.readouterr().err.count("interrupted: the same command goes on from there\n") == 3
    whole, parts = (HGCSchedule.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert replace(parts, fidelity={}) == replace(whole, fidelity={})
    for name, tensor in whole.tensors.items():  # uncached pictures are made in batches of another size
        torch.testing.assert_close(parts.tensors[name], tensor, rtol=0, atol=1e-3)


def test_so_does_one_that_a_policy_makes(ckpt_path: Path) -> None:
    """As a cell of the comparison, say."""
    module, _ = load_run(ckpt_path)

    def write() -> Draft:
        return POLICIES["learned"].write(module.setting, ckpt_path=str(ckpt_path), budget=BUDGET, **asdict(LEARNING))

    whole = write()
    for stop_after in (4, None):
        with pytest.MonkeyPatch.context() as patch:
            seen = count_updates(patch, stop_after)
            if stop_after:
                with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
                    write()
            else:
                parts = write()
        assert kept_path(str(ckpt_path), BUDGET).is_file() == bool(stop_after)
    assert len(seen) == 6  # one at the beginning, and five updates: two trials and an update had been made
    assert parts.sites == whole.sites
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[name], tensor, rtol=0, atol=1e-3)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def interrupted_export(ckpt_path: Path, folder: Path, stop_after: int) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_updates(patch, stop_after)
        export(ckpt_path, folder, BUDGET, LEARNING)


def test_what_another_export_has_learned_is_not_lost(
    ckpt_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_export(ckpt_path, tmp_path, 3)
    path = tmp_path / KEPT_NAME
    before = path.read_bytes()
    others: list[tuple[str, Callable[[], Path]]] = [
        ("budget 0.5 instead of 0.6", lambda: export(ckpt_path, tmp_path, 0.6, LEARNING)),
        ("fill_updates 3 instead of 4", lambda: export(ckpt_path, tmp_path, BUDGET, replace(LEARNING, fill_updates=4))),
        ("max_patterns None instead of 3", lambda: export(ckpt_path, tmp_path, BUDGET, LEARNING, max_patterns=3)),
    ]
    for what, other in others:
        assert guarded(other) == 2
        assert f"{path} is what another export has learned ({what})" in capsys.readouterr().err
        assert path.read_bytes() == before


def test_a_schedule_has_no_more_patterns_than_it_may(ckpt_path: Path, tmp_path: Path) -> None:
    module, _ = load_run(ckpt_path)
    numbers = []
    for max_patterns in (None, 2):
        schedule = HGCSchedule.load(export(ckpt_path, tmp_path / f"{max_patterns}", BUDGET, LEARNING, max_patterns))
        numbers.append(compile_plan(module.graph, schedule.sites, schedule.num_steps).num_patterns())
    assert numbers[0] > numbers[1] == 2


def test_of_an_export_that_has_learned_nothing_nothing_is_left(ckpt_path: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="no samples"):
        patch.setattr("hgc_learn.export.export.decide", raising(ValueError("no samples")))
        export(ckpt_path, tmp_path, BUDGET, LEARNING)
    assert not (tmp_path / KEPT_NAME).exists()


def test_what_is_damaged_is_not_gone_on_from(ckpt_path: Path, tmp_path: Path) -> None:
    interrupted_export(ckpt_path, tmp_path, 3)
    path = tmp_path / KEPT_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.MonkeyPatch.context() as patch:
        seen = count_updates(patch)
        export(ckpt_path, tmp_path, BUDGET, LEARNING)
    assert len(seen) == 1 + LEARNING.reorder_trials + LEARNING.specialise_updates + LEARNING.fill_updates
    assert not path.exists()


def test_the_bar_of_a_part_that_ended_early_ends_as_done() -> None:
    progress = Progress(disable=True)
    bars = Bars(progress, LEARNING)
    bars.on_update("reorder", 0, -1.0)
    assert [task.finished for task in progress.tasks] == [False, False, False]
    bars.on_update("specialise", 0, -1.0)
    assert [task.finished for task in progress.tasks] == [True, False, False]
    bars.finish()  # nothing was to be filled in
    assert [task.finished for task in progress.tasks] == [True, True, True]
