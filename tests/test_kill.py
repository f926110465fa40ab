"""`kill -9` of a real training: what was saved before loads, and the training that goes on from it ends as if nothing
had happened."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_python, start
from training_fixtures import fit, fit_arguments

# One update per epoch, and a checkpoint after each.
MORE = ["--data.num_train=2", "--trainer.max_epochs=100"]


def train_until(event: str, number: int, arguments: Sequence[str]) -> None:
    """Ends it when Python is about to do something with a file of the checkpoints for the n-th time."""
    left = number

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if name == event and "checkpoints" in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    run_python(["train.py", *arguments])


def resume_from(ckpt_path: Path) -> list[str]:
    return [f"--ckpt_path={ckpt_path}"] if ckpt_path.exists() else []


def load(ckpt_path: Path) -> dict[str, Any]:
    """The last checkpoint, after a look at what is beside it: files that were not finished have other names."""
    assert all(name.endswith(".tmp") for name in os.listdir(ckpt_path.parent) if name != ckpt_path.name)
    return torch.load(ckpt_path, weights_only=True)


def assert_same_router(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["global_step"] == expected["global_step"]
    assert actual["state_dict"].keys() == expected["state_dict"].keys()
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(actual["state_dict"][name], tensor), name


def test_killed_while_a_checkpoint_is_written(teacher: Path, tmp_path: Path) -> None:
    """Twice: when the file of the 2nd checkpoint has its content but not yet its name; when that of the 3rd is empty.
    The training goes on from the one before."""
    whole = load(fit(teacher, tmp_path / "whole", 4, *MORE))
    ckpt_path = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    for event, number, saved in (("os.rename", 2, 1), ("tempfile.mkstemp", 2, 2)):
        arguments = fit_arguments(teacher, tmp_path / "parts", 4, *MORE, *resume_from(ckpt_path))
        process = start(train_until, event, number, arguments)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert load(ckpt_path)["global_step"] == saved
    assert_same_router(load(fit(teacher, tmp_path / "parts", 4, *MORE, *resume_from(ckpt_path))), whole)


def test_a_training_that_is_asked_to_end_says_that_it_has_not_ended_by_itself(teacher: Path, tmp_path: Path) -> None:
    ckpt_path = tmp_path / "checkpoints" / "last.ckpt"
    arguments = fit_arguments(teacher, tmp_path, 10_000, *MORE, "--trainer.max_epochs=10000")
    process = start(run_python, ["train.py", *arguments])
    while not ckpt_path.exists():
        assert process.is_alive()
        time.sleep(0.1)
    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert 0 < load(ckpt_path)["global_step"] < 10_000


@pytest.mark.nightly
def test_killed_at_random_moments(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the outside, again and again until the training ends, with a checkpoint after every update."""
    num_steps, rng, num_kills, steps = 40, random.Random(0), 0, []
    ckpt_path = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    while not steps or steps[-1] < num_steps:
        before = ckpt_path.read_bytes() if ckpt_path.exists() else b""
        arguments = fit_arguments(teacher, tmp_path / "parts", num_steps, *MORE, *resume_from(ckpt_path))
        process = start(run_python, ["train.py", *arguments])
        while process.is_alive() and (not ckpt_path.exists() or ckpt_path.read_bytes() == before):
            time.sleep(0.01)
        seen = load(ckpt_path)["global_step"]
        process.join(rng.uniform(0, 2) if num_kills < 12 else None)
        process.kill()
        process.join()
        num_kills += process.exitcode == -signal.SIGKILL
        steps.append(load(ckpt_path)["global_step"])
        assert steps[-1] >= seen
    assert_same_router(load(ckpt_path), load(fit(teacher, tmp_path / "whole", num_steps, *MORE)))
    with capsys.disabled():
        print(f"\n{num_kills} kills of a training, with these updates saved: {steps}")
