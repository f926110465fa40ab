"""A comparison that takes seconds (`settings` in conftest.py): writing its configuration, reading its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

SAMPLER = "UniPC-5"


def write(settings: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def rows(settings: dict[str, Any]) -> dict[tuple[str, float], dict[str, Any]]:
    found = json.loads((Path(settings["report"]) / "tiny.json").read_text())
    return {(row["policy"], row["budget"]): row for row in found}
