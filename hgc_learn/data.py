"""Prompts and control images to train on. No photographs are needed: the teacher is the frozen pipeline itself.

A batch is a dict: `text` (list of B prompts), `conditioning_image` [B, 3, height, width] in [0, 1], `seed` [B].
"""

from __future__ import annotations

import glob
import itertools
import random
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import lightning as L
import numpy as np
from datasets.table import embed_table_storage
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from rich.progress import track
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from hgc_learn.demo.scenes import SceneDataset
from hgc_learn.training.distributed import num_processes, rank

# Arrow says that it has not implemented the cast of numbers to pictures; an empty metadata.jsonl makes an IndexError.
UNREADABLE = OSError, ValueError, TypeError, IndexError, NotImplementedError, datasets.exceptions.DatasetsError
MAX_DISTORTION = 2.0  # of a picture's shape by resizing


class ControlDataModule(L.LightningDataModule):
    """Control images and prompts from a local folder or the hub, through `datasets`.

    Args:
        dataset: a folder of pictures with `metadata.jsonl` (columns `file_name`, `conditioning_image_file_name`,
            `text`), a folder of parquet files, or the id of a dataset on the hub.
        dataset_config_name: which of its configurations, where one on the hub has several.
        height: that control images are resized to, in pixels; must be the sampling config's.
        width: likewise.
        conditioning_image_column: column of the control image.
        image_column: column of the photograph; read only where control images are made from it.
        text_column: column of the prompt.
        condition: `canny` makes the control images from the photographs; by default they are taken as given.
        train_split: rows of it are trained on, drawn at random: those that come first are often alike.
        val_split: likewise, to validate on; by default the last rows of the training split, which are not trained on.
        streaming: read no more rows than asked for, the first ones, and keep them in memory.
        num_train: samples to train on.
        num_val: samples to validate on.
        batch_size: samples per step.
        prompt_dropout: share of the training samples whose prompt is left empty; their seeds decide which.
        seed: training sample i is drawn from noise seeded with `seed + i`, those that validate from the seeds after;
            also that of drawing rows.
    """

    def __init__(
        self,
        dataset: str,
        dataset_config_name: str | None = None,
        height: int = 512,
        width: int = 512,
        conditioning_image_column: str = "conditioning_image",
        image_column: str = "image",
        text_column: str = "text",
        condition: Literal["canny"] | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        streaming: bool = False,
        num_train: int = 256,
        num_val: int = 16,
        batch_size: int = 1,
        prompt_dropout: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        _check_sizes(num_train, num_val, batch_size)
        if not 0 <= prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout is {prompt_dropout}; it must be 0 (none) to 1.")
        if condition not in (None, "canny"):
            raise ValueError(f"condition is {condition!r}; it is canny, or None where there are control images.")
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        hp = self.hparams
        num_train, num_val, seed = hp["num_train"], hp["num_val"], hp["seed"]
        if hp["val_split"] is None:
            rows = val_rows = self._read(hp["train_split"], num_train + num_val)
            num_open = len(rows) - num_val
            val_indices = list(range(num_open, len(rows)))
        else:
            rows = self._read(hp["train_split"], num_train) if num_train else []
            val_rows = self._read(hp["val_split"], num_val) if num_val else []
            num_open = len(rows)
            val_indices = self._draw(len(val_rows), num_val)
        self.train_data = _Samples(rows, self._draw(num_open, num_train), hp, seed, hp["prompt_dropout"])
        self.val_data = _Samples(val_rows, val_indices, hp, seed + num_train)
        for samples in (self.train_data, self.val_data):
            samples.check()

    def _read(self, split: str, num_rows: int) -> Any:
        """`num_rows` rows of a split or more, with the columns that are used."""
        hp = self.hparams
        picture, text = _columns(hp)
        config_name, streaming = hp["dataset_config_name"], hp["streaming"]
        return read_rows(hp["dataset"], split, [picture], text, num_rows, config_name=config_name, streaming=streaming)

    def _draw(self, num_rows: int, num_drawn: int) -> list[int]:
        """Indices of rows; more of them begin with the same ones."""
        order = list(range(num_rows))
        if not self.hparams["streaming"]:
            random.Random(self.hparams["seed"]).shuffle(order)
        return order[:num_drawn]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return _TrainLoader(self.train_data, self.hparams["batch_size"], self)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.val_data, self.hparams["batch_size"])


