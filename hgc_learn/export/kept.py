"""What an export has learned so far, in a file beside the schedule to be: an interrupted one goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
        made_for: all that decides what is learned. What was kept for something else is not gone on from.
    """

    def __init__(self, path: Path | None = None, made_for: dict[str, Any] | None = None):
        self.path, self.made_for = path, made_for
        self.parts: dict[str, State] = {}
        if path is not None and path.is_file():
            kept = read_saved(path)
            if isinstance(kept, dict) and kept.get("made_for") == made_for:
                self.parts = kept["parts"]

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
                write_saved(self.path, {"made_for": self.made_for, "parts": self.parts})

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """An interruption meanwhile says how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*["the same command goes on from there"] if self.parts else []) from None

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
