"""Settings of a comparison that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_comparison import SAMPLER


@pytest.fixture
def settings(teacher: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(teacher),
        "samplers": {SAMPLER: {"scheduler": "UniPCMultistepScheduler", "num_inference_steps": 5, "num_test": 3}},
        "budgets": [0.6, 0.1],
        "policies": ["uniform", "fewer_steps"],
        "guidance_scale": 3.0,
        "batch_size": 2,
        "tuning": {
            "num_screening_scenes": 1,
            "num_scenes": 2,
            "max_candidates": 4,
            "num_calibration": 2,
            "num_search": 2,
        },
        "training_config": str(tmp_path / "{policy}-{sampler}.yaml"),
        "grid": {"sampler": SAMPLER, "budget": 0.6, "num_pictures": 2},
        "output": str(tmp_path / "run"),
        "report": str(tmp_path / "report"),
        "name": "tiny",
    }
