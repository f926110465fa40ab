"""What goes wrong around training and saving, and that the same seed gives the same numbers."""

from __future__ import annotations

import errno
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_schedule import WITH_TENSORS
from torch import Tensor
from training_fixtures import SAMPLING, fit

from hgc_learn.__main__ import guarded
from hgc_learn.data import ControlDataModule
from hgc_learn.export.export import export
from hgc_learn.export.learning import Learning
from hgc_learn.files import read_json
from hgc_learn.inference import apply_schedule
from hgc_learn.sampling import generate, load_pipeline
from hgc_learn.schedule import HGCSchedule, ScheduleError
from hgc_learn.schedule_tensors import tensor_path
from hgc_learn.training.module import RouterModule


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "schedule.json"
    WITH_TENSORS.save(path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        WITH_TENSORS.save(path)
    assert HGCSchedule.load(path) == WITH_TENSORS
    assert sorted(os.listdir(tmp_path)) == [path.name, tensor_path(path).name]


def test_what_cannot_be_written_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    WITH_TENSORS.save(path)
    tensors = {name: tensor + 1 for name, tensor in WITH_TENSORS.tensors.items()}
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(WITH_TENSORS, tensors=tensors, producer={"note": float("nan")}).save(path)
    assert HGCSchedule.load(path).to_dict() == WITH_TENSORS.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"producer": {"note": 1e300}}, "producer"),
        ({"producer": {"note": "x" * 17 * 2**20}}, "the schedule would take .* bytes; 16777216 are read at most"),
        ({"tensors": {"unet:eps/scale": torch.ones(6, 2**22)}}, "the schedule's tensors would take .* bytes"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "schedule.json"
    WITH_TENSORS.save(path)
    broken = replace(WITH_TENSORS)
    for name, value in change.items():
        object.__setattr__(broken, name, value)
    with pytest.raises(ScheduleError, match=message):
        broken.save(path)
    assert HGCSchedule.load(path) == WITH_TENSORS


def test_files_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    for umask, mode in (("077", 0o600), ("022", 0o644)):
        path = tmp_path / umask
        code = f"from pathlib import Path; from hgc_learn.files import save_json; save_json(Path({str(path)!r}), 1)"
        subprocess.run(["bash", "-c", f"umask {umask}; {sys.executable} -c {shlex.quote(code)}"], check=True)
        assert path.stat().st_mode & 0o777 == mode


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trained.json"
    path.write_text('{"minutes": ')
    with pytest.raises(ValueError, match=r"trained\.json: not valid JSON"):
        read_json(path)


SAVE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from hgc_learn.files import write_atomically
for i in itertools.count():
    write_atomically(Path(sys.argv[1]), bytes([i % 256]) * 3_000_000)
    print(i, flush=True)
"""


def test_kill_9_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    path, rng = tmp_path / "file", random.Random(0)
    for _ in range(2):
        command = [sys.executable, "-c", SAVE_FOR_EVER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()  # saved once
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
        content = path.read_bytes()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1


def test_a_full_disk_in_training_leaves_the_last_checkpoint(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt_path = fit(teacher, tmp_path, 1)
    before = ckpt_path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        assert guarded(lambda: fit(teacher, tmp_path, 2)) == 2
    assert ckpt_path.read_bytes() == before
    assert os.listdir(ckpt_path.parent) == [ckpt_path.name]
    assert torch.load(ckpt_path, weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_refused_by_its_prompt(
    module: RouterModule, batch: dict[str, Any], value: float
) -> None:
    image = batch["conditioning_image"].clone()
    image[1, 0, 3, 4] = value
    before = module.router.logits.clone()
    with pytest.raises(ValueError, match=f"The control image of {batch['text'][1]!r} holds NaN or infinity"):
        module.training_step(batch | {"conditioning_image": image}, 0)
    assert torch.equal(module.router.logits, before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (lambda image: 2 * image - 1, r"goes from -1 to 1; it must be in \[0, 1\]"),
        (lambda image: 255 * image, r"goes from 0 to 255; it must be in \[0, 1\]"),
        (lambda image: (255 * image).to(torch.uint8), "is torch.uint8"),
        (lambda image: image[:, 0], r"is torch.float32 \[64, 64\]; it must be floating-point \[3, height, width\]"),
        (None, "gives batches without conditioning_image"),
    ],
)
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_batches_of_a_wrong_kind_are_refused(
    module: RouterModule, batch: dict[str, Any], step: str, image: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    black_and_white = (batch["conditioning_image"] > 0.5).float()
    black_and_white[:, :, 0, :2] = torch.tensor([0.0, 1.0])
    changed = {} if image is None else {"conditioning_image": image(black_and_white)}
    with pytest.raises(ValueError, match=message):
        getattr(module, step)({"text": batch["text"], "seed": batch["seed"]} | changed, 0)


def test_a_gradient_that_is_not_finite_does_not_reach_the_router(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher_latents = RouterModule.teacher_latents
    monkeypatch.setattr(
        RouterModule, "teacher_latents", lambda self, batch: teacher_latents(self, batch) * float("nan")
    )
    assert guarded(lambda: fit(teacher, tmp_path, 1)) == 2
    assert "gradient of the router's logits is not finite" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_less_than_one_batch_is_refused(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: fit(teacher, tmp_path, 1, "--data.num_train=1")) == 2
    assert "1 training samples are less than one batch of 2: raise num_train" in capsys.readouterr().err


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match="data"):
        ControlDataModule(str(tmp_path)).setup("fit")


def test_the_same_seed_gives_the_same_bits(teacher: Path, tmp_path: Path, batch: dict[str, Any]) -> None:
    """Training, then export, then pictures of a pipeline that is loaded anew."""
    files, pictures = [], []
    for folder in (tmp_path / "a", tmp_path / "b"):
        ckpt_path = fit(teacher, folder, 1)
        state = torch.load(ckpt_path, weights_only=True)["state_dict"]
        path = export(
            ckpt_path,
            folder,
            learning=Learning(learning_samples=2, reorder_trials=1, specialise_updates=2, fill_updates=1),
        )
        tensors = tensor_path(path).read_bytes() if tensor_path(path).exists() else b""
        data = json.loads(path.read_text())
        data["producer"] = None  # names the folder
        files.append((state, data, tensors))
        pipe = load_pipeline(str(teacher), SAMPLING)
        apply_schedule(pipe, path)
        pictures.append(generate(pipe, SAMPLING, batch, output_type="pt"))
    (state, *first), (again, *second) = files
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name])
    assert first == second
    assert torch.equal(*pictures)
