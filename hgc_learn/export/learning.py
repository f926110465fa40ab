"""How much an export learns, and which samples judge it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

T = TypeVar("T")

OnUpdate = Callable[[str, int, float], None]
"""Called after every update or trial with what it is part of (`reorder`, `specialise` or `fill`), its number, and the
mean log squared error of the outcome that it saw."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What is learned at an export, for its budget alone, one after the other; only by `Rollout`, what other objectives
    trained is exported as it is.

    Attributes:
        learning_samples: training samples to learn from; all, if there are fewer.
        reorder_trials: of whether steps of the router should change places (`reorder`); 0 for none.
        specialise_updates: of the router (`specialise`); 0 for none.
        fill_updates: of how the schedule fills in what it skips (`fills`); 0 for none.

    Raises:
        ValueError: a number out of range.
    """

    learning_samples: int = 256
    reorder_trials: int = 192
    specialise_updates: int = 192
    fill_updates: int = 128

    def __post_init__(self) -> None:
        if self.learning_samples < 1:
            raise ValueError(
                f"learning_samples is {self.learning_samples}; it must be at least 1. For no learning at export set "
                "reorder_trials, specialise_updates and fill_updates to 0."
            )
        for name, number in list(asdict(self).items())[1:]:
            if number < 0:
                raise ValueError(f"{name} is {number}; it must be 0 (none) or more.")

    @property
    def is_any(self) -> bool:
        return bool(self.reorder_trials or self.specialise_updates or self.fill_updates)


ALL = Learning()
"""As much as the project's own figures are of."""

NOTHING = Learning(reorder_trials=0, specialise_updates=0, fill_updates=0)
"""What the router rounds to."""


def hold_out(batches: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """All but the last quarter, to learn from, and the last quarter, to judge by; of fewer than four all serve for
    both."""
    num_judges = len(batches) // 4
    return (batches[:-num_judges], batches[-num_judges:]) if num_judges else (batches, batches)
