"""The Pareto curves of a comparison as SVG coordinates, with the schedule among them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hgc_learn.comparison import OURS
from hgc_learn.schedule import HGCSchedule

WIDTH, HEIGHT = 360, 290
LEFT, RIGHT, TOP, BOTTOM = 34, 10, 10, 36

Row = dict[str, Any]


def read_comparison(path: Path) -> list[Row]:
    """The rows of a comparison's JSON that have figures.

    Raises:
        ValueError: it cannot be read, or is not one.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from None
    measured = [row for row in rows if isinstance(row, dict) and "psnr_db" in row] if isinstance(rows, list) else []
    if not measured:
        raise ValueError(f"{path}: no rows with figures; give the JSON file that `hgc_learn compare` writes.")
    for row in measured:
        names = [row.get(key) for key in ("policy", "sampler")]
        numbers = [row.get(key) for key in ("psnr_db", "kept_macs")]
        if not all(isinstance(name, str) for name in names) or not all(is_finite(number) for number in numbers):
            raise ValueError(f"{path}: a row lacks policy, sampler, psnr_db or kept_macs; it is no comparison's.")
    return measured


def is_finite(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def panels(rows: Sequence[Row], schedule: HGCSchedule) -> list[dict[str, Any]]:
    """What the template draws, a panel per sampler; `chosen` is the schedule where it was made for models of the same
    architecture and for that sampler, which its name says (`UniPC-20`)."""
    full, cached = (schedule.macs.get(name) for name in ("full", "cached"))
    kept = cached / full if full and cached is not None else None
    psnr = schedule.fidelity.get("psnr_db")
    num_steps = schedule.sampling.get("num_inference_steps", schedule.num_steps)
    result = []
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        own = [row for row in rows if row["sampler"] == sampler]
        name, _, steps = sampler.rpartition("-")
        fits = bool(name) and schedule.scheduler.startswith(name) and steps == str(num_steps)
        fits = fits and all(row.get("architecture") in (None, schedule.model.architecture) for row in own)
        chosen = (kept, psnr) if fits and kept is not None and is_finite(psnr) else None
        result.append(_panel(sampler, own, chosen))
    return result


def _panel(sampler: str, rows: Sequence[Row], chosen: Any) -> dict[str, Any]:
    points = [(row["kept_macs"], row["psnr_db"]) for row in rows] + ([chosen] if chosen else [])
    x, x_ticks = _scale([p[0] for p in points], LEFT, WIDTH - RIGHT)
    y, y_ticks = _scale([p[1] for p in points], HEIGHT - BOTTOM, TOP)
    lines = []
    for policy in sorted({row["policy"] for row in rows}, key=lambda policy: (policy == OURS, policy)):
        own = sorted((r for r in rows if r["policy"] == policy), key=lambda r: r["kept_macs"])
        places = [(x(row["kept_macs"]), y(row["psnr_db"])) for row in own]
        tips = [_words(row["kept_macs"], row["psnr_db"]) for row in own]
        lines.append({"policy": policy, "is_ours": policy == OURS, "places": places, "tips": tips})
    return {
        "sampler": sampler,
        "rows": sorted(rows, key=lambda row: (row["kept_macs"], -row["psnr_db"])),
        "lines": lines,
        "x_ticks": [(x(tick), f"{tick:.0%}") for tick in x_ticks],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in y_ticks],
        "chosen": chosen and (x(chosen[0]), y(chosen[1]), _words(*chosen)),
    }


def _words(kept: float, psnr: float) -> str:
    return f"{kept:.1%} of the MACs, {psnr:.2f} dB"


def _scale(values: Sequence[float], start: float, end: float) -> Any:
    """A function from values to coordinates, and round values along it."""
    low, high = min(values), max(values)
    span = high - low or 1.0
    low, high = low - 0.05 * span, high + 0.05 * span
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * k for k in (1, 2, 5, 10) if span / (power * k) <= 5)
    ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1), ticks
