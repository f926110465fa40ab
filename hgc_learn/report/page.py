"""Puts the page together."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from torch import Tensor

from hgc_learn.files import printable, write_atomically
from hgc_learn.models.graph import Graph
from hgc_learn.models.macs import NodeCost
from hgc_learn.report import pareto
from hgc_learn.report.strips import strips
from hgc_learn.schedule import HGCSchedule
from hgc_learn.sharing import facts

HERE = Path(__file__).parent
AMPLIFICATION = 8
PICTURES = ("text", "control", "full", "cached", "psnr_db")


def write_page(
    path: Path,
    schedule: HGCSchedule,
    graph: Graph,
    costs: Mapping[str, NodeCost],
    *,
    comparison: Sequence[pareto.Row] = (),
    pictures: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Writes the page of a schedule.

    Args:
        graph, costs: of the models that it was made for, all modules expanded.
        comparison: rows of a comparison, for its Pareto curves.
        pictures: lists of `text`, `control`, `full`, `cached` ([3, height, width] in [0, 1]) and `psnr_db`.

    Raises:
        ValueError: the schedule does not fit the models.
    """
    total, blocks, plan = strips(schedule, graph, costs)
    every = [total, *(strip for block in blocks for strip in (block, *block.sites))]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_finalize,
    )  # fmt: skip
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    text = environment.get_template("page.html").render(
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        kept=sum(total.macs) / (total.full * schedule.num_steps),
        schedule=schedule,
        facts=facts(schedule),
        total=total,
        blocks=blocks,
        number={strip.name: i for i, strip in enumerate(every)},
        data={
            "strips": [strip.to_dict() for strip in every],
            "timesteps": schedule.timesteps,
            "half": [step.is_half for step in plan.steps],
        },
        panels=pareto.panels(comparison, schedule) if comparison else [],
        box=(pareto.WIDTH, pareto.HEIGHT, pareto.LEFT, pareto.HEIGHT - pareto.BOTTOM),
        pictures=_columns(pictures) if pictures else [],
    )
    write_atomically(path, text.encode())


def _finalize(value: Any) -> Any:
    return printable(value) if type(value) is str else value


def _hash(text: str) -> str:
    """What the page's policy allows, and nothing else that may have got into it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _columns(pictures: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    columns = []
    for text, control, full, cached, psnr_db in zip(*(pictures[name] for name in PICTURES), strict=True):
        ways = {"control": control, "full": full, "cached": cached}
        ways[f"difference x {AMPLIFICATION}"] = (cached - full).abs() * AMPLIFICATION
        columns.append(
            {"text": text, "psnr_db": psnr_db, "ways": {name: _data_url(picture) for name, picture in ways.items()}}
        )
    return columns


def _data_url(picture: Tensor) -> str:
    array = (picture.permute(1, 2, 0).clamp(0, 1).float().cpu() * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
