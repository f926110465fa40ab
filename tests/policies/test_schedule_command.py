"""`hgc_learn policies` and `hgc_learn schedule`: knobs from signatures, a file on success, nothing on error."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from PIL import Image

from hgc_learn.__main__ import main
from hgc_learn.commands.schedule import policy_parser
from hgc_learn.inference import HGCSchedule
from hgc_learn.policies import POLICIES


@pytest.fixture(scope="module")
def teacher(deep_teacher: Path) -> str:
    return str(deep_teacher)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs the command, which must end with status 2; returns the last line of its errors (loading shows progress)."""
    try:
        status = main(argv)
    except SystemExit as error:
        status = error.code
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    return output.err.splitlines()[-1]


def test_policies_lists_all_with_their_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n") == 2 * len(POLICIES)
    for policy in POLICIES.values():
        assert f"{policy.name} " in text
        assert f" {policy.summary}\n" in text
        assert f" {policy.paper}\n" in text


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_has_options_for_all_its_knobs(name: str) -> None:
    policy = POLICIES[name]
    parser = policy_parser(policy, argparse.ArgumentParser, "prog")
    args = parser.parse_args(["--model", "m", "--output", "o"])
    assert {knob: getattr(args, knob) for knob in policy.knobs} == policy.knobs
    described = {action.dest: action.help for action in parser._actions}
    assert all(str(described[knob]).partition(" (default")[0] for knob in policy.knobs)


def test_help_shows_knobs_their_texts_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["schedule", "deepcache", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: hgc_learn schedule deepcache" in text
    assert "arXiv 2312.00858" in text
    assert "--interval INTERVAL steps per full step; 2.5 for the steps 0, 2, 5, 7, ... (default 3)" in text
    assert "--spacing {uniform,quadratic}" in text
    assert "--center CENTER of the quadratic spacing, a step; 3/10 of the run if not given." in text


def test_schedule_writes_what_the_knobs_say(capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: str) -> None:
    path = tmp_path / "new" / "hgc_schedule.json"
    argv = ["--model", teacher, "--steps", "6", "--output", str(path)]
    assert main(["schedule", "deepcache", *argv, "--interval", "2", "--branch", "3", "--control", "fresh"]) == 0
    schedule = HGCSchedule.load(path)
    assert schedule.sites == {"unet.up_blocks.2.attentions.1:out": "C-C-C-"}
    assert schedule.guidance_scale == 7.5
    assert (schedule.height, schedule.width) == (64, 64)
    assert schedule.scheduler == "UniPCMultistepScheduler"
    assert schedule.producer["settings"]["interval"] == 2
    assert schedule.producer["settings"]["spacing"] == "uniform"
    output = capsys.readouterr().out
    assert f"wrote {path}" in output
    assert f"{schedule.macs['cached'] / schedule.macs['full']:.1%} of" in output

    argv += ["--size", "128x64", "--guidance_scale", "1", "--scheduler", "DDIMScheduler", "--keys", "0", "3"]
    assert main(["schedule", "faster_diffusion", *argv]) == 0
    schedule = HGCSchedule.load(path)
    assert set(schedule.sites.values()) == {"C--C--"}
    assert (schedule.height, schedule.width, schedule.guidance_scale) == (128, 64, 1)
    assert schedule.scheduler == "DDIMScheduler"
    assert schedule.scheduler_config["set_alpha_to_one"]

    argv += ["--scheduler_config", '{"set_alpha_to_one": false}']
    assert main(["schedule", "faster_diffusion", *argv]) == 0
    assert not HGCSchedule.load(path).scheduler_config["set_alpha_to_one"]


def test_schedule_refuses_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: str) -> None:
    path = tmp_path / "hgc_schedule.json"
    argv = ["--model", teacher, "--steps", "6", "--output", str(path)]
    assert "there are block_caching" in refused(capsys, "schedule", "nothing")
    assert "POLICY" in refused(capsys, "schedule")
    assert "required: --model, --output" in refused(capsys, "schedule", "deepcache")
    assert "unrecognized arguments: --depth" in refused(capsys, "schedule", "deepcache", *argv, "--depth", "3")
    assert "invalid choice: 'odd'" in refused(capsys, "schedule", "deepcache", *argv, "--spacing", "odd")
    assert "branches 0 to 11" in refused(capsys, "schedule", "deepcache", *argv, "--branch", "12")
    for text in ("use_karras_sigmas", "[1]"):
        assert "no JSON object" in refused(capsys, "schedule", "deepcache", *argv, "--scheduler_config", text)
    assert "--num_samples is 0" in refused(capsys, "schedule", "deepcache", *argv, "--num_samples", "0")
    assert "multiples of 8" in refused(capsys, "schedule", "deepcache", *argv, "--size", "65")
    assert "--data" in refused(capsys, "schedule", "hyca", *argv)
    assert "neither a folder" in refused(capsys, "schedule", "uniform", "--model", "none", "--output", str(path))
    assert list(tmp_path.iterdir()) == []


def test_schedule_measures_on_a_folder_of_control_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 40, 90)).save(data / f"{i}.png")
        rows.append(f'{{"file_name": "{i}.png", "conditioning_image_file_name": "{i}.png", "text": "a red star"}}\n')
    (data / "metadata.jsonl").write_text("".join(rows))
    path = tmp_path / "hgc_schedule.json"
    argv = ["--model", teacher, "--steps", "4", "--output", str(path), "--data", str(data)]
    assert main(["schedule", "hyca", *argv, "--num_samples", "3", "--batch_size", "2"]) == 0
    assert HGCSchedule.load(path).sites
    assert "MACs kept" in capsys.readouterr().out
    assert "num_train + num_val asks for 4" in refused(capsys, "schedule", "hyca", *argv, "--num_samples", "4")
