"""Two processes that share the batches learn the same router as one that has them whole and, with `Rollout`, draws a
schedule for each half."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from training_fixtures import fit

from hgc_learn import distributed
from hgc_learn.objectives import Rollout
from hgc_learn.training import RouterModule

TESTS = Path(__file__).parent
NUM_STEPS = 2

# Two updates; if so asked, with an interruption between them, as Ctrl-C makes one, and a resumption.
PROGRAM = """
import sys
from pathlib import Path
import torch
from test_distributed import NUM_STEPS
from training_fixtures import fit
from hgc_learn.training import RouterModule

torch.set_num_threads(1)
teacher, folder, is_interrupted, *more = sys.argv[1:]
more += ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=1"]
training_step = RouterModule.training_step

def interrupted(self, batch, batch_idx):
    if self.global_step == 1:
        raise KeyboardInterrupt
    training_step(self, batch, batch_idx)

if is_interrupted == "True":
    RouterModule.training_step = interrupted
    try:
        fit(Path(teacher), Path(folder), NUM_STEPS, *more)
    except (KeyboardInterrupt, SystemExit):
        pass
    RouterModule.training_step = training_step
    ckpt_path = Path(folder, "checkpoints", "last.ckpt")
    assert torch.load(ckpt_path, weights_only=True)["global_step"] == 1
    more.append(f"--ckpt_path={ckpt_path}")
fit(Path(teacher), Path(folder), NUM_STEPS, *more)
"""


def fit_on_two(teacher: Path, folder: Path, *more: str, is_interrupted: bool) -> Path:
    """Trains as `torchrun` starts it, on two processes; returns the last checkpoint."""
    folder.mkdir()
    program = folder / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launcher, str(program), str(teacher), str(folder), str(is_interrupted), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "checkpoints/last.ckpt"


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


@pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers", "ignore:You are trying to `self.log"
)
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
