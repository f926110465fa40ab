"""Invariants of liveness, of what is kept and freed, and of expected MACs."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import NUM_TOKENS, SHAPES, UNET_CONFIGS, build_models

from hgc_learn.models.graph import Graph
from hgc_learn.models.macs import NodeCost, measure_costs
from hgc_learn.plan import ExpectedMacs, Flips, Plan, compile_plan, live_step
from hgc_learn.sites import list_sites, select_sites

NUM_STEPS = 7


@cache
def costs_of(shape: str) -> tuple[Graph, dict[str, NodeCost]]:
    models = build_models(UNET_CONFIGS[shape])
    return measure_costs(*models, latent_size=(8, 8), image_size=(16, 16), num_tokens=NUM_TOKENS)


Case = tuple[str, dict[str, str]]


@st.composite
def tables(draw: st.DrawFn, *, first_computes: bool = True) -> Case:
    """A shape and a schedule's rows for it. Half of the sites of the dearest kinds, so that much becomes dead."""
    shape = draw(st.sampled_from(SHAPES))
    graph, _ = costs_of(shape)
    sites = list_sites(graph)
    wide = [s for s in sites if s.endswith((":control", ":eps", ":guidance")) or s.startswith("unet.up_blocks")]
    chosen = draw(st.lists(st.one_of(st.sampled_from(sites), st.sampled_from(wide)), max_size=20, unique=True))
    row = st.text("CCC-12", min_size=NUM_STEPS, max_size=NUM_STEPS)
    table = {site: draw(row) for site in chosen}
    if first_computes:
        table = {site: "C" + row[1:] for site, row in table.items()}
    return shape, table


def test_all_compute_runs_everything() -> None:
    graph, _ = costs_of("sdxl")
    plan = compile_plan(graph, {}, 3)
    assert plan.num_patterns() == 1
    for step in plan.steps:
        assert step.run == tuple(name for name in graph.nodes if name != graph.guidance)
        assert not step.load + step.store + step.free


def test_liveness_finds_the_methods_of_the_papers() -> None:
    graph, costs = costs_of("sd15")
    # DeepCache is one site: only the shell outside runs, and of the encoder what feeds its skip.
    step = live_step(graph, {"unet.up_blocks.3.attentions.1:out"})
    assert step.load == ("unet.up_blocks.3.attentions.1:out",)
    assert "unet.conv_in:out" in step.run
    assert "unet.up_blocks.3.resnets.2:out" in step.run
    assert not any(".mid_block" in name or "down_blocks.1" in name or "up_blocks.2" in name for name in step.run)
    # The ControlNet runs as far as the one residual that the shell still reads.
    assert "controlnet.controlnet_down_blocks.0:control" in step.run
    assert "controlnet.down_blocks.0.resnets.0:out" not in step.run
    # Reusing every residual leaves the ControlNet dead and the UNet whole; so does reusing the decoder's reads.
    step = live_step(graph, set(select_sites(graph, ["controlnet.*:control"])))
    assert {graph.nodes[name].model for name in step.run} == {"unet"}
    assert sum(costs[n].macs for n in step.run) == sum(
        costs[n].macs for n, node in graph.nodes.items() if node.model == "unet"
    )
    # Reusing the prediction skips the step.
    assert live_step(graph, {graph.output}).run == ()


@settings(max_examples=60)
@given(tables())
def test_what_runs_is_what_is_read(case: Case) -> None:
    shape, table = case
    graph, _ = costs_of(shape)
    readers = graph.consumers()
    order = {name: i for i, name in enumerate(graph.nodes)}
    del readers[graph.guidance], order[graph.guidance]
    for i, step in enumerate(compile_plan(graph, table, NUM_STEPS).steps):
        # The guidance difference is read by no node: what it does is to halve the batch.
        assert step.is_half == (table.get(graph.guidance, "C" * NUM_STEPS)[i] != "C")
        assert step.is_half == (graph.guidance in step.loaded)
        run, load = set(step.run) - {graph.guidance}, set(step.loaded) - {graph.guidance}
        assert not run & load
        assert list(step.run) == sorted(step.run, key=[*order, graph.guidance].index)
        for name in order:
            is_read = name == graph.output or any(reader in run for reader in readers[name])
            assert (name in run | load) == is_read
            if is_read:
                assert (name in load) == (name in table and table[name][i] != "C")
        for name in run:
            assert set(graph.nodes[name].inputs) <= run | load


