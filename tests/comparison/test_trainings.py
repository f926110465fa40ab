"""Several trainings of a policy, of which it chooses one for each budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_comparison import SAMPLER, write

from hgc_learn.__main__ import main
from hgc_learn.comparison.cells import read_cell, tuned_otherwise
from hgc_learn.comparison.config import read_config
from hgc_learn.schedule import HGCSchedule
from hgc_learn.training.saved import read_saved


def test_a_cell_of_several_trainings(settings: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    training = {
        "model": {
            "model": str(teacher),
            "sampling": {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 64, "width": 64}
            | {"scheduler": "UniPCMultistepScheduler"},
            "budgets": [0.5],
            "objective": {"class_path": "Rollout", "init_args": {"num_warm_start_batches": 0}},
        },
        "data": {"class_path": "SceneDataModule", "init_args": {"num_train": 4, "num_val": 2}},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "logger": False},
    }
    (tmp_path / f"learned-{SAMPLER}.yaml").write_text(yaml.safe_dump(training))
    settings |= {"policies": ["learned"], "budgets": [0.6], "num_trainings": {"learned": 2}}
    learning = {"learning_samples": 2, "reorder_trials": 0, "specialise_updates": 1, "fill_updates": 1}
    settings["fixed"] = {"learned": learning}
    path = write(settings, tmp_path)
    assert main(["compare", "--config", str(path)]) == 0
    folder = tmp_path / "run" / "trained" / SAMPLER / "learned"
    folders = [folder, folder / "seed-1"]
    logits = [read_saved(folder / "last.ckpt")["state_dict"]["router.logits"] for folder in folders]
    assert logits[0].ne(logits[1]).any()
    config = read_config(path)
    cell = read_cell(config, SAMPLER, "learned", 0.6)
    assert cell is not None and "error" not in cell, cell
    assert cell["num_trainings"] == 2
    assert cell["settings"]["other_ckpt_paths"] == [str(folders[1] / "last.ckpt")]
    assert not tuned_otherwise(config, cell)
    schedule = HGCSchedule.load(tmp_path / "run" / "cells" / SAMPLER / "learned" / "0.6.schedule.json")
    assert schedule.producer["settings"]["other_ckpt_paths"] == cell["settings"]["other_ckpt_paths"]
    text = (tmp_path / "report" / "tiny.md").read_text()
    assert "seed-1" not in text
    for folder, minutes in zip(folders, (20, 300), strict=True):
        record = folder / "trained.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"minutes": minutes}))
    assert main(["compare", "--config", str(path), "--report_only"]) == 0
    assert " | 320.0 |" in (tmp_path / "report" / "tiny.md").read_text().partition("## What tuning cost")[2]

    config.num_trainings.clear()
    assert tuned_otherwise(config, cell) == "2 instead of 1 trainings"


@pytest.mark.parametrize(
    ("num_trainings", "reason"),
    [
        ({"uniform": 2}, "num_trainings: 'uniform' is no policy that chooses the best of several trainings"),
        ({"l2c": 2}, "num_trainings: 'l2c' is no policy"),
        ({"learned": 0}, "num_trainings: 0 of learned; it must be at least 1"),
    ],
)
def test_numbers_of_trainings_that_make_no_sense(
    settings: dict[str, Any], tmp_path: Path, num_trainings: dict[str, int], reason: str
) -> None:
    settings["num_trainings"] = num_trainings
    with pytest.raises(ValueError, match=reason):
        read_config(write(settings, tmp_path))
