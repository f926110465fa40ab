from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny_models import SHAPES, TinyPipeline, build_pipeline, shared_pipeline
from training_fixtures import BUDGET, SAMPLING, save_tiny_teacher

from hgc_learn.inference import remove_schedule

if TYPE_CHECKING:
    from hgc_learn.training.module import RouterModule

torch.set_num_threads(1)  # models this small only lose by more

# The first example pays for caches and imports, and the machine may be busy: no deadlines. The same examples in
# every run, so that a failure is one that the change under test has caused.
settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("default")


def pytest_collection_finish() -> None:
    """What has been imported by now stays: the collector need not look at it again and again. It comes between tests
    only, for where models are built and traced it would take a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.disable()


def pytest_runtest_teardown() -> None:
    if gc.get_count()[0] > 100_000:
        gc.collect()


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


@pytest.fixture
def small() -> TinyPipeline:
    """One of the same kind with as few blocks as can be, that a test may change."""
    return build_pipeline("small")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_tiny_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def shared_module(teacher: Path) -> RouterModule:
    return build_module(teacher)


@pytest.fixture
def module(shared_module: RouterModule) -> RouterModule:
    """A router over the tiny pipeline, the same before every test."""
    return as_new(shared_module)


@pytest.fixture(scope="session")
def deep_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with the sites of SD1.5."""
    folder = tmp_path_factory.mktemp("deep_teacher")
    save_tiny_teacher(folder, "sd15")
    return folder


@pytest.fixture(scope="session")
def shared_deep_module(deep_teacher: Path) -> RouterModule:
    return build_module(deep_teacher)


@pytest.fixture
def deep_module(shared_deep_module: RouterModule) -> RouterModule:
    """One over the sites of SD1.5."""
    return as_new(shared_deep_module)


def build_module(teacher: Path) -> RouterModule:
    from hgc_learn.objectives import DEFAULT_SITES
    from hgc_learn.training.module import RouterModule

    return RouterModule(str(teacher), SAMPLING, budgets=[BUDGET], sites=[*DEFAULT_SITES, "unet:guidance"])


def as_new(module: RouterModule) -> RouterModule:
    """With logits that are the same each time."""
    router = module.router
    with torch.no_grad():
        router.logits.copy_(torch.randn(router.logits.shape, generator=torch.Generator().manual_seed(0)))
        router.reach.zero_()
    router.temperature = 1.0
    return module


@pytest.fixture(scope="session")
def batch() -> dict[str, Any]:
    """Two scenes."""
    from hgc_learn.data import SceneDataModule

    return next(iter(SceneDataModule(num_train=2, num_val=2, batch_size=2).train_dataloader()))
