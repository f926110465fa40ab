"""How a policy becomes known: `@register(name, paper=..., grid=...)` over a function that writes a draft."""

from __future__ import annotations

import inspect
import itertools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hgc_learn.schedule import HGCSchedule
from hgc_learn.setting import Draft, Setting

Grid = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Policy:
    """A policy.

    Attributes:
        name: on the command line and in files.
        write: `write(setting, **knobs)`; knobs are its keyword arguments, all with a default. One named `budget` is
            the fraction of the full MACs to keep.
        paper: where it comes from.
        grid: values of its knobs that tuning tries, every combination of them; or several such grids, of which all are
            tried. May depend on the setting.
        searches: whether it tries schedules on `Setting.search_batches`.
    """

    name: str
    write: Callable[..., Draft]
    paper: str
    grid: Callable[[Setting], Grid | Sequence[Grid]]
    searches: bool = False

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.write) or "").partition("\n")[0]

    @property
    def knobs(self) -> dict[str, Any]:
        """Names and defaults."""
        parameters = list(inspect.signature(self.write).parameters.values())[1:]
        return {p.name: p.default for p in parameters}

    def candidates(self, setting: Setting) -> Iterator[dict[str, Any]]:
        """Every combination of the grid's values; of several grids, with the defaults of what only others vary."""
        grids = self.grid(setting)
        grids = [grids] if isinstance(grids, Mapping) else grids
        defaults = {name: self.knobs[name] for grid in grids for name in grid}
        for grid in grids:
            for values in itertools.product(*grid.values()):
                yield {**defaults, **dict(zip(grid, values, strict=True))}

    def check(self, knobs: Mapping[str, Any]) -> None:
        """Raises ValueError for a knob that it does not have, or a value that is none of a knob's choices."""
        unknown = sorted(set(knobs) - set(self.knobs))
        if unknown:
            raise ValueError(f"{self.name} has no knob {unknown[0]!r}; it has {', '.join(self.knobs) or 'none'}.")
        hints = typing.get_type_hints(self.write)
        for name, value in knobs.items():
            choices = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is typing.Literal else (value,)
            if value not in choices:
                raise ValueError(f"{self.name}: {name} is {value!r}; it is one of {', '.join(map(str, choices))}.")

    def schedule(self, setting: Setting, **knobs: Any) -> HGCSchedule:
        """The schedule that the policy writes with these knobs (the others at their defaults).

        Raises:
            ValueError: as of `check`; a knob that is out of range, or samples that it needs are missing.
        """
        self.check(knobs)
        return self.file(setting, self.write(setting, **knobs), knobs)

    def file(self, setting: Setting, draft: Draft, knobs: Mapping[str, Any]) -> HGCSchedule:
        """The schedule of a draft that the policy wrote with these knobs."""
        return setting.schedule(draft, policy=self.name, settings={**self.knobs, **knobs}, paper=self.paper)


POLICIES: dict[str, Policy] = {}


def register(
    name: str,
    *,
    paper: str,
    grid: Grid | Callable[[Setting], Grid | Sequence[Grid]],
    searches: bool = False,
) -> Callable[[Callable[..., Draft]], Callable[..., Draft]]:
    """Registers the function below it as a policy. Its docstring's first line is what the list of policies shows."""

    def add(write: Callable[..., Draft]) -> Callable[..., Draft]:
        assert name not in POLICIES, name
        POLICIES[name] = Policy(name, write, paper, grid if callable(grid) else lambda setting: grid, searches)
        return write

    return add
