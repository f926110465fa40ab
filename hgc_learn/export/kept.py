"""What an export has learned so far, in a file: an interrupted one goes on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from hgc_learn.training.saved import read_saved, write_saved

State = dict[str, Any]


class Kept:
    """The states of an export's parts after their latest updates.

    Args:
        path: of the file; none keeps nothing.
        made_for: all that decides what is learned.

    Raises:
        ValueError: the file is another export's: one that is running, or was interrupted.
    """

    def __init__(self, path: Path | None = None, made_for: dict[str, Any] | None = None):
        self.path, self.made_for = path, made_for
        self.parts: dict[str, State] = {}
        if path is not None and path.is_file():
            kept = read_saved(path)
            if isinstance(kept, dict) and "made_for" in kept:
                _check_same(path, kept["made_for"], made_for or {})
                self.parts = kept["parts"]
        self._write()  # for others to see

    @classmethod
    def of(cls, path: Path, ckpt_paths: Sequence[Path], settings: dict[str, Any]) -> Kept:
        """Of an export of checkpoints by these settings; raises ValueError as above."""
        digests = [hashlib.sha256(ckpt_path.read_bytes()).hexdigest() for ckpt_path in ckpt_paths]
        return cls(path, {**settings, "checkpoint": " ".join(digests)})

    def updates(
        self, part: str, num_updates: int, state: Callable[[], State], restore: Callable[[State], None]
    ) -> Iterator[int]:
        """Numbers of the updates of a part that are yet to be made. After each, what `state` gives is on the disk, from
        which `restore` goes on: tensors, numbers, and dicts and lists of these."""
        first = 0
        if part in self.parts:
            first = self.parts[part]["num_done"]
            restore(self.parts[part]["state"])
        for update in range(first, num_updates):
            yield update
            if self.path is not None:
                self.parts[part] = {"num_done": update + 1, "state": deepcopy(state())}
                self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_saved(self.path, {"made_for": self.made_for, "parts": self.parts})

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """An interruption meanwhile says how to go on, and leaves no file in which nothing is."""
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*["the same command goes on from there"] if self.parts else []) from None
        finally:
            if not self.parts:
                self.remove()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


NOWHERE = Kept()


def _check_same(path: Path, made_for: dict[str, Any], asked: dict[str, Any]) -> None:
    names = [name for name in {**made_for, **asked} if made_for.get(name) != asked.get(name)]
    if names:
        others = ", ".join(f"{name} {made_for.get(name)} instead of {asked.get(name)}" for name in names)
        raise ValueError(
            f"{path} is what another export has learned ({others}). Let that one end, by the command that it was begun "
            "with; or give this one a folder of its own; or delete the file."
        )
