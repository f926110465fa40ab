"""What several benchmarks share: trainings that are made once, pictures under drafts, rows that are made once."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hgc_learn.evaluation import picture_psnr, render
from hgc_learn.files import save_json
from hgc_learn.setting import Draft
from hgc_learn.training.lightning_cli import LAST, train
from hgc_learn.training.module import RouterModule


def train_once(folder: Path, arguments: Sequence[str]) -> tuple[Path, float]:
    """The checkpoint of a training, made in this folder if it is missing, and the minutes that it took."""
    minutes = folder / "minutes.json"
    if not minutes.is_file():
        start = time.monotonic()
        train(["fit", *arguments, f"--trainer.default_root_dir={folder}", f"--checkpoint.dirpath={folder}"])
        save_json(minutes, {"training": round((time.monotonic() - start) / 60, 2)})
    return folder / LAST, json.loads(minutes.read_text())["training"]


class UncachedPictures:
    """Those of some scenes, to which others are compared; made when they are first needed."""

    def __init__(self, scenes: Sequence[dict[str, Any]]):
        self.scenes = scenes
        self.pictures: Tensor | None = None

    def psnr(self, module: RouterModule, draft: Draft) -> Tensor:
        """Of the pictures under a draft, dB, per scene."""
        if self.pictures is None:
            self.pictures = render(module.pipe, module.sampling, self.scenes).pictures
        schedule = module.setting.schedule(draft, policy="draft", settings={})
        pictures = render(module.pipe, module.sampling, self.scenes, schedule).pictures
        return picture_psnr(pictures, self.pictures)


def read_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return rows


def add_row(path: Path, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """To the rows, to their file, and to what is printed."""
    rows.append(row)
    save_json(path, rows)
    print(json.dumps(row), flush=True)


def mean(psnr: Tensor) -> float:
    return round(float(psnr.mean()), 3)
