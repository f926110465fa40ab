"""The file of tensors beside a schedule's: where it is, what it holds, and whether it is the one that belongs to it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from hgc_learn.plan import COMPUTE
from hgc_learn.predictors import BY_CODE
from hgc_learn.predictors.base import Parameter
from hgc_learn.strict import ScheduleError, read_bytes

MAX_TENSOR_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 8 * 2**20  # safetensors takes fifteen times that to read it


def tensor_path(path: str | os.PathLike[str]) -> Path:
    """Where the tensors of the schedule at `path` are: the same name with the ending `.safetensors`."""
    return Path(path).with_suffix(".safetensors")


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """What the file holds."""
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def digest(raw: bytes) -> str:
    """By which a schedule names the file that belongs to it."""
    return hashlib.sha256(raw).hexdigest()


def read_tensors(path: Path, expected: Any) -> dict[str, Tensor]:
    """The tensors of a file with that digest; none where no file is expected.

    Args:
        expected: the digest as a stranger's file says it, or None.

    Raises:
        ScheduleError: it is missing, too large, another one, or cannot be read.
    """
    if expected is None:
        return {}
    if not isinstance(expected, str):
        raise ScheduleError(f"tensors: must be the SHA-256 of {path.name}, not {type(expected).__name__}.")
    if not path.is_file():
        raise ScheduleError(f"tensors: {path.name} is not beside it. A schedule with tensors is two files: get both.")
    raw = read_bytes(path, MAX_TENSOR_BYTES)
    if digest(raw) != expected:
        raise ScheduleError(f"tensors: {path.name} is not the file that belongs to this schedule. Get both again.")
    if int.from_bytes(raw[:8], "little") > MAX_HEADER_BYTES:
        raise ScheduleError(f"tensors: {path.name} has a header larger than {MAX_HEADER_BYTES // 2**20} MiB.")
    try:
        return safetensors.torch.load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ScheduleError(f"tensors: {path.name} is not a safetensors file ({error}). Get it again.") from None


def check_tensors(tensors: Mapping[str, Tensor], sites: Mapping[str, str], num_steps: int) -> None:
    """Every predictor has what it reads, of the right shape, and nothing else is there.

    Raises:
        ScheduleError: names the tensor that is missing, of no use or wrong.
    """
    needed = _needed(sites, num_steps)
    for name in sorted(needed.keys() ^ tensors.keys()):
        raise ScheduleError(f"tensors: {name!r} is {'missing' if name in needed else 'not used by any site'}.")
    for name, (parameter, lengths) in needed.items():
        tensor, first = tensors[name], parameter.axes[0]
        wrong = tensor.dtype != parameter.dtype or tensor.ndim != len(parameter.axes) or not tensor.numel()
        if wrong or len(tensor) != lengths.get(first, len(tensor)):
            length = f" of {lengths[first]} {first}" if first in lengths else ""
            expected = f"{parameter.dtype} [{', '.join(parameter.axes)}]{length}"
            raise ScheduleError(f"tensors: {name!r} must be {expected}, not {tensor.dtype} {list(tensor.shape)}.")
        if not tensor.isfinite().all():
            raise ScheduleError(f"tensors: {name!r} holds numbers that are not finite.")
        if parameter.num_choices is not None and int(tensor.max()) >= parameter.num_choices:
            choices = f"choices are 0 to {parameter.num_choices - 1}"
            raise ScheduleError(f"tensors: {name!r} holds {int(tensor.max())}; {choices}.")


def _needed(sites: Mapping[str, str], num_steps: int) -> dict[str, tuple[Parameter, dict[str, int]]]:
    """By name, the parameter that reads a tensor, and how long axes of a kind are for its site."""
    needed: dict[str, tuple[Parameter, dict[str, int]]] = {}
    for site, row in sites.items():
        for code in sorted(set(row) - {COMPUTE}):
            for parameter in BY_CODE[code].parameters:
                name = f"{site}/{parameter.name}"
                if name in needed:
                    raise ScheduleError(f"sites: {site!r} has two codes that read a tensor {name!r}; use one of them.")
                needed[name] = (parameter, {"steps": num_steps, "fills": row.count(code)})
    return needed
