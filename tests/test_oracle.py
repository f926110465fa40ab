"""Scheduled pipelines against two slow ones that share no code with the plan or the runtime."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import NUM_STEPS, SHAPES, TinyPipeline, build_pipeline, random_rows, shared_pipeline
from torch import Tensor

from hgc_learn import ops
from hgc_learn.graph import build_graph
from hgc_learn.inference import apply_schedule, remove_schedule


@contextmanager
def by_definition(pipe: Any, rows: dict[str, str]) -> Iterator[None]:
    """Runs the pipeline as a schedule is defined, keeping every tensor: a value is asked for from the prediction
    backwards; a site that its row reuses is filled in from the values it had when it last really ran, each half of the
    batch by itself where a row is about guidance."""
    graph = build_graph(pipe.unet, pipe.controlnet)
    halves = (0, 1) if "unet:guidance" in rows else (None,)
    history: dict[tuple[str, int | None], list[tuple[int, Tensor]]] = {}  # by site and half, the latest first
    calls: dict[tuple[str, int | None], ops.Call] = {}
    steps = iter(range(NUM_STEPS))

    def value(name: str, step: int, half: int | None, known: dict[str, Tensor]) -> Tensor:
        if name not in known:
            code = rows[name][step] if name in rows else "C"
            if code == "C":
                node = graph.nodes[name]
                inputs = [value(source, step, half, known) for source in node.inputs]
                known[name] = node.run(calls[node.model, half], *inputs)
                history.setdefault((name, half), []).insert(0, (step, known[name]))
            else:
                known[name] = filled(code, history[name, half], step)
        return known[name]

    def controlnet_forward(
        sample: Any, t: Any, *, encoder_hidden_states: Any, controlnet_cond: Any, **kwargs: Any
    ) -> Any:
        kwargs.pop("return_dict")
        for half in halves:
            part = partial(take, half, len(sample))
            calls["controlnet", half] = ops.controlnet_call(
                pipe.controlnet, part(sample), t, part(encoder_hidden_states), part(controlnet_cond), **part(kwargs)
            )
        empty = sample.new_empty(0)  # the residuals are made when the UNet asks for them
        down = tuple(empty for _ in graph.residuals[:-1])
        return tuple(ControlNetOutput(down_block_res_samples=down, mid_block_res_sample=empty).to_tuple())

    def unet_forward(sample: Any, t: Any, *, encoder_hidden_states: Any, return_dict: bool, **kwargs: Any) -> Any:
        for name in ("down_block_additional_residuals", "mid_block_additional_residual"):
            kwargs.pop(name)
        for half in halves:
            part = partial(take, half, len(sample))
            calls["unet", half] = ops.unet_call(pipe.unet, part(sample), t, part(encoder_hidden_states), **part(kwargs))
        step = next(steps)
        if graph.guidance not in rows:
            return UNet2DConditionOutput(sample=value(graph.output, step, None, {})).to_tuple()
        guided = value(graph.output, step, 1, {})
        code = rows[graph.guidance][step]
        if code == "C":
            # A prediction that is filled in tells nothing new about the difference.
            is_new = rows.get(graph.output, "C" * NUM_STEPS)[step] == "C"
            unguided = value(graph.output, step, 0, {})
            if is_new:
                history.setdefault((graph.guidance, 1), []).insert(0, (step, guided - unguided))
        else:
            unguided = guided - filled(code, history[graph.guidance, 1], step)
        return UNet2DConditionOutput(sample=torch.cat([unguided, guided])).to_tuple()

    pipe.unet.forward, pipe.controlnet.forward = unet_forward, controlnet_forward
    try:
        yield
    finally:
        del pipe.unet.forward, pipe.controlnet.forward


def take(half: int | None, batch_size: int, value: Any) -> Any:
    """One half of every tensor that has a batch; None: both."""
    if half is None:
        return value
    if isinstance(value, Tensor) and value.ndim and len(value) == batch_size:
        return value.chunk(2)[half]
    if isinstance(value, dict):
        return {k: take(half, batch_size, v) for k, v in value.items()}
    return value


def filled(code: str, values: list[tuple[int, Tensor]], step: int) -> Tensor:
    """The formulas of `-`, `1` and `0`, written out."""
    (last, f0) = values[0]
    if code == "0":
        return torch.zeros_like(f0)
    if code == "1" and len(values) > 1:
        before, f1 = values[1]
        return f0 + (step - last) * (f0 - f1) / (last - before)
    return f0


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=12)
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
    # Halves of a batch, one by one, and coefficients instead of differences round differently.
    rows = {site: "".join(rng.choice("-1") if code == "-" else code for code in row) for site, row in rows.items()}
    rows["unet:guidance"] = "C" + "".join(rng.choice("CC-10") for _ in range(NUM_STEPS - 1))
    with by_definition(tiny.pipe, rows):
        expected = tiny()
    with apply_schedule(tiny.pipe, tiny.schedule(rows)):
        torch.testing.assert_close(tiny(), expected, rtol=1e-3, atol=1e-4)


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
