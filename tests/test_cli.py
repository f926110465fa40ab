"""The command line: numbers, refusals with one message, what a command needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_schedule import SCHEDULE, changed
from tiny_models import save_configs, shared_pipeline

from hgc_learn.__main__ import COMMANDS, build_parser, guarded, main
from hgc_learn.inference import HGCSchedule


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs the command, which must end with status 2 and one line of error; returns that line."""
    try:
        status = main(argv)
    except SystemExit as error:
        status = error.code
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.endswith("\n")
    assert output.err.count("\n") == 1
    return output.err


def test_inspect_shows_what_the_file_holds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    SCHEDULE.save(tmp_path / "hgc_schedule.json")
    assert main(["inspect", str(tmp_path / "hgc_schedule.json")]) == 0
    text = capsys.readouterr().out
    for part in (
        "UniPCMultistepScheduler, 5 steps, 512x768 pixels, guidance scale 7.5 (with guidance)",
        "981 741.5 501 261 21",
        "scheduler  solver_order=2, beta_end=0.0125, use_karras_sigmas=False, solver_p=None\n",
        "unet: architecture 0123456789abcdef",
        "policy: router",
        "psnr_db: 31.5",
        "saved, attention matmuls not counted: 55.0%",
        "1 out, 1 eps; 3 different steps",
    ):
        assert part in text
    rows = [line.split() for line in text.splitlines()]
    assert ["unet.mid_block.attentions.0:out", "C--C-", "2", "2"] in rows
    assert ["unet:eps", "CC-CC", "4", "1"] in rows


def test_inspect_with_the_model_shows_what_nothing_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny = shared_pipeline("sd15")
    save_configs(tmp_path)
    path = tmp_path / "hgc_schedule.json"
    tiny.schedule({"unet:eps": "C-CC-C", "unet.up_blocks.3.attentions.1:out": "CC-C--"}).save(path)
    assert main(["inspect", str(path), "--model", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert ["unet:eps", "C-CC-C", "4", "1"] in [line.split() for line in text.splitlines()]
    assert ["unet.up_blocks.3.attentions.1:out", "C.-C.-", "2", "2"] in [line.split() for line in text.splitlines()]
    (shares,) = [line.split(": ")[1].split() for line in text.splitlines() if line.startswith("kept")]
    assert (shares[0], shares[1], shares[3]) == ("100%", "0%", "100%")
    assert 0 < int(shares[2].rstrip("%")) < 100
    assert "made for another model" in refused(capsys, "inspect", str(path), "--arch", "sd15")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"height": 1}))
    message = refused(capsys, "inspect", str(path), "--model", str(tmp_path))
    assert "The size is 1x16; this model takes multiples of 2" in message


def test_inspect_of_a_schedule_that_reuses_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(changed(sites={}, producer={}, macs={}, fidelity={})))
    assert main(["inspect", str(path)]) == 0
    assert "none: every step computes all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        (json.dumps(changed(version=9)), "version: the file has version 9"),
        (json.dumps(changed(**{"a\nb\x1b[31m\ud800": 1})), r"a\nb\x1b[31m"),
    ],
)
def test_inspect_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    assert message in refused(capsys, "inspect", str(path))
    assert "cannot be read" in refused(capsys, "inspect", str(tmp_path / "none"))
    assert "FILE" in refused(capsys, "inspect")


def test_strings_of_strangers_do_not_reach_the_terminal_as_they_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(changed(scheduler="\x1b[2J", producer={"a\n": "\ud800"})))
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert r"\x1b[2J" in text
    assert r"\ud800" in text


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            build_parser().parse_args([command, "--help"])
        assert end.value.code == 0
        assert f"usage: hgc_learn {command}" in capsys.readouterr().out
    assert "COMMAND" in refused(capsys)
    assert "invalid choice: 'nothing'" in refused(capsys, "nothing")


