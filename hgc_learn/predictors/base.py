"""What a predictor is: a rule that fills in a skipped tensor from the values that were computed before.

Every one is linear in those values, so a schedule needs nothing but coefficients at run time:
fill-in = sum_j c_j F_j + bias, with F_0 the last computed value of the site, F_1 the one before, ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fill:
    """fill-in = sum_j coefficients[j] * F_j + bias.

    Attributes:
        coefficients: numbers, or float32 tensors [channels].
        bias: None or float32 [channels].
    """

    coefficients: tuple[float | Tensor, ...]
    bias: Tensor | None = None

    @property
    def holds(self) -> bool:
        """Whether it is F_0 as it is."""
        only = self.coefficients[0] if len(self.coefficients) == 1 and self.bias is None else None
        return isinstance(only, float) and only == 1.0

    def map(self, move: Callable[[Tensor], Tensor]) -> Fill:
        """The same with every tensor replaced by `move(tensor)`."""
        coefficients = tuple(move(c) if isinstance(c, Tensor) else c for c in self.coefficients)
        return Fill(coefficients, None if self.bias is None else move(self.bias))


@dataclass(frozen=True)
class Parameter:
    """A tensor that a predictor reads, stored as `<site>/<name>` beside the schedule; `axes` are `steps`,
    `fills` (only the steps of the site's row with this predictor, in order) and `channels`. Of a choice its numbers are
    below `num_choices`."""

    name: str
    dtype: torch.dtype
    axes: tuple[str, ...]
    num_choices: int | None = None


@dataclass(frozen=True)
class Predictor:
    """A way to fill in a skipped tensor.

    Attributes:
        name: in words.
        code: its one character in a schedule's rows.
        num_values: how many computed values it looks at; with fewer at hand it uses those.
        fill: `fill(ages, step, parameters)`: `ages[j]` is how many steps ago F_j was computed (increasing, at most
            `num_values` of them), `step` the index of the step that is filled in (along `fills`, if that is
            an axis of its tensors), `parameters` its tensors.
        parameters: tensors that it reads.
        mean_of_halves: F_j are averaged over the guided and the unguided half first.
        only_guidance: makes sense for the guidance difference only.
    """

    name: str
    code: str
    num_values: int
    fill: Callable[[Sequence[int], int, Mapping[str, Tensor]], Fill]
    parameters: tuple[Parameter, ...] = ()
    mean_of_halves: bool = False
    only_guidance: bool = False


def slope(ages: Sequence[int], j: int) -> tuple[float, float, float]:
    """Coefficients of F_0, F_1, F_2 in d_j = (F_j - F_{j+1}) / (steps between them)."""
    coefficients = [0.0, 0.0, 0.0]
    spacing = ages[j + 1] - ages[j]
    coefficients[j], coefficients[j + 1] = 1 / spacing, -1 / spacing
    return coefficients[0], coefficients[1], coefficients[2]
