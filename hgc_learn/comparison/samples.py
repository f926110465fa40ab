"""Samples to compare on, drawn scenes or an imagefolder's; what the uncached pipeline makes of them, kept on disk."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from hgc_learn.comparison.config import CompareConfig
from hgc_learn.comparison.metrics import Batch
from hgc_learn.data import ControlDataModule
from hgc_learn.demo.scenes import draw_batches
from hgc_learn.evaluation import Samples, render
from hgc_learn.files import write_atomically
from hgc_learn.sampling import SamplingConfig

FIRST_SEEDS = {"train": 0, "validation": 1_000_000, "test": 2_000_000}  # of the noise, where samples have no seeds


def read_batches(config: CompareConfig, split: str, num_samples: int, batch_size: int, offset: int = 0) -> list[Batch]:
    """Samples of a split, `train`, `validation` or `test`, of what is compared on, `offset` of them left out.

    Raises:
        ValueError: the data cannot be read or has too few rows.
    """
    data = config.data
    if data is None:
        return draw_batches(split, num_samples, batch_size, offset)
    columns = {name: value for name, value in asdict(data).items() if not name.endswith("_split")}
    module = ControlDataModule(
        **columns,
        height=config.height,
        width=config.width,
        train_split=getattr(data, f"{split}_split"),
        num_train=offset + num_samples,
        num_val=0,
        seed=FIRST_SEEDS[split],
    )
    module.setup("fit")
    return list(DataLoader(Subset(module.train_data, range(offset, offset + num_samples)), batch_size))


def full_samples(
    path: Path, pipe: Any, sampling: SamplingConfig, split: str, batches: Sequence[Batch], *, weights: dict[str, Any]
) -> Samples:
    """What the uncached pipeline makes of the batches: read from `path`, or made and written there.

    Args:
        weights: what identifies the models; a file of other models, samples or settings is replaced.
    """
    seeds = [int(seed) for batch in batches for seed in batch["seed"]]
    content = hashlib.sha256()
    for batch in batches:
        content.update(json.dumps(batch["text"]).encode())
        content.update(batch["conditioning_image"].contiguous().numpy().tobytes())
    made_of = json.dumps(
        {
            "sampling": asdict(sampling),
            "split": split,
            "seeds": seeds,
            "content": content.hexdigest(),
            "weights": weights,
        }
    )
    with claim(path.with_suffix(".lock"), wait=True):
        if path.is_file():
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("made_of") == made_of:
                    return Samples(file.get_tensor("latents"), file.get_tensor("pictures"))
        samples = render(pipe, sampling, batches)
        save_tensors(path, {"latents": samples.latents, "pictures": samples.pictures}, made_of=made_of)
    return samples


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Writes a safetensors file that appears under its name only when it is complete."""
    write_atomically(path, save({name: value.contiguous() for name, value in tensors.items()}, metadata))


@contextmanager
def claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds the lock of a piece of work against other processes; false if another holds it. The system releases it
    when a process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