@pytest.mark.parametrize("arguments", [["fit", "--config", "none.yaml"], ["fit", "--model.nothing=1"], ["fitt"]])
def test_wrong_settings_of_a_training_are_told_in_a_few_lines(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """jsonargparse's usage has all settings in it."""
    with pytest.raises(SystemExit) as end:
        main(["train", *arguments])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3


ROOT = Path(__file__).parents[1]
# Runs what its first argument says with what `pip install .` does not install hidden, then looks for it.
CORE_ONLY = """
import sys
from importlib.machinery import PathFinder

ABSENT = {"lightning", "pytorch_lightning", "datasets", "torchmetrics", "jsonargparse", "matplotlib", "tensorboard",
          "rich", "scipy", "sklearn", "pymoo", "cv2", "pandas", "pyarrow", "accelerate", "peft"}

class CoreOnly(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path = [CoreOnly if finder is PathFinder else finder for finder in sys.meta_path]
exec(sys.argv.pop(1))
assert not ABSENT & set(sys.modules), ABSENT & set(sys.modules)
"""


def run_with_the_core(program: str, *argv: str) -> str:
    command = [sys.executable, "-c", CORE_ONLY, program, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_install_is_enough_for_commands(tmp_path: Path) -> None:
    """Without lightning, datasets, torchmetrics and the like, and without loading transformers."""
    SCHEDULE.save(tmp_path / "hgc_schedule.json")
    commands = [
        ["inspect", str(tmp_path / "hgc_schedule.json")],
        ["macs", "--arch", "sd15-controlnet", "--size", "64"],
        ["policies"],
        ["report", "examples/demo_schedule.json", "--output", str(tmp_path / "report.html")],
    ]
    program = """if True:
        import json
        ABSENT.add("transformers")
        from hgc_learn.__main__ import main
        for command in json.loads(sys.argv[1]):
            assert main(command) == 0, command
            if command[0] == "inspect":
                assert "diffusers" not in sys.modules  # which takes seconds
        import hgc_learn.inference
    """
    assert run_with_the_core(program, json.dumps(commands))


def test_the_core_install_is_enough_to_run_a_schedule_and_to_name_what_else_is_needed() -> None:
    needed = {
        "jsonargparse": "export --ckpt_path last.ckpt --output x",
        "matplotlib": "compare --config configs/compare/demo.yaml",
        "rich": "report examples/demo_schedule.json --output x --model hgc_learn/demo/teacher --num_pictures 1",
    }
    program = """if True:
        import contextlib
        sys.path.insert(0, "tests")
        from tiny_models import build_pipeline
        from hgc_learn.__main__ import main
        from hgc_learn.inference import apply_schedule
        tiny = build_pipeline("small")
        with apply_schedule(tiny.pipe, tiny.schedule({"unet:eps": "C-CCC-"})) as handle:
            tiny()
            print(handle.stats()["macs_reduction"])
        with contextlib.redirect_stderr(sys.stdout):
            for command in sys.argv[1:]:
                assert main(command.split()) == 2, command
    """
    reduction, *lines = run_with_the_core(program, *needed.values()).splitlines()
    assert float(reduction) == pytest.approx(1 / 3)
    for package, line in zip(needed, lines, strict=True):
        assert line.startswith(f"hgc_learn: this needs {package}, which is not installed: pip install '.[train,")


def test_the_module_runs_and_its_errors_have_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hgc_learn", "inspect", str(tmp_path / "none.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"hgc_learn: {tmp_path / 'none.json'}: cannot be read (No such file or directory).\n"


def test_the_demo_refuses_an_impossible_budget_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--budget", "7", "--output", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert "hgc_learn: A budget of 7.0 cannot be met" in output.err.splitlines()[-1]
    assert "exporting" not in output.out
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated")  # of diffusers
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere/at/all"], "model: 'nowhere/at/all' is neither a folder here nor a hub id"),
        (["--model", "nobody/nothing"], "model: 'nobody/nothing' cannot be loaded as a diffusers pipeline"),
        (["--model", "docs"], "model: 'docs' cannot be loaded as a diffusers pipeline"),
        (["--controlnet_model", "hgc_learn/demo/teacher"], "controlnet: 'hgc_learn/demo/teacher' is a whole pipeline"),
        (["--controlnet_model", "docs"], "controlnet: 'docs' cannot be loaded as a ControlNet"),
        (["--controlnet_model", "nobody/nothing"], "controlnet: 'nobody/nothing' cannot be loaded as a ControlNet"),
    ],
)
def test_models_that_are_not_there_are_told_in_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if options[0] != "--model":
        options = ["--model", "hgc_learn/demo/teacher", *options]
    argv = ["schedule", "uniform", *options, "--interval", "2", "--output", str(tmp_path / "file.json")]
    assert main(argv) == 2
    assert f"hgc_learn: {message}" in capsys.readouterr().err.splitlines()[-1]


def test_an_interruption_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise KeyboardInterrupt

    assert guarded(run) == 130
    assert capsys.readouterr().err == "hgc_learn: interrupted\n"


def test_errors_say_where_they_come_from_if_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        raise ValueError("of one's own module")

    assert guarded(run) == 2
    assert capsys.readouterr().err == "hgc_learn: of one's own module\n"
    monkeypatch.setenv("HGC_TRACEBACK", "1")
    with pytest.raises(ValueError, match="own module"):
        guarded(run)


def test_where_nothing_can_be_written_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = tmp_path / "schedule.json", tmp_path / "a.json"
    SCHEDULE.save(source)
    folder.mkdir()
    page = ["report", str(source), "--output"]
    assert "is a folder" in refused(capsys, *page, str(tmp_path))
    assert "would be an HTML page" in refused(capsys, *page, str(source))
    assert HGCSchedule.load(source) == SCHEDULE
    policy = ["schedule", "uniform", "--model", "nowhere/at/all", "--output"]
    assert "a schedule's file ends in .json" in refused(capsys, *policy, str(tmp_path))
    assert "a.json is a folder" in refused(capsys, *policy, str(folder))
