"""Scheduled pipelines against two slow ones that share no code with the plan or the runtime."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import by_definition
from tiny_models import NUM_STEPS, SHAPES, TinyPipeline, build_pipeline, random_rows, shared_pipeline
from torch import Tensor

from hgc_learn.inference import apply_schedule, remove_schedule


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=4)
@given(seed=st.integers(0, 2**32), num_sites=st.integers(1, 60))
def test_runtime_gives_what_the_definition_gives(shape: str, seed: int, num_sites: int) -> None:
    tiny = shared_pipeline(shape)
    rng = random.Random(seed)
    rows = random_rows(tiny.sites(), rng, num_sites=num_sites)
    rows.pop("unet:guidance", None)
    with by_definition(tiny.pipe, rows):
        expected = tiny()
    with apply_schedule(tiny.pipe, tiny.schedule(rows)):
        assert torch.equal(tiny(), expected)
    # Halves of a batch, one by one, and coefficients instead of differences round differently: in double precision.
    tiny = shared_pipeline(shape, torch.float64)
    rows = {site: "".join(rng.choice("-1m") if code == "-" else code for code in row) for site, row in rows.items()}
    rows["unet:guidance"] = "C" + "".join(rng.choice("CC-10") for _ in range(NUM_STEPS - 1))
    with by_definition(tiny.pipe, rows):
        expected = tiny()
    with apply_schedule(tiny.pipe, tiny.schedule(rows)):
        torch.testing.assert_close(tiny(), expected, rtol=1e-9, atol=1e-9)


@contextmanager
def by_module_hooks(pipe: Any, row: str, modules: list[str]) -> Iterator[None]:
    """The models' own forwards, in which the named modules give their last output where `row` says reuse. Knows
    nothing of graphs; right only where all sites share one row, so that none of them is ever dead and computed."""
    handles = []
    for name in modules:
        state: dict[str, Any] = {"step": 0}

        def hook(module: Any, args: Any, output: Any, state: dict[str, Any] = state) -> Any:
            if row[state["step"]] == "C":
                state["output"] = output
            state["step"] += 1
            return state["output"]

        model, _, path = name.partition(".")
        handles.append(getattr(pipe, model).get_submodule(path).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_runtime_gives_what_module_hooks_give(shape: str, seed: int) -> None:
    tiny, rng = shared_pipeline(shape), random.Random(seed)
    # A control residual is its zero convolution's output times a scale that does not change. The ControlNet's conv_in
    # site has the condition embedding added.
    sites = [s for s in tiny.sites() if s.endswith((":out", ":control")) and s != "controlnet.conv_in:out"]
    chosen = rng.sample(sites, 10)
    row = "C" + "".join(rng.choice("C-") for _ in range(NUM_STEPS - 2)) + "-"
    with by_module_hooks(tiny.pipe, row, [site.partition(":")[0] for site in chosen]):
        expected = tiny()
    with apply_schedule(tiny.pipe, tiny.schedule(dict.fromkeys(chosen, row))):
        assert torch.equal(tiny(), expected)
    assert not torch.equal(tiny(), expected)


def test_a_branch_is_reused_without_its_skip() -> None:
    """What Learning-to-Cache reuses: the shortcut of the resnet stays fresh, only its branch is held."""
    tiny = build_pipeline("sd15")
    path = "unet.up_blocks.1.resnets.1"
    resnet = tiny.pipe.unet.up_blocks[1].resnets[1]
    branches: list[Tensor] = []

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        shortcut = module.conv_shortcut(args[0])
        if not branches:
            branches.append(output - shortcut)
        return shortcut + branches[0]

    handle = resnet.register_forward_hook(hook)
    expected = tiny()
    handle.remove()
    apply_schedule(tiny.pipe, tiny.schedule({f"{path}:branch": "C" + "-" * (NUM_STEPS - 1)}))
    branch = tiny()
    assert (branch - expected).norm() / expected.norm() < 1e-4
    apply_schedule(tiny.pipe, tiny.schedule({f"{path}:out": "C" + "-" * (NUM_STEPS - 1)}))
    assert (tiny() - branch).norm() / branch.norm() > 1e-3


def test_the_definition_without_reuse_is_the_pipeline() -> None:
    tiny: TinyPipeline = shared_pipeline("sd15")
    remove_schedule(tiny.pipe)
    expected = tiny()
    with by_definition(tiny.pipe, {}):
        assert torch.equal(tiny(), expected)
