"""What a training leaves for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_fixtures import fit, save_tiny_teacher


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
