"""What a training leaves for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_fixtures import fit, fit_arguments, save_tiny_teacher

from hgc_learn.figures import gate_heatmap
from hgc_learn.training.lightning_cli import train


def test_curves_heatmaps_and_pictures_are_there_and_a_checkpoint_is_judged_alike(tmp_path: Path) -> None:
    save_tiny_teacher(tmp_path / "teacher")
    more = ("--trainer.limit_val_batches=1", "--model.budgets=[0.5]", "--model.objective.num_warm_start_batches=1")
    loggers = []
    for kind in ("CSVLogger", "TensorBoardLogger"):  # the board need not be the first
        loggers += [f"--trainer.logger+=lightning.pytorch.loggers.{kind}"]
        loggers += [f"--trainer.logger.save_dir={tmp_path / 'run'}"]
    ckpt_path = fit(tmp_path / "teacher", tmp_path / "run", 2, *more, *loggers)
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    board = EventAccumulator(str(events)).Reload()
    tags = board.Tags()
    assert set(tags["images"]) == {"gates/0.5/soft", "gates/0.5/hard", "pictures/0.5"}
    assert {"train/loss", "val/0.5/hard_loss", "val/0.5/exported_macs"} <= set(tags["scalars"])
    assert [event.step for event in board.Scalars("train/loss")] == [0, 1]
    (macs,) = board.Scalars("val/0.5/exported_macs")
    assert 0.4 < macs.value <= 0.5

    _, *arguments = fit_arguments(tmp_path / "teacher", tmp_path / "run", 2, *more, f"--ckpt_path={ckpt_path}")
    cli = train(["validate", *arguments])
    for name in ("hard_loss", "soft_loss"):
        (seen,) = board.Scalars(f"val/0.5/{name}")
        assert float(cli.trainer.callback_metrics[f"val/0.5/{name}"]) == pytest.approx(seen.value, rel=1e-4)


def test_gates_that_nothing_reads_are_left_out_of_the_heatmap() -> None:
    dead = torch.tensor([[False, True, False], [True, False, False]])
    heatmap = gate_heatmap(torch.ones(2, 3), ["a", "b", "c"], dead=dead)
    assert torch.equal(torch.from_numpy(heatmap.axes[0].images[0].get_array().mask), dead.T)
    assert "grey" in heatmap.axes[0].get_title()
