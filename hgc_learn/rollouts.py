"""Real rollouts of drafts: what a policy that searches judges schedules by."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgc_learn.calibration import progress
from hgc_learn.files import write_atomically
from hgc_learn.sampling import generate, scheduled
from hgc_learn.setting import Draft, Setting

Row = tuple[str, int, list[float]]
"""Which schedule, the index of the batch, and the PSNR of each of its samples, dB."""

_LOG = "psnr log"  # in the memo of a setting


def mean_psnr(setting: Setting, draft: Draft, *, num_batches: int | None = None) -> float:
    """Mean PSNR, dB, of what a draft makes of the setting's samples for searches, to the uncached pictures: what
    comparisons judge. Minus infinity if a trajectory is lost. What is known already is not run again.

    Args:
        num_batches: those that come first; all if not given.
    """
    has_name = not draft.tensors and draft.timesteps is None
    name = _digest(sorted(draft.sites.items())) if has_name else ""
    known = _known(setting, name) if has_name else {}
    chosen = range(len(setting.search_batches))[:num_batches]
    if missing := [index for index in chosen if index not in known]:
        measured = _psnr(setting, draft, missing)
        known |= measured
        if has_name and (log := setting.memo.get(_LOG)) is not None:
            log.append([(name, index, psnr.tolist()) for index, psnr in measured.items()])
    mean = float(torch.cat([known[index] for index in chosen]).mean())
    return mean if math.isfinite(mean) else -math.inf


@contextmanager
def kept_rollouts(setting: Setting, path: Path) -> Iterator[bool]:
    """Within the block a file holds what `mean_psnr` has measured, until the block ends well. What an interrupted one
    for the same models, sampler and samples has left there is known from the start: a search with the same seed goes
    through it in no time, and on. Yields whether there is any.

    Raises:
        KeyboardInterrupt: one that says how to go on, if there is anything to go on from.
    """
    about = {"sampling": asdict(setting.sampling), "model": setting.fingerprint.to_dict()}
    log = _Log(path, _digest([about, *map(_samples, setting.search_batches)]))
    for name, index, psnr in log.rows:
        _known(setting, name)[index] = torch.tensor(psnr)
    setting.memo[_LOG] = log
    try:
        yield bool(log.rows)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*["the same command goes on from there"] if path.is_file() else []) from None
    finally:
        del setting.memo[_LOG]
    path.unlink(missing_ok=True)


class _Log:
    """A file of what has been measured: a line that says for what, then one for each schedule and batch.

    Attributes:
        rows: that were there. Of another setting there are none, and a line that was cut off is none.
    """

    def __init__(self, path: Path, header: str):
        self.path, self.rows = path, list[Row]()
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        for line in lines[1:] if lines[:1] == [header] else ():
            with suppress(ValueError, TypeError):
                name, index, psnr = json.loads(line)
                self.rows.append((str(name), int(index), [float(value) for value in psnr]))
        self.start = "\n".join([header, *map(json.dumps, self.rows)]) + "\n"

    def append(self, rows: Iterable[Row]) -> None:
        if self.start:  # nothing is written before there is something to keep
            write_atomically(self.path, self.start.encode())
            self.start = ""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)


def _known(setting: Setting, name: str) -> dict[int, Tensor]:
    """By index of the batch, the PSNR [batch] of a schedule."""
    return setting.once(("psnr", name), dict)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _samples(batch: dict[str, Any]) -> list[Any]:
    images = batch["conditioning_image"].contiguous().numpy().tobytes()
    return [list(batch["text"]), [int(seed) for seed in batch["seed"]], hashlib.sha256(images).hexdigest()]


def _psnr(setting: Setting, draft: Draft, indices: Sequence[int]) -> dict[int, Tensor]:
    """By index of the batch, PSNR [batch]."""
    from hgc_learn.evaluation import picture_psnr  # torchmetrics: not for those who only list policies

    references = reference_pictures(setting)
    schedule = setting.schedule(draft, policy="trial", settings={})
    with scheduled(setting.pipe, setting.sampling, schedule) as sampling:
        pictures = {
            index: generate(setting.pipe, sampling, setting.search_batches[index], output_type="pt").cpu()
            for index in indices
        }
    return {index: picture_psnr(made, references[index]) for index, made in pictures.items()}


def reference_pictures(setting: Setting) -> list[Tensor]:
    """The uncached pipeline's pictures of every batch for searches, [batch, 3, height, width] in [0, 1], on the CPU."""

    def make() -> list[Tensor]:
        return [
            generate(setting.pipe, setting.sampling, batch, output_type="pt").cpu()
            for batch in progress(setting.search_batches, "uncached trajectories")
        ]

    return setting.once("reference_pictures", make)
