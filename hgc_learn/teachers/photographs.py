"""An imagefolder as material for a small teacher: its photographs, cropped and mirrored, on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import trange

from hgc_learn.data import canny, read_row, read_rows
from hgc_learn.demo.scenes import IMAGE_SIZE
from hgc_learn.teachers.data import is_written, new_arrays

MIN_CROP = 0.7  # of the photograph's height and width
_RESIZE = VaeImageProcessor(do_normalize=False)  # as the data module of training resizes control images
_SHAPES = dict.fromkeys(("images", "controls"), ((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8))


@dataclass(frozen=True)
class Photographs:
    """Photographs with captions and control images.

    Attributes:
        data: folder with `metadata.jsonl`, folder of parquet files, or id on the hub; columns `image`, `text` and,
            unless they are made, `conditioning_image`.
        split: of it; slices, such as `train[:90%]`, are splits.
        condition: `canny` makes the control images from the photographs.
    """

    data: str
    split: str
    condition: str | None = None

    def rows(self) -> Any:
        """The rows; :meth:`row` reads one.

        Raises:
            ValueError: there are none, or a column is missing.
        """
        return read_rows(self.data, self.split, self._picture_columns, "text", 1)

    @property
    def _picture_columns(self) -> list[str]:
        return ["image"] if self.condition else ["image", "conditioning_image"]

    def row(self, rows: Any, index: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """Photograph `image` and control image `control`, uint8 [64, 64, 3], and caption `text`: the whole picture, or
        a part of it chosen by `rng`, mirrored or not."""
        where = f"{self.data}, split {self.split!r}, row {index}"
        pictures, text = read_row(rows, index, self._picture_columns, "text", where)
        left, top, size, mirrored = 0.0, 0.0, 1.0, False
        if rng is not None:
            size = rng.uniform(MIN_CROP, 1)
            left, top = rng.uniform(0, 1 - size, 2)
            mirrored = bool(rng.integers(2))
        parts = []
        for picture in pictures:
            width, height = picture.size
            edges = (left * width, top * height, (left + size) * width, (top + size) * height)
            box = (round(edges[0]), round(edges[1]), round(edges[2]), round(edges[3]))
            part = _RESIZE.resize(picture.crop(box), IMAGE_SIZE, IMAGE_SIZE)
            parts.append(ImageOps.mirror(part) if mirrored else part)
        control = canny(parts[0]) if self.condition else parts[1]
        return {"image": _array(parts[0]), "control": _array(control), "text": text}


def _array(picture: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(picture, dtype=np.uint8)


def cut_photographs(photographs: Photographs, folder: Path, num_pictures: int) -> None:
    """Write `num_pictures` pictures into `folder`, unless they are there: the photographs in turns, first whole, then
    cropped and mirrored at random.

    Writes `images.npy` and `controls.npy` (uint8 [N, 64, 64, 3]) and, last, `captions.txt`.
    """
    if is_written(folder, num_pictures):
        return
    rows = photographs.rows()
    with new_arrays(folder, _SHAPES, num_pictures) as (arrays, captions):
        for index in trange(num_pictures, desc="cutting photographs", unit="picture"):
            turn, number = divmod(index, len(rows))
            sample = photographs.row(rows, number, np.random.default_rng(index) if turn else None)
            arrays["images"][index], arrays["controls"][index] = sample["image"], sample["control"]
            captions.append(" ".join(sample["text"].split()))


class PhotographDataset(Dataset[dict[str, Any]]):
    """Whole photographs: `image` (float32 [3, 64, 64] in [-1, 1]), `conditioning_image` (float32 [3, 64, 64] in
    [0, 1]), `text` and `seed`; the first `num_photographs`, or all if there are fewer."""

    def __init__(self, photographs: Photographs, num_photographs: int) -> None:
        self.photographs, self.rows = photographs, photographs.rows()
        self.num_photographs = min(num_photographs, len(self.rows))

    def __len__(self) -> int:
        return self.num_photographs

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.photographs.row(self.rows, index)
        image, control = (torch.tensor(sample[name]).permute(2, 0, 1).float() / 255 for name in ("image", "control"))
        return {"image": 2 * image - 1, "conditioning_image": control, "text": sample["text"], "seed": index}
