"""Whole comparisons on a tiny pipeline: what is written, what a second run does, what goes wrong and how it is told."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from processes import run_python, start
from small_comparison import SAMPLER, rows, write
from torch import Tensor

from hgc_learn.__main__ import main
from hgc_learn.comparison.cells import Selection, cell_files, read_cell
from hgc_learn.comparison.config import CompareConfig, read_config
from hgc_learn.comparison.samples import claim, full_samples, read_batches
from hgc_learn.comparison.trained import checkpoint
from hgc_learn.evaluation import Samples
from hgc_learn.files import save_json
from hgc_learn.inference import apply_schedule
from hgc_learn.models.fingerprint import ModelFingerprint
from hgc_learn.models.macs import BudgetError
from hgc_learn.policies import POLICIES, Policy
from hgc_learn.sampling import generate, load_pipeline
from hgc_learn.schedule import HGCSchedule
from hgc_learn.setting import Draft, Setting
from hgc_learn.training.module import RouterModule

ROOT = Path(__file__).parent.parent.parent


def test_a_comparison_writes_figures_reasons_tables_and_pictures(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["samplers"][SAMPLER]["scheduler_config"] = {"solver_order": 1}
    config = write(settings, tmp_path)
    begun = tmp_path / "run" / "trained" / SAMPLER / "uniform" / "trained.json"  # as of a training that runs elsewhere
    save_json(begun, {"training": "x.yaml", "configuration": {}})
    assert main(["compare", "--config", str(config)]) == 0
    found = rows(settings)
    assert len(found) == 4
    row = found["uniform", 0.6]
    assert row["sampler"] == SAMPLER
    assert row["num_samples"] == 3
    assert row["kept_macs"] <= 0.602
    assert row["psnr_ci"][0] <= row["psnr_db"] <= row["psnr_ci"][1]
    assert row["settings"]["interval"] in (5 / 3, 2)  # three of five steps in full
    assert row["tuning"]["num_tried"] == 4
    assert row["tuning"]["sample_rollouts"] == 4 * 1 + 2 * 1  # four candidates on one scene, two of them on two
    for name in ("ssim", "latent_rel_l2", "control_miou", "color_accuracy", "fid"):
        assert isinstance(row[name], float), name
    assert "keeps at least 0.2" in found["uniform", 0.1]["reason"]
    assert "psnr_db" not in found["uniform", 0.1]
    text = (tmp_path / "report" / "tiny.md").read_text()
    assert f"## {SAMPLER}, 60% of the MACs" in text
    assert "`uniform` is not here: keeps at least" in text
    assert "| MACs | with attention |" in text
    assert f"- `uniform`: {POLICIES['uniform'].paper}" in text
    for name in ("pareto.png", "grid.png"):
        assert (tmp_path / "report" / name).stat().st_size > 5000
    schedule = HGCSchedule.load(tmp_path / "run" / "cells" / SAMPLER / "uniform" / "0.6.schedule.json")
    assert schedule.producer["policy"] == "uniform"
    assert schedule.producer["paper"] == POLICIES["uniform"].paper
    assert schedule.fidelity["psnr_db"] == row["psnr_db"] == pytest.approx(paired_psnr(config, schedule), abs=0.01)
    assert schedule.scheduler_config["solver_order"] == 1

    figures = tmp_path / "run" / "cells" / SAMPLER / "uniform" / "0.6.json"
    edited = json.loads(figures.read_text()) | {"kept_macs_attention": 0.1234}
    edited["tuning"]["resumed"] = True  # as by an export that was interrupted
    figures.write_text(json.dumps(edited))
    assert "≥" not in costs(text, "uniform")
    assert main(["compare", "--config", str(config), "--timing"]) == 0
    assert costs((tmp_path / "report" / "tiny.md").read_text(), "uniform").count("| ≥ ") == 2  # rollouts and minutes
    assert rows(settings)["uniform", 0.6]["wall_clock_speedup"] > 0
    assert f" | {row['kept_macs']:.4f} | 0.1234 | " in (tmp_path / "report" / "tiny.md").read_text()


def costs(text: str, policy: str) -> str:
    """The row of a policy in the table of what tuning cost."""
    (line,) = (line for line in text.partition("## What tuning cost")[2].splitlines() if f"| `{policy}` |" in line)
    return line


def paired_psnr(path: Path, schedule: HGCSchedule) -> float:
    """Mean over the test scenes, by the pipeline and the definition alone."""
    config = read_config(path)
    (batch,) = read_batches(config, "test", 3, 3)
    pipe = load_pipeline(config.model, config.sampling(SAMPLER))

    def pictures() -> Tensor:
        return generate(pipe, config.sampling(SAMPLER), batch, output_type="pt")

    full = pictures()
    with apply_schedule(pipe, schedule):
        errors = (pictures() - full).square().flatten(1).mean(1)
    return float((-10 * errors.log10()).mean())


def test_a_comparison_on_ones_own_pictures(settings: dict[str, Any], tmp_path: Path) -> None:
    """Paired figures only: nothing here reads controls off photographs."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows_of_data = []
    for i in range(8):
        Image.new("RGB", (40, 30), (30 * i, 0, 0)).save(folder / f"{i}.png")
        rows_of_data.append({"file_name": f"{i}.png", "text": f"red {i}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows_of_data)))
    settings |= {"policies": ["uniform", "smoothcache"], "budgets": [0.6]}
    settings["data"] = {"dataset": str(folder), "conditioning_image_column": "image", "train_split": "train[:2]"}
    settings["data"] |= {"validation_split": "train[2:5]", "test_split": "train[5:]"}
    config = write(settings, tmp_path)
    tests = read_batches(read_config(config), "test", 2, 2, offset=1)[0]
    (more,) = read_batches(read_config(config), "test", 3, 3)
    assert sorted(more["text"]) == ["red 5", "red 6", "red 7"]
    assert tests["text"] == more["text"][1:]
    assert tests["seed"].tolist() == more["seed"].tolist()[1:]
    assert torch.allclose(
        tests["conditioning_image"][:, 0, 0, 0], torch.tensor([30.0 * int(text[-1]) for text in tests["text"]]) / 255
    )
    assert (
        len({int(read_batches(read_config(config), s, 1, 1)[0]["seed"]) for s in ("train", "validation", "test")}) == 3
    )

    assert main(["compare", "--config", str(config)]) == 0
    row = rows(settings)["uniform", 0.6]
    assert row["num_samples"] == 3
    assert row["psnr_db"] > 0 and row["ssim"] <= 1
    assert not {"control_miou", "color_accuracy", "fid", "full"} & set(row)
    text = (tmp_path / "report" / "tiny.md").read_text()
    assert "is not measured" in text
    assert "mIoU" not in text
    assert (tmp_path / "report" / "grid.png").stat().st_size > 5000

    settings["data"]["test_split"] = "train[6:]"
    assert main(["compare", "--config", str(write(settings, tmp_path)), "--redo"]) == 2  # two rows for num_test: 3


def test_a_killed_comparison_goes_on_where_it_was(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["budgets"] = [0.8, 0.6, 0.4]
    path = write(settings, tmp_path)
    process = start(run_python, ["-m", "hgc_learn", "compare", "--config", str(path)])
    first = tmp_path / "run" / "cells" / SAMPLER / "uniform" / "0.8.json"
    deadline = time.monotonic() + 300
    while not first.is_file() and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert first.is_file()
    config = read_config(path)
    cells = list(Selection.of(config).cells())
    done = [cell for cell in cells if read_cell(config, *cell) is not None]
    assert 1 <= len(done) < len(cells)
    times = {cell: cell_files(config, *cell).figures.stat().st_mtime_ns for cell in done}

    assert main(["compare", "--config", str(path)]) == 0
    assert all(cell_files(config, *cell).figures.stat().st_mtime_ns == times[cell] for cell in done)
    assert len(rows(settings)) == len(cells)


def test_a_policy_that_fails_is_told_and_does_not_stop_the_others(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    works = False

    def fragile(setting: Setting) -> Draft:
        if not works:
            raise KeyError("a mistake in the code")
        return Draft({setting.graph.output: "C--CC"})

    monkeypatch.setitem(POLICIES, "fragile", Policy("fragile", fragile, "none", lambda setting: {}))
    settings |= {"policies": ["fragile", "uniform"], "budgets": [0.6]}
    path = write(settings, tmp_path)
    assert main(["compare", "--config", str(path)]) == 2
    output = capsys.readouterr()
    assert "FAILED" in output.out
    assert "1 cells failed" in output.err
    found = rows(settings)
    assert "a mistake in the code" in found["fragile", 0.6]["error"]
    assert "reason" not in found["fragile", 0.6]
    assert "psnr_db" in found["uniform", 0.6]

    works = True
    assert main(["compare", "--config", str(path)]) == 0
    assert rows(settings)["fragile", 0.6]["kept_macs"] == pytest.approx(0.6)


def test_a_missing_package_is_told_and_no_failure_of_the_policy(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def clusters(setting: Setting) -> Draft:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.cluster")

    monkeypatch.setitem(POLICIES, "clusters", Policy("clusters", clusters, "none", lambda setting: {}))
    settings |= {"policies": ["clusters"], "budgets": [0.6]}
    assert main(["compare", "--config", str(write(settings, tmp_path))]) == 2
    assert "this needs sklearn, which is not installed: pip install" in capsys.readouterr().err
    assert not (tmp_path / "run" / "cells" / SAMPLER / "clusters" / "0.6.json").exists()
    assert not (tmp_path / "report").exists()


def test_policies_that_refuse_everything(settings: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """A budget that a policy says it cannot meet is a reason; anything else that it refuses is a failure."""

    def strict(setting: Setting, *, budget: float = 0.5) -> Draft:
        raise BudgetError(f"A budget of {budget} cannot be met.")

    def picky(setting: Setting) -> Draft:
        raise ValueError("It wants other samples, whatever the budget.")

    def both(setting: Setting, *, budget: float = 0.5, interval: int = 2) -> Draft:
        if interval == 3:
            raise BudgetError(f"A budget of {budget} cannot be met.")
        raise ValueError("It was trained for 3.")

    for write_draft in (strict, picky, both):
        policy = Policy(write_draft.__name__, write_draft, "none", lambda setting: {})
        monkeypatch.setitem(POLICIES, policy.name, policy)
    monkeypatch.setitem(POLICIES, "both", Policy("both", both, "none", lambda setting: {"interval": [2, 3, 4]}))
    settings |= {"policies": ["strict", "picky", "both"], "budgets": [0.6]}
    assert main(["compare", "--config", str(write(settings, tmp_path))]) == 2
    found = rows(settings)
    assert found["strict", 0.6]["reason"] == found["both", 0.6]["reason"] == "A budget of 0.6 cannot be met."
    assert "It wants other samples, whatever the budget." in found["picky", 0.6]["error"]


def test_schedules_that_lose_their_trajectories_lose(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tuning to all that do not; where there is nothing else the cell fails, and is told."""

    def lossy(setting: Setting, *, scale: float = 1.0, interval: int = 2) -> Draft:
        row = "".join("t" if step % interval else "C" for step in range(setting.num_steps))
        scales = torch.full((row.count("t"), 4), scale)
        return Draft({"unet:eps": row}, {"unet:eps/scale": scales, "unet:eps/reach": torch.zeros_like(scales)})

    for name, scales in (("risky", [1e38, 1.0]), ("lost", [1e38])):
        grid = {"scale": scales, "interval": [2]}
        monkeypatch.setitem(POLICIES, name, Policy(name, lossy, "none", lambda setting, grid=grid: grid))
    settings |= {"policies": ["risky", "lost"], "budgets": [0.6]}
    assert main(["compare", "--config", str(write(settings, tmp_path))]) == 2
    found = rows(settings)
    assert found["risky", 0.6]["settings"]["scale"] == 1.0
    assert "not finite" in found["lost", 0.6]["error"]


def test_references_are_of_the_samples_that_they_are_asked_for(
    module: RouterModule, batch: dict[str, Any], tmp_path: Path
) -> None:
    def references(batch: dict[str, Any]) -> Samples:
        path = tmp_path / "references.safetensors"
        return full_samples(path, module.pipe, module.sampling, "test", [batch], weights={})

    first = references(batch)
    assert torch.equal(references(batch).latents, first.latents)
    for other in (
        batch | {"text": batch["text"][::-1]},
        batch | {"conditioning_image": batch["conditioning_image"].flip(0)},
    ):
        assert not torch.equal(references(other).latents, first.latents)


def test_work_is_claimed_by_one_at_a_time(tmp_path: Path) -> None:
    with claim(tmp_path / "lock") as mine:
        assert mine
        with claim(tmp_path / "lock") as also_mine:
            assert not also_mine
    with claim(tmp_path / "lock") as mine:
        assert mine


@pytest.mark.nightly
def test_two_processes_share_the_cells_and_find_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["policies"] = ["deepcache", "faster_diffusion", "fewer_steps", "tgate", "uniform"]
    alone = settings | {"output": str(tmp_path / "alone"), "report": str(tmp_path / "alone_report")}
    assert main(["compare", "--config", str(write(alone, tmp_path))]) == 0
    path = write(settings, tmp_path)
    command, printed = ["-m", "hgc_learn", "compare", "--config", str(path)], [tmp_path / "first", tmp_path / "second"]
    processes = [start(run_python, command, output=output) for output in printed]
    for process in processes:
        process.join()
    outputs = [output.read_text() for output in printed]
    assert [process.exitcode for process in processes] == [0, 0]
    assert main(["compare", "--config", str(path)]) == 0  # who ended first reported what was there
    found, expected = rows(settings), rows(alone)
    assert found.keys() == expected.keys()
    for cell in expected:
        assert found[cell].get("psnr_db") == expected[cell].get("psnr_db")
        assert found[cell].get("reason") == expected[cell].get("reason")
    for policy in settings["policies"]:  # nothing was run twice
        assert sum(f"{SAMPLER} {policy} 0.6: " in output for output in outputs) == 1


def test_a_checkpoint_is_trained_once_and_resumed(settings: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    config = CompareConfig(**read_config(write(settings, tmp_path)).__dict__)
    pipe = load_pipeline(str(teacher), config.sampling(SAMPLER))
    weights = ModelFingerprint.of(pipe.unet, pipe.controlnet)

    def get() -> Path:
        return checkpoint(config, SAMPLER, "learned", weights)

    with pytest.raises(ValueError, match=r"learned-UniPC-5\.yaml.*does not exist"):
        get()
    training = {
        "model": {
            "model": str(teacher),
            "sampling": {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 64, "width": 64},
            "budgets": [0.5],
            "objective": {"class_path": "Rollout", "init_args": {"num_warm_start_batches": 1}},
        },
        "data": {"class_path": "SceneDataModule", "init_args": {"num_train": 2, "num_val": 2, "batch_size": 2}},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False, "logger": False},
    }
    configuration = tmp_path / f"learned-{SAMPLER}.yaml"
    configuration.write_text(yaml.safe_dump(training))
    path = get()
    made = path.stat().st_mtime_ns
    assert get() == path
    assert path.stat().st_mtime_ns == made
    done = path.with_name("trained.json")
    assert json.loads(done.read_text())["resumed"] is False
    interrupted = {name: value for name, value in json.loads(done.read_text()).items() if name != "minutes"}
    done.write_text(json.dumps(interrupted))
    configuration.write_text(yaml.safe_dump(training | {"seed_everything": 1}))
    with pytest.raises(ValueError, match="trained by another configuration than"):
        get()
    configuration.write_text(yaml.safe_dump(training))
    get()
    assert json.loads(done.read_text())["resumed"] is True
    doubled = {model: {name: 2 * norm for name, norm in norms.items()} for model, norms in weights.norms.items()}
    with pytest.raises(ValueError, match=r"last\.ckpt was trained for other weights than .*Remove .*to train anew"):
        checkpoint(config, SAMPLER, "learned", replace(weights, norms=doubled))
    configuration.write_text("model: [")
    with pytest.raises(ValueError, match=r"learned-UniPC-5\.yaml is not YAML"):
        get()
