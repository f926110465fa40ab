"""`hgc_learn bench`: what it measures of real runs, and the tables made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import GUIDANCE_SCALE, IMAGE_SIZE, NUM_STEPS, build_pipeline

from hgc_learn import speed
from hgc_learn.__main__ import main
from hgc_learn.commands.bench import _adapted
from hgc_learn.inference import apply_schedule
from hgc_learn.sampling import SamplingConfig
from hgc_learn.setting import Setting

ROOT = Path(__file__).parent.parent
TEACHER = ROOT / "hgc_learn/demo/teacher"
PACKAGE = "DeepCache package I3B0"
FIGURES = sorted((ROOT / "benchmarks/speed").glob("*.json"))


def bench(model: Path, output: Path, *arguments: str) -> dict[str, dict]:
    assert main(["bench", "--model", str(model), "--size", "64", "--output", str(output), *arguments]) == 0
    return {row["schedule"]: row for row in json.loads(output.read_text())}


def test_rows_of_policies_files_and_peers(teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("DeepCache")
    rule, file = "deepcache:interval=2,control=fresh", tmp_path / "uniform.json"
    options = ["--model", str(teacher), "--size", "64", "--steps", "4"]
    assert main(["schedule", "uniform", *options, "--output", str(file)]) == 0
    more = ["--steps", "4", "--policy", "all-compute", "--policy", rule, "--schedule", str(file), "--peers"]
    other = tmp_path / "other" / file.name  # of the same name, with another schedule
    assert main(["schedule", "uniform", *options, "--interval", "4", "--output", str(other)]) == 0
    more += ["--rounds", "1", "--schedule", str(other)]
    rows = bench(teacher, tmp_path / "speed.json", *more)
    names = [name.rpartition(" ")[0] for name in rows]
    assert names[2:4] == [str(file), str(other)]
    assert [*rows][:2] == ["all-compute", rule]
    assert [*rows][4:] == [PACKAGE]
    of_file, of_other = [*rows.values()][2:4]
    assert of_other["macs_ratio"] > of_file["macs_ratio"] > 1.3
    computes, cached = rows["all-compute"], rows[rule]
    assert computes["macs_ratio"] == 1
    assert computes["overhead"] == pytest.approx(1 / computes["speedup"] - 1, abs=1e-3)
    assert cached["macs_ratio"] > 1.3
    assert cached["efficiency"] == pytest.approx(cached["speedup"] / cached["macs_ratio"], abs=1e-3)
    assert cached["predicted_cache_bytes"] == cached["cache_bytes"] > 0
    assert len(cached["pairs"]) == 1
    again = bench(teacher, tmp_path / "speed.json", *more)
    assert len(again[rule]["pairs"]) == 2
    assert again[rule]["pairs"][0] == cached["pairs"][0]
    assert f"| `{rule}` | 2 |" in (tmp_path / "speed.md").read_text()


def test_choices_per_channel_are_repeated_for_another_width() -> None:
    tiny, site = build_pipeline("small"), "unet.mid_block.resnets.0:out"
    tensors = {f"{site}/predictor": torch.tensor([0, 1, 0, 1], dtype=torch.uint8)}
    schedule = tiny.schedule({site: "C" + "p" * (NUM_STEPS - 1)}, tensors=tensors)
    setting = Setting.of_pipeline(tiny.pipe, SamplingConfig(NUM_STEPS, GUIDANCE_SCALE, IMAGE_SIZE, IMAGE_SIZE))
    adapted = _adapted(schedule, "file", tiny.pipe, setting)
    assert adapted.tensors[f"{site}/predictor"].tolist() == 4 * [0, 1, 0, 1]
    apply_schedule(tiny.pipe, adapted)
    assert tiny().isfinite().all()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_compiled_rows_are_told_apart(tmp_path: Path) -> None:
    more = ["--steps", "2", "--rounds", "1", "--policy", "all-compute"]
    bench(TEACHER, tmp_path / "speed.json", *more)
    bench(TEACHER, tmp_path / "speed.json", *more, "--compile")
    plain, compiled = json.loads((tmp_path / "speed.json").read_text())
    assert (plain["compiled"], compiled["compiled"]) == (False, True)
    assert plain["macs"] == compiled["macs"] > 0
    assert "float32, compiled block by block. " in (tmp_path / "speed.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "nonsense"], "there is no policy 'nonsense'"),
        (["--policy", "deepcache:interval"], "--interval: expected one argument"),
        (["--policy", "deepcache:interval=often"], "--interval: 'often' is not a finite number"),
        (["--policy", "deepcache:foo=1"], "unrecognized arguments: --foo 1"),
        (["--policy", "faster_diffusion:keys=0,5,99"], "keys are 0, 5, 99; they begin with 0"),
        (["--device", "banana"], "invalid choice: 'banana'"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--output", "speed.md"], "--output is speed.md; it must end in .json"),
        (["--size", "50"], "must be a multiple of"),
        (["--schedule", str(ROOT / "examples/demo_schedule.json"), "--steps", "3"], "--steps accordingly"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "speed.json")
    try:
        assert main(["bench", "--model", str(TEACHER), "--size", "64", "--output", output, *arguments]) != 0
    except SystemExit as exit:  # argparse's way
        assert exit.code != 0
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_where_the_peak_of_memory_cannot_be_read_all_else_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(speed.ctypes, "CDLL", absent)
    setting = dict.fromkeys(speed.KEY, "") | {"guidance_scale": 7.5, "compiled": False, "schedule": "a"}
    ran: list[bool] = []
    peak = speed._peak_memory(lambda: ran.append(True), torch.device("cpu"))
    assert ran
    row = speed.row(setting, speed.RunCost(200, peak), speed.RunCost(100, peak, 0, 0), [(2.0, 1.0)])
    assert row["macs_ratio"] == row["speedup"] == 2
    assert row["peak_memory_ratio"] is None
    assert "| 1.00 [1.00, 1.00] | - |" in speed.markdown([row])


@pytest.mark.parametrize("content", ["broken", '[{"arch": "sd15"}]', "3"])
def test_another_file_is_not_written_over(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    assert main(["bench", "--model", str(TEACHER), "--output", str(path)]) != 0
    assert "is no file of hgc_learn bench" in capsys.readouterr().err
    assert path.read_text() == content


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_committed_tables_are_made_of_the_committed_figures(path: Path) -> None:
    table = speed.markdown([*speed.read_rows(path).values()])
    assert path.with_suffix(".md").read_text() == table + "\n"
    assert table in (ROOT / "docs/speed.md").read_text()


def test_readme_has_the_measured_figures() -> None:
    section = (ROOT / "README.md").read_text().split("## On the clock")[1].split("## ")[0]
    rows = [*speed.read_rows(ROOT / "benchmarks/speed/gpu.json").values()]
    figures = [f"{row['speedup']:.2f}x" for row in rows if row["macs_ratio"] > 1.1 and "hgc:" not in row["schedule"]]
    (computes,) = (row for row in rows if row["schedule"] == "all-compute")
    low, high = computes["speedup_interval"]
    figures.append(f"{computes['speedup']:.2f}x [{low:.2f}, {high:.2f}]")
    assert len(figures) == 7
    for figure in figures:
        assert figure in section.replace("\n", " "), figure
