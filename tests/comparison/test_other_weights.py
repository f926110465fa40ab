"""The folder of the teacher may hold other weights than those that cells were made with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from hgc_learn.__main__ import main

CELLS = Path("cells") / "UniPC-4" / "uniform"


@pytest.fixture
def model(teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "model"))


def train_on(model: Path) -> None:
    """Moves a norm by less than a schedule would be refused for."""
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"] *= 1.0005
    save_file(weights, path)


def compare(model: Path, *options: str) -> int:
    settings = {
        "model": str(model),
        "samplers": {"UniPC-4": {"scheduler": "UniPCMultistepScheduler", "num_inference_steps": 4, "num_test": 2}},
        "budgets": [0.8, 0.6],
        "policies": ["uniform"],
        "fixed": {"uniform": {"interval": 2, "predictor": "hold"}},
        "guidance_scale": 3.0,
        "tuning": {
            "num_screening_scenes": 1,
            "num_scenes": 1,
            "max_candidates": 1,
            "num_calibration": 1,
            "num_search": 1,
        },
        "grid": {"sampler": "UniPC-4", "budget": 0.6, "num_pictures": 1},
        "output": str(model.parent / "run"),
        "report": str(model.parent / "report"),
    }
    path = model.parent / "compare.yaml"
    path.write_text(yaml.safe_dump(settings))
    return main(["compare", "--config", str(path), *options])


def test_cells_of_other_weights_are_refused_until_all_are_redone(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (model.parent / "run" / CELLS / f"{budget}.json" for budget in (0.8, 0.6))
    assert compare(model, "--budgets", "0.8") == 0
    made = first.stat().st_mtime_ns
    train_on(model)
    assert compare(model, "--budgets", "0.6") == 2
    message = capsys.readouterr().err
    for words in (f"{first} was made with other weights than {model} holds now", "unet.conv_in", "--output", "--redo"):
        assert words in message
    assert first.stat().st_mtime_ns == made
    assert not second.exists()

    assert compare(model, "--budgets", "0.6", "--redo") == 2  # before the work: there would be no report of both
    assert not second.exists()
    assert compare(model, "--redo") == 0
    second.unlink()
    assert compare(model) == 0


def test_there_is_no_report_of_cells_of_two_teachers(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (model.parent / "run" / CELLS / f"{budget}.schedule.json" for budget in (0.8, 0.6))
    assert compare(model) == 0
    content = json.loads(first.read_text())
    content["model"]["unet"]["norms"]["conv_in"] *= 1.0005
    first.write_text(json.dumps(content))
    assert compare(model, "--report_only") == 2
    figures = [path.with_name(path.name.replace(".schedule", "")) for path in (first, second)]
    assert f"{figures[1]} was made with other weights than {figures[0]} was made with" in capsys.readouterr().err


def test_a_report_of_nothing_replaces_none(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = model.parent / "report" / "compare.json"
    kept.parent.mkdir()
    kept.write_text("[]")
    assert compare(model, "--report_only") == 2
    assert "no cell of this comparison has been run" in capsys.readouterr().err
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
