"""The schedule file: what it keeps, and all that is refused with the field's name."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from tiny_models import TinyPipeline, build_pipeline, random_rows, shared_pipeline

from hgc_learn.inference import apply_schedule
from hgc_learn.models.fingerprint import ModelFingerprint
from hgc_learn.schedule import MAX_FILE_BYTES, VERSION, HGCSchedule
from hgc_learn.sharing import FILE_NAME
from hgc_learn.strict import ScheduleError

SCHEDULE = HGCSchedule(
    sites={"unet.mid_block.attentions.0:out": "C--C-", "unet:eps": "CC-CC"},
    timesteps=(981, 741.5, 501, 261, 21),
    scheduler="UniPCMultistepScheduler",
    guidance_scale=7.5,
    height=512,
    width=768,
    model=ModelFingerprint({"unet": "0123456789abcdef"}, {"unet": {"conv_in": 12.5}}),
    producer={"policy": "router", "version": "0.1.0", "settings": {"budget": 0.5, "seed": 0}},
    macs={"full": 100, "cached": 45},
    fidelity={"psnr_db": 31.5, "num_samples": 256, "data": "held out"},
    scheduler_config={"solver_order": 2, "beta_end": 0.0125, "use_karras_sigmas": False, "solver_p": None},
)


def changed(**fields: Any) -> dict[str, Any]:
    return SCHEDULE.to_dict() | fields


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "hgc_schedule.json"
    SCHEDULE.save(path)
    assert HGCSchedule.load(path) == SCHEDULE
    assert os.listdir(path.parent) == [path.name]
    rows = path.read_text().splitlines()
    assert '  "unet:eps": "CC-CC"' in rows  # one site per line, to be read and compared by people


@pytest.mark.parametrize("name", ["schedule", "hyca_0.25", "schedule.safetensors"])
def test_names_whose_tensors_would_collide_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: a schedule's file ends in .json"):
        SCHEDULE.save(tmp_path / name)
    assert not os.listdir(tmp_path)


def test_saving_does_not_damage_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "hgc_schedule.json"
    SCHEDULE.save(path)
    broken = HGCSchedule(**{**vars(SCHEDULE), "producer": {"settings": object()}})
    with pytest.raises(TypeError):
        broken.save(path)
    assert HGCSchedule.load(path) == SCHEDULE
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(("version", "later"), [(1, {"tensors", "scheduler_config"}), (5, {"scheduler_config"})])
def test_earlier_versions_are_read(tmp_path: Path, version: int, later: set[str]) -> None:
    path = tmp_path / "old.json"
    old = {k: v for k, v in changed(version=version).items() if k not in later}
    path.write_text(json.dumps(old))
    assert HGCSchedule.load(path) == replace(SCHEDULE, scheduler_config={})


def nested(depth: int) -> str:
    return '{"format": "hgc_schedule", "producer": ' + "[" * depth + "]" * depth + "}"


REFUSED: dict[str, tuple[Any, str]] = {
    "not an object": ([1], "JSON object"),
    "another format": (changed(format="onnx"), "format: is 'onnx'"),
    "no format": ({}, "format: is None"),
    "newer version": (changed(version=VERSION + 1), "version: the file has version .*, this .* Upgrade hgc_learn"),
    "version 0": (changed(version=0), "version: is 0"),
    "version true": (changed(version=True), "version: must be an integer"),
    "unknown key": (changed(colour="red"), "colour: unknown key"),
    "missing key": ({k: v for k, v in changed().items() if k != "timesteps"}, "timesteps: missing"),
    "wrong type": (changed(height="512"), "height: must be an integer, not str"),
    "float size": (changed(width=512.0), "width: must be an integer, not float"),
    "negative size": (changed(width=-1), "width: is -1"),
    "no timesteps": (changed(timesteps=[], num_inference_steps=0, sites={}), "timesteps: 0 entries"),
    "timestep text": (changed(timesteps=[1, 2, 3, 4, "5"]), "timesteps: '5' is not"),
    "infinite guidance": (json.dumps(changed()).replace("7.5", "1e999"), "guidance_scale: inf is not a finite number"),
    "wrong step count": (changed(num_inference_steps=4), "num_inference_steps: is 4, but timesteps has 5"),
    "short row": (changed(sites={"unet:eps": "C-C"}), "sites: 'unet:eps' has 3 steps, timesteps has 5"),
    "unknown mark": (changed(sites={"unet:eps": "C-X-C"}), "sites: Site 'unet:eps' has the code 'X'"),
    "mark of another kind": (changed(sites={"unet:eps": "C-0-C"}), "sites: Site 'unet:eps' has the code '0'"),
    "no tensors": ({k: v for k, v in changed().items() if k != "tensors"}, "tensors: missing"),
    "tensors as list": (changed(tensors=[]), "tensors: must be the SHA-256"),
    "tensors in version 1": (
        {k: v for k, v in changed(version=1).items() if k != "scheduler_config"},
        "tensors: unknown key",
    ),
    "settings in version 5": (changed(version=5), "scheduler_config: unknown key"),
    "no settings": ({k: v for k, v in changed().items() if k != "scheduler_config"}, "scheduler_config: missing"),
    "settings as list": (changed(scheduler_config=[]), "scheduler_config: must be an object, not list"),
    "nested setting": (changed(scheduler_config={"a": [1]}), "scheduler_config: 'a' must be a single value, not list"),
    "endless setting": (json.dumps(changed()).replace("0.0125", "1e999"), "scheduler_config: 'beta_end'.*finite"),
    "many settings": (changed(scheduler_config=dict.fromkeys(map(str, range(257)))), "more than 256 entries"),
    "unknown kind": (changed(sites={"unet:map": "CCCCC"}), "sites: 'unet:map' has kind 'map'; known kinds are out"),
    "long name": (
        changed(sites={"unet." + "x" * 300 + ":out": "CCCCC"}),
        "sites: 'unet.xxx.*has 309 characters; at most",
    ),
    "row as list": (changed(sites={"unet:eps": [True] * 5}), "sites: 'unet:eps' must be a string"),
    "reuse at step 0": (changed(sites={"unet:eps": "-CCCC"}), "sites: 'unet:eps' is reused at step 0"),
    "negative macs": (changed(macs={"full": -1}), "macs: 'full' must be"),
    "fractional macs": (changed(macs={"full": 1.5}), "macs: 'full' must be"),
    "huge macs": (changed(macs={"full": 10**30}), "macs: 'full' must be"),
    "nested fidelity": (changed(fidelity={"psnr_db": [1]}), "fidelity: 'psnr_db' must be a single value"),
    "endless fidelity": (json.dumps(changed()).replace("31.5", "1" + 400 * "0"), "fidelity: 'psnr_db'"),
    "infinite fidelity": (json.dumps(changed()).replace("31.5", "1e999"), "fidelity: 'psnr_db'"),
    "infinite setting": (json.dumps(changed()).replace("0.5", "1e999"), "producer: .*finite"),
    "no unet": (changed(model={}), "model: 'unet' is missing"),
    "wrong model": (changed(model={"unet": {"architecture": "0"}}), "model: 'unet' must hold exactly"),
    "norm text": (changed(model={"unet": {"architecture": "0", "norms": {"a": "1"}}}), "model: 'unet': norm of 'a'"),
    "huge norm": (
        changed(model={"unet": {"architecture": "0", "norms": {"a": 10**400}}}),
        "model: 'unet': norm of 'a'",
    ),
    "truncated": (json.dumps(changed())[:-40], "not valid JSON .* truncated"),
    "empty": ("", "not valid JSON"),
    "NaN": (json.dumps(changed()).replace("7.5", "NaN"), "NaN is not allowed"),
    "Infinity": (json.dumps(changed()).replace("31.5", "-Infinity"), "-Infinity is not allowed"),
    "double key": ('{"format": "hgc_schedule", "width": 1, "width": 2}', "width: appears twice"),
    "deep nesting": (nested(100_000), "not valid JSON|nested"),
    "huge integer": (json.dumps(changed()).replace("7.5", "9" * 5000), "not valid JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_files_are_refused_with_the_field(tmp_path: Path, case: str) -> None:
    data, message = REFUSED[case]
    path = write(tmp_path / "wrong.json", data)
    with pytest.raises(ScheduleError, match=message) as error:
        HGCSchedule.load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = write(tmp_path / "wrong.json", changed(**{"\x1b[2J": 1}))
    with pytest.raises(ScheduleError, match=r"\\x1b\[2J: unknown key") as error:
        HGCSchedule.load(path)
    assert str(error.value).isprintable()


def test_files_that_are_no_text_too_large_or_absent_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(ScheduleError, match="cannot be read"):
        HGCSchedule.load(path)
    with pytest.raises(ScheduleError, match="cannot be read"):
        HGCSchedule.load(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ScheduleError, match="not valid JSON"):
        HGCSchedule.load(path)
    with open(path, "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ScheduleError, match="larger than 16 MiB"):
        HGCSchedule.load(path)


def test_many_keys_are_read_in_linear_time(tmp_path: Path) -> None:
    """A file at the limit of size whose last key is double must not take hours to refuse."""
    keys = ",".join(f'"{i}":0' for i in range(300_000))
    path = write(tmp_path / "many.json", f'{{{keys},"299999":0}}')
    with pytest.raises(ScheduleError, match="299999: appears twice"):
        HGCSchedule.load(path)


WITH_TENSORS = HGCSchedule(
    sites={"unet.a:out": "CfCff", "unet.b:out": "CttCt", "unet.c:out": "C-pCC", "unet.d:out": "CsssC"},
    **{k: v for k, v in vars(SCHEDULE).items() if k not in ("sites", "tensors")},
    tensors={
        "unet.a:out/scale": torch.arange(5.0),
        "unet.a:out/reach": torch.zeros(5),
        "unet.b:out/scale": torch.arange(12.0).view(3, 4),
        "unet.b:out/reach": torch.zeros(3, 4),
        "unet.c:out/predictor": torch.zeros(4, dtype=torch.uint8),
        "unet.d:out/scale": torch.ones(5, 4),
        "unet.d:out/shift": torch.zeros(5, 4),
    },
)


def test_a_file_without_its_tensors_is_refused(tmp_path: Path) -> None:
    WITH_TENSORS.save(tmp_path / "x.json")
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(ScheduleError, match=r"x.json: tensors: .* is not beside it. A schedule with tensors is"):
        HGCSchedule.load(tmp_path / "x.json")


def test_of_a_folder_of_schedules_one_must_be_named(tmp_path: Path) -> None:
    for budget in ("0.25", "0.5"):
        SCHEDULE.save(tmp_path / budget / FILE_NAME)
    with pytest.raises(ScheduleError, match=r"no hgc_schedule.json in this folder; name one of .*0.25, .*0.5\.$"):
        HGCSchedule.from_pretrained(tmp_path)
    assert HGCSchedule.from_pretrained(tmp_path, subfolder="0.5") == SCHEDULE


def test_two_codes_that_read_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"'unet.a:out' has two codes that read a tensor 'unet.a:out/scale'"):
        replace(WITH_TENSORS, sites={"unet.a:out": "CfsCC"})


def test_resampled_to_other_timesteps() -> None:
    timesteps = (981, 861, 741, 621, 501, 381, 261, 141, 21)
    schedule = WITH_TENSORS.resampled(timesteps)
    assert schedule.timesteps == timesteps
    assert schedule.sites["unet.b:out"] == "CtttttCCt"  # of two that are equally near the earlier
    assert (
        schedule.tensors["unet.b:out/scale"].tolist()
        == WITH_TENSORS.tensors["unet.b:out/scale"][[0, 0, 1, 1, 1, 2]].tolist()
    )
    assert schedule.tensors["unet.a:out/scale"].tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 4]
    assert WITH_TENSORS.resampled(WITH_TENSORS.timesteps).sites == WITH_TENSORS.sites


# Fit to a pipeline


@pytest.fixture
def tiny() -> TinyPipeline:
    return shared_pipeline("sd15")


def other_weight(pipe: Any) -> None:
    with torch.no_grad():
        pipe.controlnet.conv_in.weight.mul_(1.01)


def other_weight_offloaded(pipe: Any) -> None:
    other_weight(pipe)
    cpu_offload(pipe.controlnet, torch.device("cpu"))
    assert pipe.controlnet.conv_in.weight.is_meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: setattr(pipe, "controlnet", None), r"architecture: unet where unet, controlnet are expected"),
        (
            lambda pipe: setattr(pipe, "unet", shared_pipeline("sd2").pipe.unet),
            r"architecture: unet is \w+ where \w+ is expected\). Use the model it was made for",
        ),
        (other_weight_offloaded, r"weights: the norm of controlnet.conv_in.weight is .* Pass allow_other_weights=True"),
        (other_weight, r"weights: the norm of controlnet.conv_in.weight is .* Pass allow_other_weights=True"),
    ],
)
def test_another_model_is_refused(change: Callable[[Any], None], message: str) -> None:
    own = build_pipeline("sd15")
    schedule = own.schedule()
    change(own.pipe)
    with pytest.raises(ScheduleError, match=f"model: the schedule was made for another model .{message}"):
        apply_schedule(own.pipe, schedule)
    assert "forward" not in own.pipe.unet.__dict__


def test_weights_of_8_bits_are_not_compared() -> None:
    """Rounding moves their norms by more than the tolerance."""
    own = build_pipeline("sd15")
    schedule = own.schedule()
    own.pipe.unet.conv_in.weight.data = (own.pipe.unet.conv_in.weight.data * 1.01).to(torch.float8_e4m3fn)
    apply_schedule(own.pipe, schedule)


def test_other_weights_can_be_allowed_other_architectures_cannot() -> None:
    own, other, sd2 = build_pipeline("sd15"), build_pipeline("sd15", seed=1), shared_pipeline("sd2")
    rows = random_rows(own.sites(), random.Random(0))
    apply_schedule(other.pipe, own.schedule(rows), allow_other_weights=True)
    assert other().isfinite().all()
    with pytest.raises(ScheduleError, match="another model"):
        apply_schedule(sd2.pipe, own.schedule(rows), allow_other_weights=True)


def test_the_fingerprint_survives_a_change_of_precision() -> None:
    own = build_pipeline("sd15")
    schedule = own.schedule()
    for dtype in (torch.float16, torch.bfloat16):
        apply_schedule(own.pipe.to(dtype), schedule)


def test_unknown_sites_are_refused_and_what_was_applied_stays(tiny: TinyPipeline, tmp_path: Path) -> None:
    good = tiny.schedule({"unet:eps": "C-C-C-"})
    with apply_schedule(tiny.pipe, good) as handle:
        expected = tiny()
        for site in ("unet.nothing:out", "unet.skip.0:out", "unet.mid_block.resnets.0.conv1:out"):
            path = tmp_path / "schedule.json"
            tiny.schedule({site: "C-C-C-"}).save(path)
            with pytest.raises(ScheduleError, match=f"sites: Site '{site}' does not exist in this model"):
                apply_schedule(tiny.pipe, path)
        assert handle.schedule is good
        assert torch.equal(tiny(), expected)


def test_pipelines_of_another_kind_are_refused() -> None:
    class Pipe:
        transformer = None

    with pytest.raises(ValueError, match="Pipe has no unet"):
        apply_schedule(Pipe(), SCHEDULE)
