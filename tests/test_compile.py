"""torch.compile: one graph for each different set of nodes, and schedules with few of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import GUIDANCE_SCALE, IMAGE_SIZE, NUM_STEPS, TinyPipeline, build_pipeline
from torch._dynamo.testing import CompileCounter
from training_fixtures import BUDGET

from hgc_learn.export import patterns
from hgc_learn.export.specialise import specialise
from hgc_learn.inference import apply_schedule
from hgc_learn.objectives import L2C, Rollout
from hgc_learn.plan import compile_plan
from hgc_learn.policies import POLICIES
from hgc_learn.sampling import SamplingConfig
from hgc_learn.setting import Setting
from hgc_learn.training.module import RouterModule

ROWS = {"unet:guidance": "C-C-C-", "unet.up_blocks.1.attentions.0:out": "C-C-C-"}


def num_graphs(tiny: TinyPipeline, rows: dict[str, str]) -> int:
    """By the definition: different sets of nodes and sizes of batch, model by model."""
    handle = apply_schedule(tiny.pipe, tiny.schedule(rows))
    graph, guidance = handle.runtime.graph, handle.runtime.graph.guidance
    given = {*graph.residuals, guidance}
    found = set()
    for step in handle.plan.steps:
        for model in handle.runtime.models:
            run = tuple(name for name in step.run if graph.nodes[name].model == model and name not in given)
            if run:
                found.add((model, run, step.is_half))
    return len(found)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_one_graph_per_pattern_and_the_same_latents() -> None:
    tiny = build_pipeline("small")
    expected_graphs = num_graphs(tiny, ROWS)
    handle = apply_schedule(tiny.pipe, tiny.schedule(ROWS))
    eager = tiny()
    counter = CompileCounter()
    handle.compile(backend=counter, fullgraph=True)
    assert torch.equal(tiny(), eager)
    assert torch.equal(tiny(), eager)
    assert counter.frame_count == expected_graphs
    assert expected_graphs <= 2 * handle.stats()["num_patterns"]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"backend": "cudagraphs"},
        {"options": {"triton.cudagraphs": True}},
    ],
)
def test_options_that_record_cuda_graphs_are_refused(options: dict[str, Any]) -> None:
    tiny = build_pipeline("small")
    handle = apply_schedule(tiny.pipe, tiny.schedule(ROWS))
    with pytest.raises(ValueError, match="records CUDA graphs"):
        handle.compile(**options)
    assert handle.runtime.compiled is None


@pytest.mark.nightly
def test_more_patterns_than_torch_recompiles_one_function() -> None:
    tiny = build_pipeline("small")
    rows = {"unet.up_blocks.1.resnets.0:out": "CCC-CC"}
    handle = apply_schedule(tiny.pipe, tiny.schedule(rows))
    eager, counter = tiny(), CompileCounter()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        handle.compile(backend=counter, fullgraph=True)
        assert torch.equal(tiny(), eager)
    assert counter.frame_count == num_graphs(tiny, rows) > 3


def test_regional_compilation_is_one_graph_per_kind_of_block() -> None:
    tiny = build_pipeline("sd15")
    rows = {"unet.up_blocks.2.attentions.1:out": "C-C-C-", "unet.mid_block.resnets.0:out": "CC-C-C"}
    apply_schedule(tiny.pipe, tiny.schedule(rows))
    eager, counter = tiny(), CompileCounter()
    tiny.pipe.unet.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert (tiny() - eager).norm() < 1e-5 * eager.norm()
    first = counter.frame_count
    tiny()
    assert 0 < first == counter.frame_count < NUM_STEPS


def test_a_rule_writes_for_a_compiled_pipeline_what_it_writes_for_the_original() -> None:
    tiny = build_pipeline("small")
    sampling = SamplingConfig(NUM_STEPS, GUIDANCE_SCALE, IMAGE_SIZE, IMAGE_SIZE)
    schedule = POLICIES["deepcache"].schedule(Setting.of_pipeline(tiny.pipe, sampling))
    for name in ("unet", "controlnet"):
        setattr(tiny.pipe, name, torch.compile(getattr(tiny.pipe, name), backend="eager"))
    assert POLICIES["deepcache"].schedule(Setting.of_pipeline(tiny.pipe, sampling)) == schedule


@pytest.mark.parametrize("max_patterns", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_patterns_are_capped_within_the_budget(deep_module: RouterModule, max_patterns: int, seed: int) -> None:
    router = deep_module.router
    generator = torch.Generator().manual_seed(seed)
    router.logits.data.copy_(torch.randn(router.logits.shape, generator=generator))
    assert patterns.count(router, router.round(BUDGET)) > 3
    gates = patterns.cap(router, router.round(BUDGET), BUDGET, max_patterns)
    assert patterns.count(router, gates) <= max_patterns
    assert BUDGET - 0.17 < router.kept(gates.compute) <= BUDGET
    setting: Setting = deep_module.setting
    rows = {site: row for site, row in deep_module.draft(gates).sites.items() if set(row) != {"C"}}
    assert compile_plan(setting.graph, rows, setting.num_steps).num_patterns() <= max_patterns


@pytest.mark.parametrize("max_patterns", [3, 4])
def test_what_a_cap_leaves_of_the_budget_is_spent(deep_module: RouterModule, max_patterns: int) -> None:
    """The highest logits alone keep 0.41: the next gate of a group costs more than is left, later ones do not."""
    router = deep_module.router
    router.logits.data.copy_(torch.randn(router.logits.shape, generator=torch.Generator().manual_seed(1)))
    gates = patterns.cap(router, router.round(BUDGET), BUDGET, max_patterns)
    assert BUDGET - 0.03 < router.kept(gates.compute) <= BUDGET


def test_a_cap_that_does_not_bind_changes_nothing(module: RouterModule) -> None:
    for objective in (Rollout(), L2C(intervals=[2])):
        gates = objective.gates(module.router, 0.8)
        assert patterns.cap(module.router, gates, 0.8, patterns.count(module.router, gates)) is gates


def test_a_cap_that_would_undo_full_steps_is_refused(module: RouterModule) -> None:
    module.router.logits.data.copy_(torch.randn(module.router.logits.shape, generator=torch.Generator().manual_seed(0)))
    own, module.objective = module.objective, L2C(intervals=[2])
    try:
        with pytest.raises(ValueError, match="max_patterns is 2; the schedule of a router trained for l2c has more"):
            specialise(module, 0.8, [], 0, max_patterns=2)
    finally:
        module.objective = own


def test_an_impossible_cap_is_refused(module: RouterModule) -> None:
    with pytest.raises(ValueError, match="max_patterns is 1; it must be at least 2"):
        patterns.cap(module.router, module.gates(BUDGET), BUDGET, 1)
