"""Cells that were made, or tuned, with other settings than are asked for."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from small_comparison import SAMPLER, rows, write

from hgc_learn.__main__ import main
from hgc_learn.comparison.cells import Selection, cell_files, protocol, read_cell, tuned_otherwise
from hgc_learn.comparison.config import read_config
from hgc_learn.export.learning import Learning
from hgc_learn.files import save_json


def test_cells_made_with_other_settings_are_refused_until_redone(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"policies": ["uniform"], "budgets": [0.6]}
    path = write(settings, tmp_path)
    assert main(["compare", "--config", str(path)]) == 0
    others = ["--tuning.num_calibration=1", "--tuning.tolerance=0.1"]
    for override in [*others, f"--samplers.{SAMPLER}.num_test=2"]:
        assert main(["compare", "--config", str(path), "--", override]) == 2
        assert "--redo" in capsys.readouterr().err
    assert main(["compare", "--config", str(path), "--redo", "--", others[0]]) == 0
    assert main(["compare", "--config", str(path), "--", others[0]]) == 0
    assert main(["compare", "--config", str(path), "--redo", "--", others[0], "--optional_metrics=[clip]"]) == 2
    assert (tmp_path / "run" / "cells" / SAMPLER / "uniform" / "0.6.schedule.json").is_file()  # refused, not removed
    settings["fixed"] = {"uniform": {"interval": 1}}  # over the budget
    assert main(["compare", "--config", str(write(settings, tmp_path)), "--", others[0]]) == 0
    assert "1 cell was tuned with nothing fixed instead of interval=1; --redo runs it again" in capsys.readouterr().out
    assert main(["compare", "--config", str(write(settings, tmp_path)), "--redo"]) == 0
    assert "reason" in rows(settings)["uniform", 0.6]
    assert not [*(tmp_path / "run" / "cells" / SAMPLER / "uniform").glob("*schedule*")]


def test_cells_tuned_with_other_settings_are_kept_told_and_marked(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"policies": ["time_cutoff", "uniform", "fewer_steps"], "budgets": [0.6, 0.5, 0.1]}
    settings["fixed"] = {"time_cutoff": {"cutoff": 3, "interval": 5, "site": "unet:eps"}}
    path = write(settings, tmp_path)
    assert main(["compare", "--config", str(path)]) == 0
    output, text = capsys.readouterr().out, (tmp_path / "report" / "tiny.md").read_text()
    assert "instead of" not in output + text
    assert "†" not in text
    config = read_config(path)
    for policy in ("uniform", "time_cutoff"):  # as by an earlier version
        file = cell_files(config, SAMPLER, policy, 0.6).figures
        cell = json.loads(file.read_text())
        cell["protocol"]["tuning"] |= {"num_finalists": 2, "max_candidates": 24}
        file.write_text(json.dumps(cell))
    times = {cell: cell_files(config, *cell).figures.stat().st_mtime_ns for cell in Selection.of(config).cells()}

    assert main(["compare", "--config", str(path)]) == 0
    output, text = capsys.readouterr().out, (tmp_path / "report" / "tiny.md").read_text()
    how = "max_candidates 24 instead of 4, num_finalists 2 instead of none"
    assert f"{SAMPLER} uniform: 1 cell was tuned with {how}; --redo runs it again" in output
    assert output.count("tuned with") == 1  # there was nothing to try for time_cutoff
    assert "† marks cells of others, [listed below](#cells-of-other-settings)." in " ".join(text.split())
    assert f"| `uniform` | {SAMPLER} | 60% | {how} |" in text
    marked = [line for line in text.splitlines() if "`uniform` †" in line]
    assert all(SAMPLER in line or "interval=" in line for line in marked)
    assert sum("interval=" in line for line in marked) == 1  # at 60 %, and not at 50 %
    assert not any("†" in line.replace("`uniform` †", "") for line in text.splitlines() if line.startswith("|"))

    more = ["--", "--tuning.num_scenes=1"]
    assert main(["compare", "--config", str(path), *more]) == 0
    output = capsys.readouterr().out
    again = "num_scenes 2 instead of 1"
    assert f"{SAMPLER} fewer_steps: 2 cells were tuned with {again}; --redo runs them again" in output
    assert f"{SAMPLER} uniform: 1 cell was tuned with {again}" in output
    assert {cell: cell_files(config, *cell).figures.stat().st_mtime_ns for cell in times} == times

    assert main(["compare", "--config", str(path), "--policies", "uniform", "--budgets", "0.6", "--redo"]) == 0
    assert "tuned with" not in capsys.readouterr().out
    assert "†" not in (tmp_path / "report" / "tiny.md").read_text()
    redone = {cell for cell in times if cell_files(config, *cell).figures.stat().st_mtime_ns != times[cell]}
    assert redone == {(SAMPLER, "uniform", 0.6)}


@pytest.mark.parametrize(
    ("record", "then", "how"),
    [
        ({"num_tried": 3, "num_candidates": 176}, {"max_candidates": 3}, "max_candidates 3 instead of 4"),
        ({"num_tried": 3, "num_candidates": 176}, {"num_calibration": 9, "tolerance": 0.5}, ""),  # these are refused
        ({"num_tried": 3, "num_candidates": 176}, {}, ""),
        ({"num_tried": 0, "num_candidates": 176}, {"max_candidates": 3}, ""),  # one was within the budget
        (
            {"num_tried": 0, "num_candidates": 176},
            {"max_candidates": 1},
            "max_candidates 1 instead of 4",
        ),  # one or more
        ({"num_tried": 0, "num_candidates": 9}, {"max_candidates": 3}, "a grid of 9 instead of 176"),
        (None, {"max_candidates": 3}, ""),  # none was
    ],
)
def test_how_hard_a_cell_was_tuned_is_told_where_it_may_have_mattered(
    settings: dict[str, Any], tmp_path: Path, record: dict[str, int] | None, then: dict[str, float], how: str
) -> None:
    config = read_config(write(settings, tmp_path))
    cell: dict[str, Any] = {"sampler": SAMPLER, "policy": "uniform", "budget": 0.6}
    cell["protocol"] = protocol(config, SAMPLER)
    cell["protocol"]["tuning"] |= then
    assert tuned_otherwise(config, cell | ({"tuning": record} if record else {})) == how


def test_other_fixed_knobs_are_told(settings: dict[str, Any], tmp_path: Path) -> None:
    config = read_config(write(settings, tmp_path))
    cell = {"sampler": SAMPLER, "policy": "evolutionary", "budget": 0.6, "protocol": protocol(config, SAMPLER)}
    assert not tuned_otherwise(config, cell)
    cell["protocol"]["tuning"].pop("num_search")
    assert tuned_otherwise(config, cell) == "num_search none instead of 2"
    assert not tuned_otherwise(config, cell | {"policy": "uniform"})
    cell["protocol"] = protocol(config, SAMPLER)
    cell["fixed"] = {"population": 16, "generations": 16}
    assert tuned_otherwise(config, cell) == "population=16, generations=16 fixed instead of nothing"


def test_a_cell_from_before_a_setting_came_is_one_without_it(settings: dict[str, Any], tmp_path: Path) -> None:
    config = read_config(write(settings, tmp_path))
    cell = {"sampler": SAMPLER, "policy": "uniform", "budget": 0.6, "protocol": protocol(config, SAMPLER)}
    del cell["protocol"]["sampling"]["scheduler_config"]
    save_json(cell_files(config, SAMPLER, "uniform", 0.6).figures, cell)
    assert read_cell(config, SAMPLER, "uniform", 0.6) == cell
    config.samplers[SAMPLER].scheduler_config = {"solver_order": 3}
    with pytest.raises(ValueError, match="made with other settings"):
        read_cell(config, SAMPLER, "uniform", 0.6)


def test_a_cell_that_learned_otherwise_is_told(settings: dict[str, Any], tmp_path: Path) -> None:
    config = read_config(write(settings, tmp_path))
    today = {"budget": 0.6, "ckpt_path": "last.ckpt", **asdict(Learning())}
    cell = {"sampler": SAMPLER, "policy": "learned", "protocol": protocol(config, SAMPLER), "settings": today}
    assert not tuned_otherwise(config, cell)
    before = {name: value for name, value in today.items() if name != "reorder_trials"} | {"fill_updates": 1}
    told = (
        f"reorder_trials none instead of {Learning.reorder_trials}, fill_updates 1 instead of {Learning.fill_updates}"
    )
    assert tuned_otherwise(config, cell | {"settings": before}) == told
    config.fixed["learned"] = {"fill_updates": 1}
    assert tuned_otherwise(config, cell | {"settings": before, "fixed": {"fill_updates": 1}}) == told.partition(",")[0]


def test_a_cell_of_another_training_is_told(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["training_config"] = str(tmp_path / "{policy}-{sampler}.yaml")
    config = read_config(write(settings, tmp_path))
    cell = {"sampler": SAMPLER, "policy": "learned", "protocol": protocol(config, SAMPLER), "training": {"a": 1}}
    training = tmp_path / f"learned-{SAMPLER}.yaml"
    for text, is_other in (("a: 1", False), ("a: 2", True)):
        training.write_text(text)
        assert bool(tuned_otherwise(config, cell)) == is_other
    training.unlink()
    assert tuned_otherwise(config, cell) == f"a training by another {training} than is there now"
