"""How a diffusers scheduler is set: what a schedule was made with, and whether a pipeline's is the same."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

SEEN_IN_TIMESTEPS = ("timestep_spacing", "steps_offset")


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Settings of a scheduler that are single, finite values: its constructor's, without what timesteps say as well."""
    own = getattr(scheduler, "config", {})  # schedulers of other makers may have none
    names = [name for name in default_settings(type(scheduler)) if name in own and name not in SEEN_IN_TIMESTEPS]
    return {name: own[name] for name in names if _is_single(own[name])}


def default_settings(scheduler: type) -> dict[str, Any]:
    """The settings that a class of schedulers has, by name, and what they are unless it is told."""
    parameters = [*inspect.signature(scheduler).parameters.values()]
    return {parameter.name: parameter.default for parameter in parameters}


def other_setting(made_with: Mapping[str, Any], scheduler: Any) -> tuple[str, Any, Any] | None:
    """The first setting that a scheduler has otherwise: its name, what it was, and what it is. Settings that only one
    of both has are those of another version of diffusers."""
    for name, value in scheduler_config(scheduler).items():
        if name in made_with and not _is_same(made_with[name], value):
            return name, made_with[name], value
    return None


def _is_single(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)  # JSON has no infinity
    return value is None or isinstance(value, str | int)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
