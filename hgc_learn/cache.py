"""What a schedule keeps from step to step, and how a skipped site is filled in from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hgc_learn.plan import Load, Plan
from hgc_learn.predictors import BY_CODE, Fill
from hgc_learn.schedule import ScheduleError


class Cache:
    """Kept values by (site, step), and the fills that turn them into what is loaded.

    Args:
        plan: what is loaded when.
        rows: the schedule's, per site.
        tensors: numbers of the predictors, as `HGCSchedule.tensors`.
    """

    def __init__(self, plan: Plan, rows: Mapping[str, str], tensors: Mapping[str, Tensor]):
        self.values: dict[tuple[str, int], Tensor] = {}
        self.fills = {
            (load.site, i, sources): _coefficients(load, i, sources, rows, tensors)
            for i, step in enumerate(plan.steps)
            for load in step.load
            for sources in (load.guided, load.unguided)
            if sources
        }
        self.moved: dict[Any, Fill] = {}  # by fill and device: the same, to be multiplied with values

    @property
    def num_bytes(self) -> int:
        """Of the kept values; some may lie in the same memory."""
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in self.values.values()}
        return sum(storage.nbytes() for storage in storages.values())

    def load(self, load: Load, step: int) -> Tensor:
        """Fills a site in where a batch has no halves."""
        return self._fill_in(load, step, load.guided, slice(None))

    def load_halves(self, load: Load, step: int, num_guided: int, is_half: bool) -> Tensor:
        """Fills a site in where a batch has an unguided and a guided half, of `num_guided` samples each. Kept values
        may be of both halves or of the guided one alone.

        Args:
            is_half: the guided half only is asked for.
        """
        guided, unguided = slice(-num_guided, None), slice(0, num_guided)
        if BY_CODE[load.code].mean_of_halves:
            halves = [self._fill_in(load, step, load.guided, half) for half in (unguided, guided)]
            mean = (halves[0] + halves[1]) / 2
            return mean if is_half else torch.cat([mean, mean])
        if is_half:
            return self._fill_in(load, step, load.guided, guided)
        if load.guided == load.unguided:
            return self._fill_in(load, step, load.guided, slice(None))
        return torch.cat(
            [
                self._fill_in(load, step, load.unguided, unguided),
                self._fill_in(load, step, load.guided, guided),
            ]
        )

    def _fill_in(self, load: Load, step: int, sources: tuple[int, ...], samples: slice) -> Tensor:
        """sum_j c_j F_j + bias over some samples of the kept values."""
        values = [self.values[load.site, source] for source in sources]
        fill = self._fill_on(values[0], load.site, step, sources)
        if fill.holds:
            return values[0][samples]
        total = values[0][samples] * fill.coefficients[0]
        for value, coefficient in zip(values[1:], fill.coefficients[1:], strict=False):
            total = total + value[samples] * coefficient
        total = total if fill.bias is None else total + fill.bias
        return total.to(values[0].dtype)

    def _fill_on(self, value: Tensor, site: str, step: int, sources: tuple[int, ...]) -> Fill:
        """The coefficients on the device of `value`, shaped to be multiplied with it; moved once."""
        key = site, step, sources, value.device
        if key not in self.moved:
            self.moved[key] = self._move(self.fills[site, step, sources], value, site)
        return self.moved[key]

    def _move(self, fill: Fill, value: Tensor, site: str) -> Fill:
        is_image = value.ndim == 4
        num_channels = value.shape[1] if is_image else value.shape[-1]
        for tensor in (*fill.coefficients, fill.bias):
            if isinstance(tensor, Tensor) and tensor.numel() != num_channels:
                raise ScheduleError(
                    f"tensors: those of {site!r} have {tensor.numel()} channels, it has {num_channels}."
                )
        # Coefficients stay float32: bfloat16 has steps of 0.8 % above 1, as large as what is learned.
        return fill.map(lambda t: t.reshape((1, -1, 1, 1) if is_image else (1, 1, -1)).to(value.device))


def _coefficients(
    load: Load, step: int, sources: tuple[int, ...], rows: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> Fill:
    predictor = BY_CODE[load.code]
    parameters = {parameter.name: tensors[f"{load.site}/{parameter.name}"] for parameter in predictor.parameters}
    if any("fills" in parameter.axes for parameter in predictor.parameters):
        index = rows[load.site][:step].count(load.code)
    else:
        index = step
    return predictor.fill([step - source for source in sources], index, parameters)
