"""Of several trainings an export goes on with the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import fit

from hgc_learn.__main__ import main
from hgc_learn.export.export import export, in_batches, load_run, training_samples
from hgc_learn.export.learning import NOTHING
from hgc_learn.schedule import HGCSchedule
from hgc_learn.training.saved import read_saved, write_saved

ROUNDING = replace(NOTHING, learning_samples=4)
BUDGET = 0.5


@pytest.fixture(scope="module")
def trained(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(teacher, tmp_path_factory.mktemp("run"), 1)


def changed(ckpt_path: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    checkpoint = read_saved(ckpt_path)
    change(checkpoint)
    write_saved(to, checkpoint)
    return to


@pytest.fixture
def seeds(trained: Path, tmp_path: Path) -> list[Path]:
    """Three trainings with other logits."""

    def draw(seed: int) -> Callable[[dict[str, Any]], None]:
        def change(checkpoint: dict[str, Any]) -> None:
            logits = checkpoint["state_dict"]["router.logits"]
            logits.copy_(3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)))

        return change

    return [changed(trained, tmp_path / f"{seed}.ckpt", draw(seed)) for seed in range(3)]


def test_the_one_with_the_lowest_error_goes_on(
    seeds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = {}
    for path in seeds:
        module, data = load_run(path)
        (batch,) = in_batches(training_samples(data, 4), 4)
        errors[path] = module.log_error([batch], module.gates(BUDGET))
    best = min(seeds, key=errors.__getitem__)
    alone = HGCSchedule.load(export(best, tmp_path / "alone", BUDGET, ROUNDING))
    for index in range(3):
        ordered = [*seeds[index:], *seeds[:index]]
        path = export(ordered[0], tmp_path / str(index), BUDGET, ROUNDING, other_ckpt_paths=ordered[1:])
        schedule = HGCSchedule.load(path)
        assert schedule.sites == alone.sites
        assert schedule.producer["settings"]["ckpt_path"] == best.name
        assert schedule.producer["settings"]["num_trainings"] == 3
        said = " ".join(capsys.readouterr().out.split())
        assert f"{best.name}: error {torch.tensor(errors[best]).exp():.2e}, goes on" in said
        assert said.count("goes on") == 1


def test_of_equals_it_is_the_first(trained: Path, tmp_path: Path) -> None:
    other = changed(trained, tmp_path / "other.ckpt", lambda checkpoint: None)
    paths = [other, trained, other]
    schedule = HGCSchedule.load(export(trained, tmp_path / "out", BUDGET, ROUNDING, other_ckpt_paths=paths))
    assert schedule.producer["settings"]["ckpt_path"] == trained.name
    assert schedule.producer["settings"]["num_trainings"] == 2


def test_what_all_were_given_is_what_goes_on_after_an_interruption(
    seeds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning = replace(ROUNDING, specialise_updates=3)
    whole = export(seeds[0], tmp_path / "whole", BUDGET, learning, other_ckpt_paths=seeds[1:])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("hgc_learn.export.export.fills.learn_fills", _interrupt)
        export(seeds[0], tmp_path / "parts", BUDGET, learning, other_ckpt_paths=seeds[1:])
    with pytest.raises(ValueError, match="is what another export has learned"):
        export(seeds[0], tmp_path / "parts", BUDGET, learning)
    parts = export(seeds[0], tmp_path / "parts", BUDGET, learning, other_ckpt_paths=seeds[1:])
    assert HGCSchedule.load(parts).sites == HGCSchedule.load(whole).sites


def _interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_trainings_of_something_else_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def more_guidance(checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"]["sampling"]["guidance_scale"] = 9.0

    other = changed(trained, tmp_path / "other.ckpt", more_guidance)
    for path, reason in ((other, "the router was trained with sampling"), (tmp_path / "none.ckpt", "no such")):
        arguments = ["export", "--ckpt_path", str(trained), str(path), "--output", str(tmp_path / "out")]
        assert main(arguments) == 2
        assert f"{path}: {reason}" in capsys.readouterr().err
        assert not list((tmp_path / "out").glob("*"))
