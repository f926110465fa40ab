"""Runs what the README tells people to type, each command made smaller by more arguments."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from hgc_learn.__main__ import build_parser, main
from hgc_learn.teachers import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

SMALL_TRAINING = [
    "--trainer.max_steps=1",
    "--data.num_train=2",
    "--data.num_val=2",
    "--data.batch_size=2",
    "--model.sampling.num_inference_steps=4",
    "--model.objective.num_warm_start_batches=0",
]
SMALL_EXPORT = ["--learning_samples=2", "--reorder_trials=1", "--specialise_updates=1", "--fill_updates=1"]
# What to add so that a command takes seconds. A README command without a row here fails the test below.
MORE_ARGUMENTS: dict[str, list[str]] = {
    "python train.py fit --config configs/demo.yaml": [*SMALL_TRAINING, "--trainer.limit_val_batches=0"],
    "python export.py": SMALL_EXPORT,
    "python -m hgc_learn inspect": [],
    "python -m hgc_learn report": [],
    "python -m hgc_learn macs": [],
    "python -m hgc_learn sites": [],
    "python -m hgc_learn policies": [],
    "python -m hgc_learn schedule": [],
    "python -m hgc_learn compare": [
        *("--samplers", "UniPC-20", "--policies", "fewer_steps", "uniform", "--budgets", "0.25", "--"),
        "--samplers.UniPC-20.num_inference_steps=4",
        "--samplers.UniPC-20.num_test=2",
        "--tuning.num_screening_scenes=1",
        "--tuning.num_scenes=1",
        "--tuning.num_calibration=1",
        "--tuning.num_search=1",
        "--grid.num_pictures=2",
    ],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository and may be written to."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "benchmarks").mkdir()
    for name in ("hgc_learn", "configs", "examples", "train.py", "export.py", "benchmarks/second_teacher"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python` with these arguments, in this process: imports take longer than the commands."""
    if arguments[:2] == ["-m", "hgc_learn"]:
        assert main(arguments[2:]) == 0, arguments
        return
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(arguments[0], run_name="__main__")
    assert not end.value.code, arguments


def test_every_command_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, for they build on each other."""
    monkeypatch.chdir(workplace)
    assert len(commands()) >= len(MORE_ARGUMENTS)
    for command in commands():
        more = next((more for start, more in MORE_ARGUMENTS.items() if command.startswith(start)), None)
        assert more is not None, f"no row for {command!r}"
        _, *arguments = [*shlex.split(command), *more]
        run(arguments, monkeypatch)
    assert (workplace / "runs/export/hgc_schedule.json").is_file()
    for name in ("demo.md", "demo.json", "pareto.png"):
        assert f"benchmarks/compare/{name}" in README
        assert (workplace / "benchmarks/compare" / name).stat().st_size > 500


def test_python_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(workplace)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert "macs_reduction" in capsys.readouterr().out


def test_demo_command(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What `make demo` runs, on fewer scenes and steps; it writes what the README promises."""
    assert "python -m hgc_learn demo" in (ROOT / "Makefile").read_text()
    monkeypatch.chdir(workplace)
    run(["-m", "hgc_learn", "demo", "--num_scenes=4", *SMALL_EXPORT, "--", *SMALL_TRAINING], monkeypatch)
    assert "control mIoU" in capsys.readouterr().out
    for name in ("hgc_schedule.json", "comparison.png", "summary.json"):
        assert (workplace / "runs/demo" / name).stat().st_size > 500


GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("train", "share", "use", "camvid", "comparison", "speed")]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_guides_are_true(guide: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their Python runs, their commands are understood, the configurations they name exist."""
    monkeypatch.chdir(workplace)
    text = guide.read_text()
    for code in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        exec(compile(code, str(guide), "exec"), {})
    for line in re.findall(r"^python .*", text, flags=re.MULTILINE):
        _, *arguments = shlex.split(line)
        if arguments[:2] == ["-m", "hgc_learn"]:
            build_parser().parse_args(arguments[2:])
        elif arguments[:2] == ["-m", "hgc_learn.teachers.train"]:
            train.build_parser().parse_args(arguments[2:])
        elif arguments[0] == "export.py":
            build_parser().parse_args(["export", *arguments[1:]])
        elif arguments[0].startswith("benchmarks/"):
            assert (ROOT / arguments[0]).is_file()
        else:
            assert arguments[:3] == ["train.py", "fit", "--config"]
            assert Path(arguments[3]).is_file()


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDES], ids=lambda path: path.stem)
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_figures_are_the_measured_ones() -> None:
    figures = json.loads((ROOT / "docs/figures/demo.json").read_text())
    assert figures["num_samples"] >= 256
    for text in (
        f"{figures['macs_reduction']:.1%} fewer MACs",
        f"{figures['psnr_db']:.1f} dB",
        f"{figures['control_miou_full']:.4f} | {figures['control_miou_cached']:.4f}",
        f"{figures['color_accuracy_full']:.4f} | {figures['color_accuracy_cached']:.4f}",
        f"{figures['wall_clock_speedup']:.2f}x",
    ):
        assert text in README, text


@pytest.mark.parametrize(("name", "num_rows"), [("demo.md", 8), ("second/second.md", 8)])
def test_comparison_is_the_committed_one(name: str, num_rows: int) -> None:
    report = (ROOT / "benchmarks/compare" / name).read_text()
    summary = report.split("## In short")[1].split("## ")[0]
    done = [line for line in summary.splitlines() if re.match(r"\| \S+ \| \d+% ", line) and not line.endswith(" - |")]
    rows = [line.split(" | ") for line in done]
    assert len(rows) == num_rows
    for sampler, kept, _, *rest in rows:
        assert " | ".join([sampler, kept, *rest]) in README


def test_the_comparison_on_photographs_is_the_committed_one() -> None:
    folder = ROOT / "benchmarks/compare/camvid"
    page = " ".join((ROOT / "docs/camvid.md").read_text().split())
    rows = {(row["policy"], row["budget"]): row for row in json.loads((folder / "camvid.json").read_text())}
    policies = re.findall(r"`(\w+)`", page.split("| MACs kept |")[1].split("|---")[0])
    for budget in (0.5, 0.25):
        figures = [f"{rows[policy, budget]['psnr_db']:.2f}" for policy in policies]
        assert f"| {budget:.0%} | {' | '.join(figures)} |" in page
    latents = [row for row in json.loads((folder / "latents.json").read_text()) if row["policy"] == "learned"]
    assert "{:.2f} and {:.2f} dB".format(*(row["psnr_db"] for row in latents)) in page
    summary = (folder / "camvid.md").read_text().split("## In short")[1].split("## ")[0]
    differences = re.findall(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\] \|", summary)
    assert len(differences) == 2
    for mean, low, high in (map(float, figures) for figures in differences):
        lead = (mean, low, high) if mean > 0 else (-mean, -high, -low)
        text = "{:.2f} dB [{:.2f}, {:.2f}]".format(*lead)
        assert text in page
        assert text in " ".join(README.split())