@settings(max_examples=60)
@given(tables())
def test_what_is_stored_is_there_when_loaded_and_gone_at_the_end(case: Case) -> None:
    shape, table = case
    graph, costs = costs_of(shape)
    plan = compile_plan(graph, table, NUM_STEPS)
    ages, peak = plan.ages(), 0
    kept: set[tuple[str, int]] = set()
    runs: dict[str, list[tuple[int, bool]]] = {}  # the latest first
    for i, step in enumerate(plan.steps):
        for load in step.load:
            num_values = {"-": 1, "1": 2, "2": 3}[load.code]
            assert load.code == table[load.site][i]
            # The last values that really ran, of the unguided half those of steps that ran in full.
            in_full = tuple(j for j, is_half in runs[load.site] if not is_half)
            assert load.guided == tuple(j for j, _ in runs[load.site])[:num_values]
            assert load.unguided == (() if step.is_half else in_full[:num_values])
            assert load.keys <= kept
            assert ages[load.site][i] == i - load.guided[0] > 0
        for name in step.run:
            runs.setdefault(name, []).insert(0, (i, step.is_half))
        if graph.output in step.run and not step.is_half and graph.guidance not in step.run:
            runs.setdefault(graph.guidance, []).insert(0, (i, False))  # not made because nothing loads it
        assert set(step.store) <= set(step.run) & set(table)
        for model in ("controlnet", "unet"):  # in the order in which they run
            kept -= {key for key in step.free if key[0].startswith(model)}
            kept |= {(name, i) for name in step.store if name.startswith(model)}
            samples = {key: 1 if plan.steps[key[1]].is_half else 2 for key in kept}
            peak = max(peak, sum(samples[key] * costs[key[0]].numel for key in kept))
    assert not kept
    assert plan.cache_bytes(costs, num_halves=2, itemsize=2) == 2 * peak
    for name, row in ages.items():
        assert [age > 0 for age in row] == [name in step.loaded for step in plan.steps]


@settings(max_examples=60)
@given(tables(first_computes=False))
def test_a_value_that_was_never_computed_is_refused(case: Case) -> None:
    shape, table = case
    graph, _ = costs_of(shape)
    ran: set[str] = set()
    missing = []
    for i in range(NUM_STEPS):
        step = live_step(graph, {site for site, row in table.items() if row[i] != "C"})
        missing += [(i, name) for name in step.load if name not in ran]
        ran.update(step.run)
        ran |= {graph.guidance} if graph.output in step.run and not step.is_half else set()
    if missing:
        with pytest.raises(ValueError, match=f"Step {missing[0][0]} reuses site '{missing[0][1]}'"):
            compile_plan(graph, table, NUM_STEPS)
    else:
        assert isinstance(compile_plan(graph, table, NUM_STEPS), Plan)


@settings(max_examples=30)
@given(tables())
def test_what_a_flip_changes_is_what_liveness_says(case: Case) -> None:
    shape, table = case
    graph, _ = costs_of(shape)
    reused = {site for site, row in table.items() if row[1] != "C"}
    before = live_step(graph, reused)
    flips = Flips(graph, set(before.run), reused)
    for site in sorted({*list_sites(graph), *table} & {*before.run, *before.load} - {graph.guidance}):
        after = live_step(graph, reused ^ {site})
        assert sorted(flips.changes(site)) == sorted(({*before.run} ^ {*after.run}) - {site})


