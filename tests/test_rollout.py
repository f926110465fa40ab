"""Loading a pipeline with another sampler than its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from training_fixtures import SAMPLING

from hgc_learn.rollout import load_pipeline


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_latents_are_not_clipped_like_pixels(teacher: Path, scheduler: str) -> None:
    """The pipeline's config does not speak of it, and some schedulers clip by default."""
    pipe = load_pipeline(str(teacher), replace(SAMPLING, scheduler=scheduler))
    assert type(pipe.scheduler).__name__ == scheduler
    assert not pipe.scheduler.config.get("clip_sample", False)


def test_an_unknown_scheduler_is_refused(teacher: Path) -> None:
    with pytest.raises(ValueError, match="no scheduler named 'Nothing'"):
        load_pipeline(str(teacher), replace(SAMPLING, scheduler="Nothing"))
