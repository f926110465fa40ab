"""Prompts and control images to train on. No photographs are needed: the teacher is the frozen pipeline itself.

A batch is a dict: `text` (list of B prompts), `conditioning_image` [B, 3, height, width] in [0, 1], `seed` [B].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import lightning as L
from diffusers.image_processor import VaeImageProcessor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from hgc_learn.demo.scenes import SceneDataset

T = TypeVar("T")


class ControlDataModule(L.LightningDataModule):
    """Control images and prompts from a local image folder or the hub, through `datasets`.

    Args:
        dataset: a folder with `metadata.jsonl` (columns `file_name`, `conditioning_image_file_name`, `text`) or
            the id of a dataset on the hub.
        height: that control images are resized to, in pixels; must be the sampling config's.
        width: likewise.
        conditioning_image_column: column of the control image.
        text_column: column of the prompt.
        num_train: samples to train on, from the start of the training split.
        num_val: samples to validate on, from the end of the training split.
        batch_size: samples per step.
        seed: sample i is drawn from noise seeded with `seed + i`.
    """

    def __init__(
        self,
        dataset: str,
        height: int = 512,
        width: int = 512,
        conditioning_image_column: str = "conditioning_image",
        text_column: str = "text",
        num_train: int = 64,
        num_val: int = 16,
        batch_size: int = 4,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        hp = self.hparams
        if Path(hp["dataset"]).is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=hp["dataset"], split="train")
        else:
            rows = datasets.load_dataset(hp["dataset"], split="train")
        for column in (hp["conditioning_image_column"], hp["text_column"]):
            if column not in rows.column_names:
                raise ValueError(
                    f"{hp['dataset']} has no column {column!r}; it has {', '.join(rows.column_names)}. Set "
                    "conditioning_image_column and text_column."
                )
        needed = hp["num_train"] + hp["num_val"]
        if len(rows) < needed:
            raise ValueError(f"{hp['dataset']} has {len(rows)} rows, num_train + num_val asks for {needed}.")
        self.train_data = _Prompts(rows, range(hp["num_train"]), hp)
        self.val_data = _Prompts(rows, range(len(rows) - hp["num_val"], len(rows)), hp)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return _TrainLoader(self.train_data, self.hparams["batch_size"], self)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.val_data, self.hparams["batch_size"])


class _Prompts(Dataset[dict[str, Any]]):
    def __init__(self, rows: Any, indices: range, hparams: Any):
        self.rows, self.indices, self.hparams = rows, indices, hparams
        self.processor = VaeImageProcessor(do_normalize=False, do_convert_rgb=True)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row, hp = self.rows[self.indices[i]], self.hparams
        image = self.processor.preprocess(row[hp["conditioning_image_column"]], hp["height"], hp["width"])
        return {
            "text": row[hp["text_column"]],
            "conditioning_image": image[0],
            "seed": hp["seed"] + self.indices[i],
        }


class SceneDataModule(L.LightningDataModule):
    """The demonstration's drawn scenes (`hgc_learn.demo.scenes`).

    Args:
        num_train: scenes to train on, from the training range of scene seeds.
        num_val: scenes to validate on, from the validation range.
        batch_size: scenes per step.
    """

    def __init__(self, num_train: int = 64, num_val: int = 16, batch_size: int = 4):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return _TrainLoader(SceneDataset("train", self.hparams["num_train"]), self.hparams["batch_size"], self)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(SceneDataset("validation", self.hparams["num_val"]), self.hparams["batch_size"])


class _TrainLoader(DataLoader[dict[str, Any]]):
    """Goes through the data in an order that is a function of the epoch alone, and on from where a checkpoint was
    saved: a resumed run sees the batches that an unbroken one sees. Lightning saves and restores its state."""

    def __init__(self, data: Dataset[dict[str, Any]], batch_size: int, module: L.LightningDataModule):
        if len(data) < batch_size:  # type: ignore[arg-type]
            raise ValueError(
                f"{len(data)} training samples are less than one batch of {batch_size}: "  # type: ignore[arg-type]
                "raise num_train or lower batch_size."
            )
        sampler: DistributedSampler[dict[str, Any]] = DistributedSampler(data, num_replicas=1, rank=0)
        super().__init__(data, batch_size, sampler=sampler, drop_last=True)
        self.module, self.num_done = module, 0

    def __iter__(self) -> Any:
        num_done, self.num_done = self.num_done, 0
        return itertools.islice(super().__iter__(), num_done, None)

    def state_dict(self) -> dict[str, int]:
        trainer = self.module.trainer
        return {"num_done": 0 if trainer is None else trainer.global_step % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_done = state["num_done"]


def hold_out(batches: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """All but the last quarter, to learn from, and the last quarter, to judge by; of fewer than four all serve for
    both."""
    num_judges = len(batches) // 4
    return (batches[:-num_judges], batches[-num_judges:]) if num_judges else (batches, batches)