def _check_sizes(num_train: int, num_val: int, batch_size: int) -> None:
    for name, number, least in (("num_train", num_train, 0), ("num_val", num_val, 0), ("batch_size", batch_size, 1)):
        if number < least:
            raise ValueError(f"{name} is {number}; it must be at least {least}.")


def _columns(hparams: Any) -> list[str]:
    """Of the picture and of the prompt."""
    return [hparams["image_column" if hparams["condition"] else "conditioning_image_column"], hparams["text_column"]]


def read_rows(
    name: str,
    split: str,
    picture_columns: Sequence[str],
    text_column: str,
    num_rows: int,
    *,
    config_name: str | None = None,
    streaming: bool = False,
) -> Any:
    """`num_rows` rows of a split or more, with these columns.

    Args:
        name: folder of pictures with `metadata.jsonl`, folder of parquet files, or id on the hub.
        split: of it; a slice, such as `train[:80%]`, if not streaming.
        config_name: which of the configurations that its card names.

    Raises:
        ValueError: they cannot be read, or are too few; in one line that says what to do.
    """
    columns = [*picture_columns, text_column]
    if text_column in picture_columns:
        raise ValueError(
            f"{name}: the column {text_column!r} cannot be both the picture and the prompt; set text_column."
        )
    try:
        rows = _load(name, config_name, split, streaming)
        names = rows.column_names or []
        for column in columns:
            if column not in names:
                raise ValueError(
                    f"there is no column {column!r}, only {', '.join(names)}; set conditioning_image_column, "
                    "image_column and text_column, or condition: canny to make control images from photographs"
                )
        rows = rows.select_columns(columns)
        for column in picture_columns:
            rows = rows.cast_column(column, datasets.Image(decode=not streaming))
        rows = _taken(rows, num_rows, fetch=not Path(name).is_dir()) if streaming else rows
    except UNREADABLE as error:
        is_vague = isinstance(error, datasets.exceptions.DatasetGenerationError)  # says only that something went wrong
        reason = error.__cause__ if is_vague and error.__cause__ else error
        what = " ".join(str(reason).split())
        to_do = "; set dataset_config_name" if what.startswith("Config name is missing") else ""
        if isinstance(error, ConnectionError | datasets.exceptions.DatasetNotFoundError):
            to_do = " And there is no folder of that name here."
        raise ValueError(f"{name}, split {split!r}: {what}{to_do}") from None
    if not len(rows):
        raise ValueError(f"{name}, split {split!r}: it is empty; set train_split and val_split.")
    if len(rows) < num_rows:
        asked = f"num_train + num_val asks for {num_rows}: lower one of both."
        raise ValueError(f"{name}, split {split!r}: has {len(rows)} rows, {asked}")
    return rows


def _taken(rows: Any, num_rows: int, *, fetch: bool) -> Any:
    """The first rows of a stream, their pictures as the files have them: decoded they may be fifty times as large.
    `fetch`: now, not wherever they are drawn."""
    if not (taken := list(rows.take(num_rows))):
        return taken
    kinds = dict(rows.features)
    kinds |= {name: datasets.Image() for name, kind in kinds.items() if isinstance(kind, datasets.Image)}
    table = datasets.Dataset.from_list(taken, datasets.Features(kinds))
    return table.with_format("arrow").map(embed_table_storage, batched=True).with_format(None) if fetch else table


