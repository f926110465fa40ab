"""One row of the table in `robustness.py`, and how its outcome reads on the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from robustness_pipelines import build, run
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One thing that people do.

    Attributes:
        group, what: as the page says it.
        build: makes the pipeline.
        call: arguments besides the usual ones, or a function of the pipeline that gives them.
        run: what is done with the pipeline instead of calling it once.
        change: done to the pipeline, both before and after the schedule is applied.
        is_neutral: the change makes no difference to the numbers, so the oracle does without.
        first_step: the step that a run begins at.
        refreshed: steps that must be computed in full, because something changes there in mid-run.
        refused: what the error says, where it is not right. It has the way out in it.
        is_slow: is run with `pytest -m nightly` only.
        tolerance: relative, where rounding is coarser than that of double precision.
        check: proves the row by itself, where calling a pipeline and comparing is not all.
    """

    group: str
    what: str
    build: Callable[[], Any] = build
    call: dict[str, Any] | Callable[[Any], dict[str, Any]] = field(default_factory=dict)
    run: Callable[..., Tensor] = run
    change: Callable[[Any], None] | None = None
    is_neutral: bool = False
    first_step: int = 0
    refreshed: tuple[int, ...] = ()
    refused: str = ""
    tolerance: float = 1e-9
    is_slow: bool = False
    check: Callable[[], None] | None = None

    def __call__(self, pipe: Any) -> Tensor:
        return self.run(pipe, **(self.call(pipe) if callable(self.call) else self.call))

    @property
    def outcome(self) -> str:
        if self.refused:
            text = re.sub(r"\.\*", " ... ", self.refused).replace("\\", "")
            return "refused: " + text.replace("|", ", or: ")
        if len(self.refreshed) > 1:
            return "right; those steps are computed in full"
        return "right; that step is computed in full" if self.refreshed else "right"
