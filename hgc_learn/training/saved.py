"""Files of a run that is to be gone on with: tensors and plain values."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from hgc_learn.files import write_atomically


def write_saved(path: Path, value: Any) -> None:
    """Writes tensors and plain values in dicts and lists, as `torch.save`, atomically."""
    content = io.BytesIO()
    torch.save(value, content)
    write_atomically(path, content.getbuffer())


def read_saved(path: Path) -> Any:
    """What `write_saved` wrote; None if it is not all there, or of another kind.

    Raises:
        OSError: it cannot be read.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    # What torch makes of files that are cut off, or of another kind.
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError, EOFError, pickle.UnpicklingError):
        return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What is in a checkpoint of a training.

    Raises:
        ValueError: it is none.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint.")
    checkpoint = read_saved(path)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("config"), str):
        return checkpoint
    raise ValueError(f"{path}: not a checkpoint written by `python train.py fit`, or not all of one.")
