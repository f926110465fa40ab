"""What a schedule keeps from step to step, and how a skipped site is filled in from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hgc_learn.plan import Load
from hgc_learn.predictors import BY_CODE, Fill
from hgc_learn.runtime.unchanged import state
from hgc_learn.strict import ScheduleError


class Cache:
    """Kept values by (site, step), and the fills that turn them into what is loaded.

    Args:
        rows: the schedule's, per site.
        tensors: numbers of the predictors, as `HGCSchedule.tensors`.
    """

    def __init__(self, rows: Mapping[str, str], tensors: Mapping[str, Tensor]):
        self.rows, self.tensors = rows, tensors
        self.values: dict[tuple[str, int], Tensor] = {}
        self.states: dict[tuple[str, int], int] = {}  # of the values when they were kept
        self.fills: dict[Any, Fill] = {}  # by site, step, sources and device: made when they are first needed

    @property
    def num_bytes(self) -> int:
        """Of the kept values; some may lie in the same memory."""
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in self.values.values()}
        return sum(storage.nbytes() for storage in storages.values())

    def keep(self, site: str, step: int, value: Tensor) -> None:
        self.values[site, step] = value
        self.states[site, step] = state(value)

    def drop(self, key: tuple[str, int]) -> None:
        self.values.pop(key, None)
        self.states.pop(key, None)

    def clear(self) -> None:
        self.values.clear()
        self.states.clear()

    def _kept(self, site: str, step: int) -> Tensor:
        value = self.values[site, step]
        if state(value) != self.states[site, step]:
            raise ScheduleError(
                f"sites: what was kept of {site!r} has been written into since, by a hook or an attention processor. "
                "Make that give a new tensor instead (x * 2, not x.mul_(2))."
            )
        return value

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
        """sum_j c_j F_j + bias over some samples of the kept values, rounded to their dtype once, at the end: in half
        precision the terms of an extrapolation, which nearly cancel, would lose what it is about."""
        values = [self._kept(load.site, source) for source in sources]
        fill = self._fill_on(values[0], load, step, sources)
        if fill.holds:
            return values[0][samples]
        wide = torch.promote_types(values[0].dtype, torch.float32)
        total = values[0][samples].to(wide) * fill.coefficients[0]
        for value, coefficient in zip(values[1:], fill.coefficients[1:], strict=False):
            total = total + value[samples].to(wide) * coefficient
        total = total if fill.bias is None else total + fill.bias
        return total.to(values[0].dtype)

    def _fill_on(self, value: Tensor, load: Load, step: int, sources: tuple[int, ...]) -> Fill:
        """The coefficients on the device of `value`, shaped to be multiplied with it."""
        key = load.site, step, sources, value.device
        if key not in self.fills:
            with torch.inference_mode(False):  # a later run may record gradients
                self.fills[key] = self._make_fill(value, load, step, sources)
        return self.fills[key]

    def _make_fill(self, value: Tensor, load: Load, step: int, sources: tuple[int, ...]) -> Fill:
        predictor, site = BY_CODE[load.code], load.site
        parameters = {parameter.name: self.tensors[f"{site}/{parameter.name}"] for parameter in predictor.parameters}
        is_image = value.ndim == 4
        num_channels = value.shape[1] if is_image else value.shape[-1]
        for parameter in predictor.parameters:
            length = parameters[parameter.name].shape[-1]
            if "channels" in parameter.axes and length != num_channels:
                raise ScheduleError(f"tensors: those of {site!r} have {length} channels, it has {num_channels}.")
        counts_fills = any("fills" in parameter.axes for parameter in predictor.parameters)
        index = self.rows[site][:step].count(load.code) if counts_fills else step
        fill = predictor.fill([step - source for source in sources], index, parameters)
        # Coefficients stay float32: bfloat16 has steps of 0.8 % above 1, as large as what is learned.
        return fill.map(lambda t: t.reshape((1, -1, 1, 1) if is_image else (1, 1, -1)).to(value.device))
