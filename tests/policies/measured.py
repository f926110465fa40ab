"""A setting to measure on: the tiny teacher, random weights and all, and two scenes."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from training_fixtures import SAMPLING, save_tiny_teacher

from hgc_learn.demo.scenes import SceneDataset
from hgc_learn.sampling import load_pipeline
from hgc_learn.setting import Setting


@cache
def tiny_teacher(shape: str) -> tuple[Any, list[dict[str, Any]]]:
    """The pipeline and a batch each of two scenes and of one."""
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_teacher(Path(folder), shape)
        pipe = load_pipeline(folder, SAMPLING)
    return pipe, list(DataLoader(SceneDataset("train", 3), batch_size=2))


def measured_setting() -> Setting:
    """With nothing measured yet."""
    pipe, batches = tiny_teacher("sd15")
    return Setting.of_pipeline(pipe, SAMPLING, batches)


def single_sample_setting() -> Setting:
    """For tests with many rollouts: of a smaller pipeline; nothing is measured yet."""
    pipe, batches = tiny_teacher("small")
    return Setting.of_pipeline(pipe, SAMPLING, batches[-1:])


@cache
def shared_setting() -> Setting:
    """One for all tests that do not look at what is measured when."""
    return measured_setting()
