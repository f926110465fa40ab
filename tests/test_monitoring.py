"""What a training leaves for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_fixtures import fit, save_tiny_teacher

from hgc_learn.figures import gate_heatmap


@pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The 'val_dataloader' does not have many workers",
    "ignore:You are trying to `self.log",
)
def test_curves_heatmaps_and_pictures_are_there(tmp_path: Path) -> None:
    save_tiny_teacher(tmp_path / "teacher")
    more = ("--trainer.limit_val_batches=1", "--model.budgets=[0.5]", "--model.objective.num_warm_start_batches=1")
    fit(tmp_path / "teacher", tmp_path / "run", 2, *more)
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    board = EventAccumulator(str(events)).Reload()
    tags = board.Tags()
    assert set(tags["images"]) == {"gates/0.5/soft", "gates/0.5/hard", "pictures/0.5"}
    assert {"train/loss", "val/0.5/hard_loss", "val/0.5/exported_macs"} <= set(tags["scalars"])
    assert [event.step for event in board.Scalars("train/loss")] == [0, 1]
    (macs,) = board.Scalars("val/0.5/exported_macs")
    assert 0.4 < macs.value <= 0.5


def test_gates_that_nothing_reads_are_left_out_of_the_heatmap() -> None:
    dead = torch.tensor([[False, True, False], [True, False, False]])
    heatmap = gate_heatmap(torch.ones(2, 3), ["a", "b", "c"], dead=dead)
    assert torch.equal(torch.from_numpy(heatmap.axes[0].images[0].get_array().mask), dead.T)
    assert "grey" in heatmap.axes[0].get_title()
