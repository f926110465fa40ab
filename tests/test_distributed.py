"""Two processes that share the batches learn the same router as one that has them whole and, with `Rollout`, draws a
schedule for each half."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from processes import start
from training_fixtures import fit

from hgc_learn.__main__ import guarded
from hgc_learn.objectives import Rollout
from hgc_learn.training import distributed
from hgc_learn.training.module import RouterModule

NUM_STEPS = 2


def fit_and_resume(teacher: Path, folder: Path, more: list[str], is_interrupted: bool) -> None:
    """Two updates; if so asked, with an interruption between them, as Ctrl-C makes one, and a resumption."""
    training_step = RouterModule.training_step

    def interrupted(self: RouterModule, batch: dict[str, Any], batch_idx: int) -> None:
        if self.global_step == 1:
            raise KeyboardInterrupt
        training_step(self, batch, batch_idx)

    if is_interrupted:
        with (
            patch.object(RouterModule, "training_step", interrupted),
            suppress(KeyboardInterrupt, SystemExit),
        ):
            fit(teacher, folder, NUM_STEPS, *more)
        ckpt_path = folder / "checkpoints/last.ckpt"
        assert torch.load(ckpt_path, weights_only=True)["global_step"] == 1
        more = [*more, f"--ckpt_path={ckpt_path}"]
    fit(teacher, folder, NUM_STEPS, *more)


def start_two(function: Callable[..., None], folder: Path, *arguments: object) -> list[ForkServerProcess]:
    """Two processes that find in their environment what `torchrun` puts there; what they print goes to files."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    of_both = {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    of_both |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    folder.mkdir()
    return [
        start(
            function,
            *arguments,
            output=folder / f"printed-{rank}",
            environment=of_both | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
        )
        for rank in range(2)
    ]


def printed(folder: Path) -> list[str]:
    return [(folder / f"printed-{rank}").read_text() for rank in range(2)]


ON_TWO = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=1"]


def fit_on_two(teacher: Path, folder: Path, *more: str, is_interrupted: bool) -> Path:
    """Trains; returns the last checkpoint."""
    processes = start_two(fit_and_resume, folder, teacher, folder, [*more, *ON_TWO], is_interrupted)
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0], [text[-3000:] for text in printed(folder)]
    return folder / "checkpoints/last.ckpt"


def fit_and_fail(teacher: Path, folder: Path, way: str) -> None:
    """The second process fails at the second update, or is interrupted there, and the first while it waits for it."""
    training_step = RouterModule.training_step

    def failing(self: RouterModule, batch: dict[str, Any], batch_idx: int) -> None:
        if self.global_step == 1 and way == "interrupted":
            interruption = threading.Timer(1.0 + 2.0 * distributed.rank(), os.kill, (os.getpid(), signal.SIGINT))
            interruption.start()
        if self.global_step == 1 and distributed.rank() == 1:
            if way == "interrupted":
                time.sleep(60)
            batch["conditioning_image"][:] = float("nan")
        training_step(self, batch, batch_idx)

    with patch.object(RouterModule, "training_step", failing):
        sys.exit(guarded(lambda: fit(teacher, folder, NUM_STEPS, *ON_TWO)))


@pytest.mark.parametrize(("way", "status", "told"), [("error", 2, "holds NaN"), ("interrupted", 130, "interrupted")])
def test_where_one_of_two_fails_none_waits_and_the_checkpoint_is_saved(
    way: str, status: int, told: str, teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / way
    processes = start_two(fit_and_fail, folder, teacher, folder, way)
    try:
        processes[1].join(120)
        assert processes[1].exitcode == status, printed(folder)[1][-3000:]
        assert told in printed(folder)[1]
        processes[0].join(60)  # torchrun would end it
        assert processes[0].exitcode not in (None, 0), printed(folder)[0][-3000:]
    finally:
        for process in processes:
            process.kill()
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 1


GRADIENTS = Rollout.gradients


def of_two(self: Rollout, module: RouterModule, batch: dict[str, Any], budget: float) -> dict[str, Any]:
    """`Rollout.gradients` of two processes with a sample each, in one."""
    parameters, gradients = [*module.router.parameters()], []
    for rank in range(2):
        module.seed(2 * (1 + module.global_step) + rank)
        half = {name: values[rank::2] for name, values in batch.items()}
        with patch.multiple(distributed, num_processes=lambda: 2, rank=lambda rank=rank: rank):  # for its noise
            logs = GRADIENTS(self, module, half, budget)
        gradients.append([parameter.grad for parameter in parameters])
    for parameter, both in zip(parameters, zip(*gradients, strict=True), strict=True):
        parameter.grad = torch.stack(both).mean(0)
    return logs


def nightly(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    ("objective", "more", "is_interrupted"),
    [
        (
            "Rollout",
            ["--model.objective.num_warm_start_batches=1", "--model.sampling.num_inference_steps=3"],
            False,
        ),
        nightly("Rollout", ["--model.objective.num_warm_start_batches=1"], True),
        nightly("L2C", ["--model.objective.intervals=[2]", "--model.budgets=[0.7]"], True),
        nightly("HarmoniCa", ["--model.objective.weight_interval=1"], True),
        nightly("Rollout", ["--trainer.limit_val_batches=1"], True),
    ],
)
def test_two_processes_learn_what_one_does(
    objective: str, more: list[str], is_interrupted: bool, teacher: Path, tmp_path: Path
) -> None:
    more = [f"--model.objective={objective}", *more]
    folder = tmp_path / "together"
    together = torch.load(fit_on_two(teacher, folder, *more, is_interrupted=is_interrupted), weights_only=True)
    with patch.object(Rollout, "gradients", of_two):
        alone = torch.load(fit(teacher, tmp_path / "alone", NUM_STEPS, *more, "--data.batch_size=2"), weights_only=True)
    assert together["global_step"] == alone["global_step"] == NUM_STEPS
    assert together["state_dict"].keys() == alone["state_dict"].keys()
    for name, values in alone["state_dict"].items():
        torch.testing.assert_close(together["state_dict"][name], values, rtol=1e-3, atol=1e-3)
    # Logged by the first process alone, in every run.
    assert len(list(folder.rglob("events.out.tfevents*"))) == 1 + is_interrupted
