from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny_models import SHAPES, TinyPipeline, build_pipeline, shared_pipeline

from hgc_learn.inference import remove_schedule

torch.set_num_threads(1)  # models this small only lose by more

# The first example pays for caches and imports, and the machine may be busy: no deadlines. The same examples in
# every run, so that a failure is one that the change under test has caused.
settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Trainings and comparisons flush them to zero in the whole process; hypothesis makes no numbers there."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(params=SHAPES)
def tiny(request: pytest.FixtureRequest) -> Iterator[TinyPipeline]:
    """A pipeline of every shape."""
    pipeline = shared_pipeline(request.param)
    yield pipeline
    remove_schedule(pipeline.pipe)


@pytest.fixture
def own() -> TinyPipeline:
    """An SD1.5-shaped pipeline that a test may change."""
    return build_pipeline("sd15")
