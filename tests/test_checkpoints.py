"""Checkpoints of a training: going on from one, what a new run leaves of it, and files that are none."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UniPCMultistepScheduler
from safetensors.torch import save
from training_fixtures import fit, fit_arguments

from hgc_learn.__main__ import guarded, main
from hgc_learn.training.lightning_cli import train
from hgc_learn.training.module import RouterModule


@contextmanager
def interrupted_at(step: int, message: str = "go on with --ckpt_path=") -> Iterator[None]:
    training_step = RouterModule.training_step

    def interrupted(self: RouterModule, batch: dict[str, Any], batch_idx: int) -> None:
        if self.global_step == step:
            raise KeyboardInterrupt
        training_step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match=message):
        patch.setattr(RouterModule, "training_step", interrupted)
        yield


@pytest.mark.parametrize(
    ("objective", "buffers"),
    [
        (["Rollout", "--model.objective.num_warm_start_batches=1"], {"warm_started"}),
        (["L2C", "--model.objective.intervals=[2,3]", "--model.budgets=[0.7]"], set()),
        (["HarmoniCa", "--model.objective.weight_interval=1"], {"weights", "weights_epoch"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_interrupted_training_resumes_to_the_same_router(
    objective: list[str], buffers: set[str], teacher: Path, tmp_path: Path
) -> None:
    more = [f"--model.objective={objective[0]}", *objective[1:]]
    whole = torch.load(fit(teacher, tmp_path / "whole", 4, *more), weights_only=True)
    names = {"router.logits", "router.reach", *(f"objective.{name}" for name in buffers)}
    assert set(whole["state_dict"]) == names  # no frozen model
    assert list((tmp_path / "whole").rglob("events.out.tfevents*"))

    ckpt_path = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    with interrupted_at(3, f"^go on with --ckpt_path={re.escape(str(ckpt_path))}$"):
        fit(teacher, tmp_path / "parts", 4, *more)
    assert torch.load(ckpt_path, weights_only=True)["global_step"] == 3
    resumed = torch.load(fit(teacher, tmp_path / "parts", 4, *more, f"--ckpt_path={ckpt_path}"), weights_only=True)
    assert resumed["global_step"] == 4
    for name in names:
        torch.testing.assert_close(resumed["state_dict"][name], whole["state_dict"][name], rtol=0, atol=0)


def test_an_update_of_harmonica_is_counted_when_all_of_it_is_done(teacher: Path, tmp_path: Path) -> None:
    teacher_latents, num_calls = RouterModule.teacher_latents, 0

    def interrupted(self: RouterModule, batch: dict[str, Any]) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:  # one is of the weights, one of every step
            raise KeyboardInterrupt
        return teacher_latents(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match="go on with"):
        patch.setattr(RouterModule, "teacher_latents", interrupted)
        fit(teacher, tmp_path, 4, "--model.objective=HarmoniCa")
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


def test_a_resumed_run_goes_on_where_epochs_end_early(teacher: Path, tmp_path: Path) -> None:
    """Four batches, of which an epoch takes three: after the fourth step one of the second epoch is done."""
    more = ["--data.batch_size=1", "--trainer.limit_train_batches=3"]
    whole = torch.load(fit(teacher, tmp_path / "whole", 6, *more), weights_only=True)
    with interrupted_at(4):
        fit(teacher, tmp_path / "parts", 6, *more)
    ckpt_path = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    resumed = torch.load(fit(teacher, tmp_path / "parts", 6, *more, f"--ckpt_path={ckpt_path}"), weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == 6
    assert torch.equal(resumed["state_dict"]["router.logits"], whole["state_dict"]["router.logits"])


def test_epochs_may_have_another_length_when_resumed_from_the_end_of_one(teacher: Path, tmp_path: Path) -> None:
    """Four batches of one sample an epoch, then two of two: what is left of the training is what the epochs say."""
    more = ["--trainer.max_epochs=4", "--trainer.max_steps=-1"]
    seen: list[float] = []

    def fit_and_watch(*arguments: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            update = RouterModule.update_router
            patch.setattr(RouterModule, "update_router", lambda self, lr: (seen.append(lr), update(self, lr)))
            return fit(teacher, tmp_path, -1, *more, *arguments)

    with interrupted_at(4):  # the first step of the second epoch
        fit_and_watch("--data.batch_size=1")
    ckpt_path = tmp_path / "checkpoints" / "last.ckpt"
    fit_and_watch("--data.batch_size=2", f"--ckpt_path={ckpt_path}")
    done = [i / 16 for i in range(4)] + [i / 8 for i in range(2, 8)]
    assert seen == pytest.approx([0.1 * (1 - share) for share in done])

    with interrupted_at(2):
        fit_and_watch("--data.batch_size=1")
    before = ckpt_path.read_bytes()
    for others in (["--data.batch_size=2"], ["--data.batch_size=2", "--data.num_train=8"]):  # of which is as long
        with pytest.raises(ValueError, match="after 2 of the 4 batches of an epoch, of 4 samples with batch_size 1 on"):
            fit_and_watch(*others, f"--ckpt_path={ckpt_path}")
        assert ckpt_path.read_bytes() == before


@pytest.mark.parametrize("interval", ["every_n_epochs=2", "every_n_train_steps=2", "train_time_interval=0:10:00"])
def test_the_end_of_a_training_is_saved_whatever_the_interval(interval: str, teacher: Path, tmp_path: Path) -> None:
    more = ["--data.batch_size=1", "--trainer.limit_train_batches=1", f"--checkpoint.{interval}"]
    whole = torch.load(fit(teacher, tmp_path / "whole", -1, "--trainer.max_epochs=5", *more), weights_only=True)
    assert whole["global_step"] == 5
    ckpt_path = fit(teacher, tmp_path / "parts", -1, "--trainer.max_epochs=3", *more)
    assert torch.load(ckpt_path, weights_only=True)["global_step"] == 3
    ckpt_path = fit(teacher, tmp_path / "parts", -1, "--trainer.max_epochs=5", f"--ckpt_path={ckpt_path}", *more)
    assert torch.load(ckpt_path, weights_only=True)["global_step"] == 5


def test_what_is_asked_for_holds_on_resuming(teacher: Path, tmp_path: Path) -> None:
    """Lightning would take the checkpoint's settings without a word."""
    ckpt_path = fit(teacher, tmp_path, 1)
    fit(
        teacher, tmp_path, 2, f"--ckpt_path={ckpt_path}", "--model.gradient_checkpointing=true", "--model.budgets=[0.7]"
    )
    checkpoint = torch.load(ckpt_path, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert checkpoint["hyper_parameters"]["gradient_checkpointing"] is True
    assert checkpoint["hyper_parameters"]["budgets"] == [0.7]
    for other in ("--model.sampling.num_inference_steps=4", "--model.sites=[unet:eps]", "--model.objective=HarmoniCa"):
        with pytest.raises(ValueError, match="ckpt_path: the router was trained with"):
            fit(teacher, tmp_path, 3, f"--ckpt_path={ckpt_path}", other)


def test_a_new_run_keeps_the_checkpoint_that_was_there(teacher: Path, tmp_path: Path) -> None:
    ckpt_path = fit(teacher, tmp_path, 3)
    for num_steps in (2, 1):
        assert fit(teacher, tmp_path, num_steps) == ckpt_path
    names = "last.ckpt", "previous-1.ckpt", "previous.ckpt"
    steps = [torch.load(ckpt_path.with_name(name), weights_only=True)["global_step"] for name in names]
    assert steps == [1, 2, 3]
    kept = ckpt_path.with_name("previous.ckpt")  # going on from another run than that of the folder
    fit(teacher, tmp_path, 4, f"--ckpt_path={kept}")
    assert [path.name for path in sorted(ckpt_path.parent.iterdir())] == [
        names[0],
        names[1],
        "previous-2.ckpt",
        names[2],
    ]
    steps = [
        torch.load(ckpt_path.with_name(name), weights_only=True)["global_step"]
        for name in ("last.ckpt", "previous-2.ckpt")
    ]
    assert steps == [4, 1]
    fit(teacher, tmp_path, 5, f"--ckpt_path={ckpt_path}")
    assert len([*ckpt_path.parent.iterdir()]) == 4


def test_a_new_run_keeps_every_checkpoint_that_was_there(teacher: Path, tmp_path: Path) -> None:
    more = ["--checkpoint.save_last=true", "--checkpoint.filename={step}", "--checkpoint.save_top_k=-1"]
    for num_steps in (2, 1):
        last = fit(teacher, tmp_path, num_steps, *more)
    kept = {path.name: torch.load(path, weights_only=True)["global_step"] for path in last.parent.iterdir()}
    assert kept == {"step=2.ckpt": 2, "step=1.ckpt": 1, "last.ckpt": 1, "previous.ckpt": 2}


def test_a_router_of_an_earlier_version_is_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It held two weights of every gate."""
    ckpt_path = fit(teacher, tmp_path, 1)
    checkpoint = torch.load(ckpt_path, weights_only=True)
    reach = checkpoint["state_dict"].pop("router.reach")
    checkpoint["state_dict"]["router.weights"] = torch.stack([torch.ones_like(reach), reach])
    torch.save(checkpoint, ckpt_path)
    assert guarded(lambda: fit(teacher, tmp_path, 2, f"--ckpt_path={ckpt_path}")) == 2
    assert main(["export", "--ckpt_path", str(ckpt_path), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("its router is one of an earlier version of hgc_learn") == 2


def test_a_router_stays_with_its_models(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(teacher, tmp_path / "model", ignore=shutil.ignore_patterns("trained"))
    ckpt_path = fit(model, tmp_path / "run", 1)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    unet.conv_out.weight.data *= 2
    unet.save_pretrained(model / "unet")
    assert guarded(lambda: fit(model, tmp_path / "run", 2, f"--ckpt_path={ckpt_path}")) == 2
    assert "ckpt_path: the router was trained for another model" in capsys.readouterr().err
    assert main(["export", "--ckpt_path", str(ckpt_path), "--output", str(tmp_path / "out")]) == 2
    assert "last.ckpt: the router was trained for another model" in capsys.readouterr().err


def test_a_router_stays_with_its_scheduler(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it is the model's own, which no setting names."""
    model = shutil.copytree(teacher, tmp_path / "model", ignore=shutil.ignore_patterns("trained"))
    ckpt_path = fit(model, tmp_path / "run", 1)
    own = UniPCMultistepScheduler.from_pretrained(model / "scheduler")
    for other, message in (
        (UniPCMultistepScheduler.from_config(own.config, timestep_spacing="trailing"), "at other timesteps than UniPC"),
        (UniPCMultistepScheduler.from_config(own.config, solver_order=3), "trained with solver_order=2 of UniPC"),
        (DDIMScheduler.from_config(own.config), "when that was UniPCMultistepScheduler; now it is DDIMScheduler"),
    ):
        other.save_pretrained(model / "scheduler")
        index = json.loads((model / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", type(other).__name__]
        (model / "model_index.json").write_text(json.dumps(index))
        assert guarded(lambda: fit(model, tmp_path / "run", 2, f"--ckpt_path={ckpt_path}")) == 2
        assert message in capsys.readouterr().err
        assert main(["export", "--ckpt_path", str(ckpt_path), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_pictures_that_are_not_finite_are_told_before_an_export_learns(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(teacher, tmp_path / "model", ignore=shutil.ignore_patterns("trained"))
    ckpt_path = fit(model, tmp_path / "run", 1)
    vae = AutoencoderKL.from_pretrained(model / "vae")
    vae.decoder.conv_out.bias.data.fill_(float("nan"))
    vae.save_pretrained(model / "vae")
    monkeypatch.delattr("hgc_learn.export.export.decide")
    assert main(["export", "--ckpt_path", str(ckpt_path), "--output", str(tmp_path / "out")]) == 2
    assert "The uncached pipeline's own picture comes out as NaN" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["text", "half", "tensors"])
def test_files_that_are_no_checkpoint_are_refused_by_name(
    teacher: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, whole = tmp_path / "some.ckpt", io.BytesIO()
    torch.save({"config": "a: 1", "state_dict": {"router.logits": torch.zeros(100)}}, whole)
    contents = {"text": b"no checkpoint", "half": whole.getvalue()[: len(whole.getvalue()) // 2]}
    path.write_bytes(contents.get(content) or save({"a": torch.zeros(3)}))
    assert main(["export", "--ckpt_path", str(path), "--output", str(tmp_path / "out")]) == 2
    arguments = [*fit_arguments(teacher, tmp_path, 1), f"--ckpt_path={path}"]
    for subcommand in ("fit", "validate"):
        assert guarded(lambda subcommand=subcommand: train([subcommand, *arguments[1:]])) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert sum("some.ckpt: not a checkpoint written by" in line for line in lines) == 3


def test_checkpoint_of_another_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.ckpt"
    torch.save({"config": "model:\n  model: anything\n  predictors: [hold]\n", "state_dict": {}}, path)
    assert main(["export", "--ckpt_path", str(path), "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "old.ckpt: its configuration is not one of this version" in error
    assert "predictors" in error
    assert len(error.strip().splitlines()) < 6