def _load(name: str, config_name: str | None, split: str, streaming: bool) -> Any:
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.count("/") > 1):
        raise ValueError("there is no such folder")
    if not folder.is_dir():
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    if config_name:  # `datasets` would go on with what it keeps of a folder of that name, whatever is in it by now
        raise ValueError("dataset_config_name is for data sets on the hub; here, name the folder of one configuration")
    if any(folder.glob("metadata.*")):
        # Of one split, also where names of pictures have a `test` in them, which `datasets` makes splits of.
        return _load_pictures(name, split, streaming, data_files={"train": "**"})
    if any(folder.rglob("metadata.*")):
        return _load_pictures(name, split, streaming)
    if any(folder.rglob("*.parquet")):
        return datasets.load_dataset("parquet", data_dir=glob.escape(name), split=split, streaming=streaming)
    raise ValueError("there is neither a metadata.jsonl nor a parquet file in this folder")


def _load_pictures(name: str, split: str, streaming: bool, **options: Any) -> Any:
    options |= {"data_dir": glob.escape(name), "split": split, "streaming": streaming}
    rows = datasets.load_dataset("imagefolder", **options)
    features = rows.features or {}
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if "image" in pictures[1:]:
        # `datasets` (5.2) gives the picture under `file_name` to the first of these columns, whichever that is.
        first = datasets.Features({"image": features["image"], **features})
        rows = datasets.load_dataset("imagefolder", features=first, **options)
    return rows


class _Samples(Dataset[dict[str, Any]]):
    """Rows of a dataset by their `indices`; the i-th has the noise seed `first_seed + i`."""

    def __init__(self, rows: Any, indices: Sequence[int], hparams: Any, first_seed: int, prompt_dropout: float = 0.0):
        self.rows, self.indices, self.hparams = rows, indices, hparams
        self.first_seed, self.prompt_dropout = first_seed, prompt_dropout
        self.processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_rgb=True)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        hp, seed = self.hparams, self.first_seed + i
        picture, text = self._row(self.indices[i])
        picture = self.processor.resize(picture, hp["height"], hp["width"])
        if hp["condition"] == "canny":
            picture = canny(picture)
        is_dropped = random.Random(f"prompt {seed}").random() < self.prompt_dropout
        return {
            "text": "" if is_dropped else text,
            "conditioning_image": self.processor.preprocess(picture)[0],
            "seed": seed,
        }

    def check(self) -> None:
        """Reads every row that is drawn: rather now than after hours of training.

        Raises:
            ValueError: as `read_row`, or a picture is far from the shape that it is resized to.
        """
        for index in track(self.indices, "reading the data", transient=True, disable=rank() > 0):
            self._row(index)

    def _row(self, index: int) -> tuple[Image.Image, str]:
        """The picture and the prompt, checked."""
        hp = self.hparams
        picture_column, text_column = _columns(hp)
        where = f"{hp['dataset']}, row {index}"
        (picture,), text = read_row(self.rows, index, [picture_column], text_column, where)
        distortion = picture.width / picture.height * hp["height"] / hp["width"]
        if not 1 / MAX_DISTORTION <= distortion <= MAX_DISTORTION:
            raise ValueError(
                f"{where}: its picture is {picture.height}x{picture.width} pixels (height x width), too far from the "
                f"shape of {hp['height']}x{hp['width']}. Crop it, or set height and width."
            )
        return picture, text


def read_row(
    rows: Any, index: int, picture_columns: Sequence[str], text_column: str, where: str
) -> tuple[list[Image.Image], str]:
    """Pictures and prompt of a row of `read_rows`.

    Returns:
        Pictures in RGB, whatever they are on disk.

    Raises:
        ValueError: one of them is missing or cannot be read; the message starts with `where`.
    """
    try:
        row = rows[index]
        pictures, text = [row[column] for column in picture_columns], row[text_column]
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: its picture cannot be read ({error}). Mend or remove it.") from None
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_column} is {type(text).__name__}, not a text.")
    if None in pictures:
        raise ValueError(f"{where}: it has no picture. Add or remove it.")
    return [_rgb(picture, where) for picture in pictures], text


