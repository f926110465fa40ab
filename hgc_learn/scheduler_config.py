"""How a diffusers scheduler is set: what a schedule was made with, and whether a pipeline's is the same."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

SEEN_IN_TIMESTEPS = ("timestep_spacing", "steps_offset")
MAX_TEXT = 100
JSON, DIGEST = "json ", "sha256 "  # what begins text for a list or an object


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Settings of a scheduler: its constructor's, without what timesteps say as well. Lists and objects are text."""
    own = getattr(scheduler, "config", {})  # schedulers of other makers may have none
    names = [name for name in default_settings(type(scheduler)) if name in own and name not in SEEN_IN_TIMESTEPS]
    return {name: _single(own[name]) for name in names}


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


def is_stand_in(value: Any) -> bool:
    """Whether it is text for a list or an object, which no scheduler can be set by."""
    return isinstance(value, str) and value.startswith((JSON, DIGEST))


def how_to_set(scheduler: str, name: str, value: Any) -> str:
    """What to do where a setting is not `value`; a sentence without its end."""
    if is_stand_in(value):
        try:
            value = json.loads(value.removeprefix(JSON))
        except ValueError:  # a digest; or whatever a stranger's file says
            return f"Set {name} of pipe.scheduler as it was"
    return f"Set pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config, {name}={value!r})"


def _single(value: Any) -> Any:
    """The value, or text that tells it from others where JSON has no single value for it."""
    if isinstance(value, str | int) or value is None or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = json.dumps(value, default=_inside)
    return f"{JSON}{text}" if len(text) <= MAX_TEXT else f"{DIGEST}{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _inside(value: Any) -> Any:
    if hasattr(value, "tolist"):  # an array
        return value.tolist()
    settings = dict(getattr(value, "config", {}))
    return {type(value).__name__: {name: _single(setting) for name, setting in settings.items()}}


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
