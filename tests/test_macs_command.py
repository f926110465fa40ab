"""`hgc_learn macs`: what it counts, for architectures and folders, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_cli import refused
from test_schedule import SCHEDULE
from tiny_models import IMAGE_SIZE, NUM_STEPS, save_configs, shared_pipeline

from hgc_learn.__main__ import main
from hgc_learn.inference import apply_schedule


def test_macs_of_sd15_in_both_conventions(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["macs", "--arch", "sd15-controlnet", "--steps", "20", "--size", "512", "--guidance_scale", "7.5"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["macs"] == pytest.approx(18.20e12, rel=0.005)
    assert result["macs_with_attention"] == pytest.approx(21.73e12, rel=0.005)
    per_forward = result["macs_per_forward_per_sample"]
    assert per_forward["unet"]["macs"] == pytest.approx(338.6e9, rel=0.005)
    assert per_forward["controlnet"]["macs"] == pytest.approx(116.4e9, rel=0.005)
    assert per_forward["unet"]["macs_with_attention"] == pytest.approx(401.6e9, rel=0.005)
    assert per_forward["controlnet"]["macs_with_attention"] == pytest.approx(141.6e9, rel=0.005)
    assert "not counted" in result["conventions"]["macs"]
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert "18.20e12" in table
    assert "21.73e12" in table


def test_guidance_doubles_and_steps_multiply(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_configs(tmp_path)

    def macs(*argv: str) -> int:
        assert main(["macs", "--model", str(tmp_path), "--json", *argv]) == 0
        return json.loads(capsys.readouterr().out)["macs"]

    one = macs("--steps", "1", "--guidance_scale", "1")
    assert macs("--steps", "1", "--guidance_scale", "7.5") == 2 * one
    assert macs("--steps", "3", "--guidance_scale", "0") == 3 * one
    assert macs("--steps", "1", "--guidance_scale", "1", "--size", "16") == one
    assert macs("--steps", "1", "--guidance_scale", "1", "--size", "16x32") > 1.5 * one


def test_macs_of_a_folder_and_a_schedule(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny = shared_pipeline("sd15")
    save_configs(tmp_path)
    path = tmp_path / "hgc_schedule.json"
    schedule = tiny.schedule({"unet:eps": "C-C-C-"})
    schedule.save(path)
    assert main(["macs", "--model", str(tmp_path), "--schedule", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_tokens"] == 9
    assert (result["height"], result["width"]) == (IMAGE_SIZE, IMAGE_SIZE)
    assert result["num_steps"] == NUM_STEPS
    assert result["macs_reduction"] == 0.5
    assert result["macs_cached"] * 2 == result["macs"]
    assert [macs > 0 for macs in result["macs_cached_per_step"]] == [True, False] * 3
    with apply_schedule(tiny.pipe, schedule) as handle:
        assert handle.stats()["macs_cached"] < result["macs_cached"] * 1.2
    assert main(["macs", "--model", str(tmp_path), "--schedule", str(path)]) == 0
    assert "50.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer/tokenizer_config.json", {"model_max_length": None}, "json: model_max_length is None"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "77"}, "json: model_max_length is '77'"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": -3}, "json: model_max_length is -3"),
        ("vae/config.json", {"block_out_channels": 8}, "json: block_out_channels is 8"),
        ("unet/config.json", {"sample_size": "16"}, "sample_size '16'"),
        ("unet/config.json", {"sample_size": 0}, "sample_size 0"),
        ("unet/config.json", {"sample_size": [16]}, r"sample_size [16]"),
        (
            "unet/config.json",
            {"encoder_hid_dim_type": "text_image_proj", "encoder_hid_dim": 8},
            "do not run on an image",
        ),
        ("controlnet/config.json", {"cross_attention_dim": 24}, "another kind of model"),
    ],
)
def test_macs_of_a_folder_with_broken_configs(
    file: str, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_configs(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in refused(capsys, "macs", "--model", str(tmp_path))


def test_macs_of_a_folder_and_a_controlnet_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_configs(tmp_path / "both")
    shutil.copytree(tmp_path / "both", tmp_path / "model")
    controlnet = shutil.move(tmp_path / "model" / "controlnet", tmp_path / "net")

    def macs(*argv: str) -> dict[str, int]:
        assert main(["macs", "--json", *argv]) == 0
        return json.loads(capsys.readouterr().out)["macs_per_forward_per_sample"]

    model = ["--model", str(tmp_path / "model")]
    assert list(macs(*model)) == ["unet"]
    assert macs(*model, "--controlnet_model", str(controlnet)) == macs("--model", str(tmp_path / "both"))
    message = refused(capsys, "macs", "--model", str(tmp_path / "both"), "--controlnet_model", str(controlnet))
    assert "has a ControlNet already" in message
    assert "it has no config.json" in refused(capsys, "macs", *model, "--controlnet_model", str(tmp_path))
    for command in (["macs", "--arch", "sd15"], ["inspect", "examples/demo_schedule.json"]):
        assert "there is no --model" in refused(capsys, *command, "--controlnet_model", str(controlnet))


def test_macs_of_a_folder_with_two_controlnets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_configs(tmp_path, num_controlnets=2)
    assert main(["macs", "--model", str(tmp_path), "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["macs_per_forward_per_sample"]
    assert list(models) == ["controlnet.nets.0", "controlnet.nets.1", "unet"]


def test_macs_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "known: sd15, sd15-controlnet" in refused(capsys, "macs", "--arch", "sd3")
    assert "it has no unet/config.json" in refused(capsys, "macs", "--model", str(tmp_path / "nothing"))
    assert "--arch --model is required" in refused(capsys, "macs")
    assert "multiples of 8" in refused(capsys, "macs", "--arch", "sd15", "--size", "500")
    assert "HEIGHTxWIDTH" in refused(capsys, "macs", "--arch", "sd15", "--size", "big")
    assert "out of range" in refused(capsys, "macs", "--arch", "sd15", "--size", "-8")
    assert "--steps is 0" in refused(capsys, "macs", "--arch", "sd15", "--steps", "0")
    assert "finite" in refused(capsys, "macs", "--arch", "sd15", "--guidance_scale", "nan")
    assert "cannot be read" in refused(capsys, "macs", "--arch", "sd15", "--schedule", str(tmp_path / "none.json"))
    SCHEDULE.save(tmp_path / "other.json")
    message = refused(capsys, "macs", "--arch", "sd15", "--schedule", str(tmp_path / "other.json"))
    assert "made for another model" in message
    save_configs(tmp_path)
    path = tmp_path / "hgc_schedule.json"
    shared_pipeline("sd15").schedule().save(path)
    assert "leave --steps out" in refused(
        capsys, "macs", "--model", str(tmp_path), "--schedule", str(path), "--steps", "4"
    )
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert "config of a FluxTransformer2DModel" in refused(capsys, "macs", "--model", str(tmp_path))
    (tmp_path / "unet" / "config.json").write_text("{")
    assert "unet/config.json: not valid JSON" in refused(capsys, "macs", "--model", str(tmp_path))
