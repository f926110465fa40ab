"""Reading a file that may come from a stranger: of a bounded size, nothing doubled, infinite or of another kind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hgc_learn.files import printable

MAX_DEPTH = 16


class ScheduleError(ValueError):
    """A schedule that cannot be used; the message names the field and says what to do. It is on one line, without
    control characters: it quotes files, which may come from a stranger."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A whole file of at most so many bytes."""
    try:
        with open(path, "rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise ScheduleError(f"{path}: cannot be read ({error.strerror}).") from None
    if len(raw) > max_bytes:
        raise ScheduleError(f"{path}: larger than {max_bytes // 2**20} MiB; it is not part of a schedule.")
    return raw


def parse_json(raw: bytes) -> Any:
    """Raises ScheduleError for keys that appear twice and for NaN, ValueError or RecursionError for what is no JSON."""
    return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def take(data: dict[str, Any], name: str, kind: Any) -> Any:
    """A key that must be there, of the kind that it must have."""
    if name not in data:
        raise ScheduleError(f"{name}: missing.")
    value = data[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {dict: "an object", list: "a list", str: "a string", int: "an integer"}
        raise ScheduleError(f"{name}: must be {names.get(kind, 'a number')}, not {type(value).__name__}.")
    return value


def number(value: Any, name: str) -> float:
    """A finite number of a size that any setting could have."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9 or not math.isfinite(value):
        raise ScheduleError(f"{name}: {value!r} is not a finite number.")
    return value


def check_finite(value: Any, name: str, depth: int = 0) -> None:
    """JSON reads 1e999 as infinity, which it cannot write, and integers of any length, which no arithmetic takes."""
    if isinstance(value, int | float) and not abs(value) < 1e300:
        raise ScheduleError(f"{name}: {str(value)[:40]} is not a finite number.")
    if depth > MAX_DEPTH:
        raise ScheduleError(f"{name}: nested deeper than {MAX_DEPTH} levels.")
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_finite(child, name, depth + 1)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ScheduleError(f"{key}: appears twice.")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ScheduleError(f"{name} is not allowed; all numbers must be finite.")