def _rgb(picture: Image.Image, where: str) -> Image.Image:
    """Pillow itself cuts off what is above 255 in 16 bits, turns floats from 0 to 1 black, and shows the colour that
    happens to be stored where a picture is transparent."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if cast(tuple[int, int], picture.getchannel("A").getextrema())[0] < 255:
            raise ValueError(
                f"{where}: its picture is transparent in places, and nothing says what is behind it. Save it on a "
                "background: black for edges, lines and poses drawn in white."
            )
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"{where}: its picture has numbers of 32 bits, of unknown range. Save it with 8 or 16 bits a channel."
        )
    return picture.convert("RGB")


def canny(picture: Image.Image) -> Image.Image:
    """White edges on black, with the thresholds that ControlNets are trained with."""
    try:
        import cv2
    except ImportError:
        raise ValueError(
            "condition: canny needs OpenCV; pip install opencv-python-headless, or the extra canny."
        ) from None
    return Image.fromarray(cv2.Canny(np.asarray(picture), 100, 200)).convert("RGB")


class SceneDataModule(L.LightningDataModule):
    """The demonstration's drawn scenes (`hgc_learn.demo.scenes`).

    Args:
        num_train: scenes to train on, from the training range of scene seeds.
        num_val: scenes to validate on, from the validation range.
        batch_size: scenes per step.
    """

    def __init__(self, num_train: int = 256, num_val: int = 16, batch_size: int = 1):
        super().__init__()
        _check_sizes(num_train, num_val, batch_size)
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return _TrainLoader(SceneDataset("train", self.hparams["num_train"]), self.hparams["batch_size"], self)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(SceneDataset("validation", self.hparams["num_val"]), self.hparams["batch_size"])


class _TrainLoader(DataLoader[dict[str, Any]]):
    """Goes through this process's share of the data in an order that is a function of the epoch alone, and on from
    where a checkpoint was saved: a resumed run sees the batches that an unbroken one sees. Lightning saves and restores
    its state."""

    def __init__(self, data: Dataset[dict[str, Any]], batch_size: int, module: L.LightningDataModule):
        sampler: DistributedSampler[dict[str, Any]] = DistributedSampler(
            data, num_replicas=num_processes(), rank=rank(), drop_last=True
        )
        if len(sampler) < batch_size:
            raise ValueError(
                f"{len(sampler) * num_processes()} training samples are less than one batch of "
                f"{batch_size * num_processes()}: raise num_train or lower batch_size."
            )
        super().__init__(data, batch_size, sampler=sampler, drop_last=True)
        self.module, self.num_done, self.first_step = module, 0, 0
        self.num_samples = len(cast(Sized, data))

    def __iter__(self) -> Any:
        num_done, self.num_done = self.num_done, 0
        if self.module.trainer is not None:
            self.first_step = self.module.trainer.global_step - num_done
        return itertools.islice(super().__iter__(), num_done, None)

    @property
    def cut(self) -> dict[str, int]:
        """How an epoch is cut into batches."""
        sizes = {"samples": self.num_samples, "batch_size": self.batch_size or 1, "processes": num_processes()}
        return {**sizes, "num_batches": len(self)}

    def state_dict(self) -> dict[str, int]:
        trainer = self.module.trainer
        if trainer is None:
            return {"num_done": 0, **self.cut}
        num_done = trainer.global_step - self.first_step
        is_over = num_done >= min(len(self), trainer.num_training_batches)
        return {"num_done": 0 if is_over else num_done, **self.cut}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError in the middle of an epoch that was cut into other batches."""
        cut = {name: state.get(name, value) for name, value in self.cut.items()}  # earlier checkpoints do not say all
        if state["num_done"] and cut != self.cut:
            raise ValueError(
                f"ckpt_path: it was saved after {state['num_done']} of the {cut['num_batches']} batches of an epoch, "
                f"of {_words(cut)}; here an epoch has {len(self)}, of {_words(self.cut)}. Go on with as many samples "
                "and processes and the same batch_size, or from the end of an epoch."
            )
        self.num_done = state["num_done"]


def _words(cut: dict[str, int]) -> str:
    return f"{cut['samples']} samples with batch_size {cut['batch_size']} on {cut['processes']} process(es)"