@settings(max_examples=40)
@given(tables(), st.data())
def test_reusing_more_never_costs_more(case: Case, data: st.DataObject) -> None:
    shape, table = case
    graph, costs = costs_of(shape)
    if not table:
        return
    site = data.draw(st.sampled_from(list(table)))
    step = data.draw(st.integers(1, NUM_STEPS - 1))
    more = {**table, site: "".join("-" if i == step else c for i, c in enumerate(table[site]))}
    for attention in (False, True):
        before = compile_plan(graph, table, NUM_STEPS).macs_per_step(costs, attention=attention)
        after = compile_plan(graph, more, NUM_STEPS).macs_per_step(costs, attention=attention)
        assert all(a <= b for a, b in zip(after, before, strict=True))


@settings(max_examples=30)
@given(tables())
def test_expected_macs_of_certain_gates_are_the_plans(case: Case) -> None:
    shape, table = case
    graph, costs = costs_of(shape)
    sites = list(table)
    gates = torch.tensor(
        [[float(table[site][i] == "C") for site in sites] for i in range(NUM_STEPS)], dtype=torch.float64
    )
    expected = ExpectedMacs(graph, costs, sites)(gates.reshape(NUM_STEPS, len(sites)))
    full = sum(cost.macs for cost in costs.values())
    macs = compile_plan(graph, table, NUM_STEPS).macs_per_step(costs, num_halves=2)
    torch.testing.assert_close(expected, torch.tensor(macs, dtype=torch.float64) / (2 * full), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_expected_macs_of_uncertain_gates(shape: str) -> None:
    """Between the extremes, rising with every gate, with finite gradients; near the mean of sampled plans."""
    graph, costs = costs_of(shape)
    sites = list_sites(graph)
    expected_macs = ExpectedMacs(graph, costs, sites)
    p = torch.full((len(sites),), 0.9, dtype=torch.float64, requires_grad=True)
    value = expected_macs(p)
    (gradient,) = torch.autograd.grad(value, p)
    assert gradient.isfinite().all()
    assert (gradient >= -1e-12).all()
    assert gradient.sum() > 0
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(200):
        reused = torch.rand(len(sites), generator=generator) > 0.9
        step = live_step(graph, {site for site, r in zip(sites, reused.tolist(), strict=True) if r})
        kept = sum(costs[name].macs for name in step.run) / sum(cost.macs for cost in costs.values())
        samples.append(kept / 2 if step.is_half else kept)
    assert value.item() == pytest.approx(sum(samples) / len(samples), abs=0.1)


def test_gradients_are_finite_at_certain_gates() -> None:
    graph, costs = costs_of("sd15")
    sites = list_sites(graph)
    for certainty in (0.0, 1.0):
        p = torch.full((2, len(sites)), certainty, requires_grad=True)
        ExpectedMacs(graph, costs, sites)(p).sum().backward()
        assert p.grad is not None
        assert p.grad.isfinite().all()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"unet.nothing:out": "CC"}, r"'unet\.nothing:out' does not exist"),
        ({"unet:eps": "C"}, "'unet:eps' has 1 steps, the schedule 2"),
        ({"unet:eps": "-C"}, "Step 0 reuses site 'unet:eps'"),
        ({"unet:eps": "Cx"}, "has the code 'x'; known are C and - 1"),
        ({"unet:eps": "C0"}, "which is for unet:guidance only"),
        ({"unet:guidance": "Cm"}, "has no halves itself"),
    ],
)
def test_wrong_tables_are_refused(table: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_plan(costs_of("sd15")[0], table, 2)


def test_a_value_dead_when_scheduled_is_not_there_later() -> None:
    """Computed by its row at step 1, but all that reads it is reused then: step 2 loads the value of step 0."""
    graph, _ = costs_of("sd15")
    inner, outer = "unet.up_blocks.2.attentions.0:out", "unet.up_blocks.3.attentions.1:out"
    plan = compile_plan(graph, {inner: "CC-", outer: "C-C"}, 3)
    assert inner not in plan.steps[1].run
    assert plan.ages() == {inner: [0, 0, 2], outer: [0, 1, 0]}
