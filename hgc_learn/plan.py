"""From a schedule to what runs: liveness over the dataflow graph, step by step, and its MACs.

At one step a node is *live* if something that runs reads it, starting from the UNet's prediction. A live site
that the schedule reuses is *loaded*, every other live node *runs*, the rest is dead. What is loaded is filled in by a
predictor from the values of the last steps at which the site really ran.

With guidance a batch has two halves. A step that reuses the guidance difference runs the guided half only; a site's
unguided half is then as old as the last step that ran in full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import networkx as nx
import torch
from torch import Tensor

from hgc_learn.predictors import BY_CODE
from hgc_learn.sites import enclosing_module, is_inside

if TYPE_CHECKING:
    from hgc_learn.models.graph import Graph
    from hgc_learn.models.macs import NodeCost

COMPUTE = "C"
"""The character of a row at steps that compute the site."""


def row_of(computes: Iterable[bool], code: str = "-") -> str:
    """The row of a site that computes at these of the steps and is filled in by one predictor at all others."""
    return "".join(COMPUTE if each else code for each in computes)


@dataclass(frozen=True)
class Load:
    """A site that is filled in. `guided` and `unguided` are the steps of the values that its predictor looks at, the
    latest first, for each half of the batch; without guidance both are the same, at a step that runs the guided half
    only, `unguided` is empty."""

    site: str
    code: str
    guided: tuple[int, ...]
    unguided: tuple[int, ...]

    @property
    def keys(self) -> set[tuple[str, int]]:
        """The kept values it reads, by site and step."""
        return {(self.site, step) for step in self.guided + self.unguided}


@dataclass(frozen=True)
class StepPlan:
    """One step. `run` is in execution order; `store` are the sites that ran and whose value a later step loads;
    `free` are the kept values (site, step) that no step after this one loads; `is_half`: only the guided half runs."""

    run: tuple[str, ...]
    load: tuple[Load, ...]
    store: tuple[str, ...] = ()
    free: tuple[tuple[str, int], ...] = ()
    is_half: bool = False

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the loaded sites, in execution order."""
        return tuple(load.site for load in self.load)


@dataclass(frozen=True)
class Plan:
    """What a schedule runs at each step."""

    steps: tuple[StepPlan, ...]

    def macs(self, costs: Mapping[str, NodeCost], *, num_halves: int = 2, attention: bool = False) -> int:
        """Multiply-accumulates of all steps. `num_halves` is 2 per image with guidance, 1 without; `attention`
        counts the attention matmuls too (papers mostly leave them out)."""
        return sum(self.macs_per_step(costs, num_halves=num_halves, attention=attention))

    def macs_beside(self, full: Plan, costs: Mapping[str, NodeCost], *, num_halves: int = 2) -> dict[str, int]:
        """Multiply-accumulates of the plan that computes everything and of this one, `full` and `cached`; with those of
        the attention matmuls, `full_attention` and `cached_attention`."""
        return {
            f"{name}{suffix}": plan.macs(costs, num_halves=num_halves, attention=attention)
            for suffix, attention in (("", False), ("_attention", True))
            for name, plan in (("full", full), ("cached", self))
        }

    def macs_per_step(
        self, costs: Mapping[str, NodeCost], *, num_halves: int = 2, attention: bool = False
    ) -> list[int]:
        runs = {step.run for step in self.steps}  # few of them differ in most schedules
        macs = {run: sum(costs[name].total(attention) for name in run) for run in runs}
        return [(1 if step.is_half else num_halves) * macs[step.run] for step in self.steps]

    def ages(self) -> dict[str, list[int]]:
        """Per site that is ever loaded: how many steps old its latest value is where it is loaded, 0 elsewhere."""
        ages = {site: [0] * len(self.steps) for step in self.steps for site in step.loaded}
        for i, step in enumerate(self.steps):
            for load in step.load:
                ages[load.site][i] = i - load.guided[0]
        return ages

    def cache_bytes(self, costs: Mapping[str, NodeCost], *, num_halves: int = 2, itemsize: int = 4) -> int:
        """The most bytes that kept tensors take at any one time. The ControlNets run first; what a model loads for the
        last time is freed at once, what it computes is kept when it has run."""
        kept: set[tuple[str, int]] = set()
        peak = 0
        for i, step in enumerate(self.steps):
            for is_unet in (False, True):
                kept.difference_update(key for key in step.free if key[0].startswith("unet") == is_unet)
                kept.update((name, i) for name in step.store if name.startswith("unet") == is_unet)
                samples = {key: 1 if self.steps[key[1]].is_half else num_halves for key in kept}
                peak = max(peak, sum(samples[key] * costs[key[0]].numel for key in kept))
        return itemsize * peak

    def num_patterns(self) -> int:
        """How many different sets of running nodes there are, the guidance difference not counted: the graphs that
        torch.compile makes."""
        runs = (tuple(name for name in step.run if not name.endswith(":guidance")) for step in self.steps)
        return len(set(zip(runs, (step.is_half for step in self.steps), strict=True)))


@dataclass(frozen=True)
class Liveness:
    """What one step runs and which sites it loads, in execution order; `is_half`: the guided half only."""

    run: tuple[str, ...]
    load: tuple[str, ...]
    is_half: bool


def live_step(graph: Graph, reused: Collection[str]) -> Liveness:
    """Liveness of one step at which the sites `reused` are loaded where they are needed."""
    live = {graph.output}
    run, load = [], []
    is_half = graph.guidance in reused
    if is_half:
        load.append(graph.guidance)
    for name in reversed(graph.nodes):
        if name not in live:
            continue
        if name in reused:
            load.append(name)
        else:
            run.append(name)
            live.update(graph.nodes[name].inputs)
    return Liveness(tuple(reversed(run)), tuple(reversed(load)), is_half)


class Flips:
    """Which other nodes of a step begin or cease to run if one of the sites chooses the other way.

    Args:
        run: names of the nodes that run.
        reused: sites that are not computed, needed or not.
    """

    def __init__(self, graph: Graph, run: Collection[str], reused: Collection[str]):
        self.nodes, self.run, self.reused = graph.nodes, run, reused
        self.num_readers = Counter(name for reader in run for name in graph.nodes[reader].inputs)
        self.num_readers[graph.output] += 1

    def changes(self, site: str) -> list[str]:
        """Their names, without that of the site itself, which must be one that runs or is loaded."""
        return self._ceasing(site) if site in self.run else self._beginning(site)

    def _ceasing(self, site: str) -> list[str]:
        lost, found, ahead = Counter[str](), [], [site]
        while ahead:
            for name in self.nodes[ahead.pop()].inputs:
                lost[name] += 1
                if lost[name] == self.num_readers[name] and name in self.run:
                    found.append(name)
                    ahead.append(name)
        return found

    def _beginning(self, site: str) -> list[str]:
        found, ahead = dict[str, None](), [site]
        while ahead:
            for name in self.nodes[ahead.pop()].inputs:
                if name not in self.run and name not in self.reused and name not in found:
                    found[name] = None
                    ahead.append(name)
        return [*found]


def compile_plan(graph: Graph, rows: Mapping[str, str], num_steps: int) -> Plan:
    """Compiles a schedule's rows.

    Args:
        graph: the models' dataflow, with every site of the rows in it.
        rows: per site, one code per step: `C` compute, or that of a predictor.
        num_steps: number of model calls of a run.

    Raises:
        ValueError: a site that the graph does not have, a row of the wrong length, an unknown code, or a step that
            would load a value that no earlier step computed.
    """
    for site, row in rows.items():
        if site not in graph.nodes:
            raise ValueError(f"Site {site!r} does not exist in this model.{_why_absent(graph, site)}")
        if len(row) != num_steps:
            raise ValueError(f"Site {site!r} has {len(row)} steps, the schedule {num_steps}.")
        check_codes(site, row)
    history: dict[str, list[tuple[int, bool]]] = {site: [] for site in rows}  # (step, half only), the latest first
    steps, lives = [], {}
    for i in range(num_steps):
        reused = frozenset(site for site, row in rows.items() if row[i] != COMPUTE)
        if reused not in lives:
            lives[reused] = live_step(graph, reused)
        live = lives[reused]
        load = tuple(_load(site, rows[site][i], history[site], i, live.is_half) for site in live.load)
        run = live.run
        if graph.guidance in rows and graph.output in run and not live.is_half:
            run += (graph.guidance,)
        for name in run:
            if name in history:
                history[name].insert(0, (i, live.is_half))
        steps.append(StepPlan(run, load, is_half=live.is_half))
    return Plan(tuple(_with_lifetimes(steps, graph.guidance)))


def _why_absent(graph: Graph, site: str) -> str:
    """Known where it would be inside a module whose inside is not laid open."""
    path = enclosing_module(site)
    if not is_inside(site) or path not in graph.modules or path in graph.opened:
        return ""
    return (
        f" It would be inside {path}, which is not made of diffusers' plain layers: undo what has patched them (tomesd "
        "and the like) first."
    )


def check_codes(site: str, row: str) -> None:
    """Raises ValueError for a code that is unknown or does not belong to the site."""
    for code in set(row) - {COMPUTE}:
        if code not in BY_CODE:
            raise ValueError(f"Site {site!r} has the code {code!r}; known are {COMPUTE} and {' '.join(BY_CODE)}.")
        is_guidance = site.endswith(":guidance")
        if BY_CODE[code].only_guidance and not is_guidance:
            raise ValueError(f"Site {site!r} has the code {code!r}, which is for unet:guidance only.")
        if BY_CODE[code].mean_of_halves and is_guidance:
            raise ValueError(f"Site {site!r} has the code {code!r}; a difference of the halves has no halves itself.")


def _load(site: str, code: str, history: Sequence[tuple[int, bool]], step: int, is_half: bool) -> Load:
    if not history:
        raise ValueError(
            f"Step {step} reuses site {site!r}, which no earlier step has computed. Let it compute at or before "
            "that step (it may be scheduled, yet dead because all that reads it is reused)."
        )
    predictor = BY_CODE[code]
    in_full = tuple(i for i, half in history if not half)[: predictor.num_values]
    assert in_full, "the first step loads nothing, so it runs everything in full"
    guided = in_full if predictor.mean_of_halves else tuple(i for i, _ in history)[: predictor.num_values]
    return Load(site, code, guided, () if is_half else in_full)


def _with_lifetimes(steps: Sequence[StepPlan], guidance: str) -> Iterable[StepPlan]:
    """Adds what to store and to free, walking backwards over the steps. The guidance difference runs only where a later
    step loads it."""
    wanted: list[set[str]] = [set() for _ in steps]  # by step, the sites whose values a later one loads
    result = []
    for i in reversed(range(len(steps))):
        step, run = steps[i], steps[i].run
        if run[-1:] == (guidance,) and guidance not in wanted[i]:
            run = run[:-1]
        store = tuple(name for name in run if name in wanted[i]) if wanted[i] else ()
        keys = set().union(*(load.keys for load in step.load))
        free = tuple(sorted((site, j) for site, j in keys if site not in wanted[j]))
        result.append(replace(step, run=run, store=store, free=free))
        for site, j in keys:
            wanted[j].add(site)
    return result[::-1]


class ExpectedMacs:
    """Expected MACs of random gates, differentiable: P(node runs), from the output backwards.

    Gates are taken as independent. A reader of a node counts only if no other reader of it runs whenever that
    one does (a residual branch runs only if the sum behind it does), which keeps residual streams exact: their
    events are nested, not independent.
    """

    def __init__(self, graph: Graph, costs: Mapping[str, NodeCost], sites: Sequence[str]):
        self.sites = {name: s for s, name in enumerate(sites)}
        self.readers = _decisive_readers(graph)
        self.order = [name for name in reversed(graph.nodes) if name != graph.guidance]
        self.output, self.guidance = graph.output, graph.guidance
        full = sum(cost.macs for cost in costs.values())
        self.costs = {name: costs[name].macs / full for name in graph.nodes}

    def __call__(self, p_compute: Tensor) -> Tensor:
        """`p_compute` [..., sites] are probabilities of computing; returns the expected share of the full step's
        MACs, [...]."""
        runs: dict[str, Tensor] = {}
        ones = p_compute.new_ones(p_compute.shape[:-1])
        total = torch.zeros_like(ones)
        columns = p_compute.unbind(-1)
        for name in self.order:
            if name == self.output:
                live = ones
            else:
                live = _union([runs[reader] for reader in self.readers[name]], ones)
            column = self.sites.get(name)
            runs[name] = live if column is None else live * columns[column]
            if self.costs[name]:
                total = total + self.costs[name] * runs[name]
        if self.guidance in self.sites:  # without it, half of the batch runs
            total = total * (1 + columns[self.sites[self.guidance]]) / 2
        return total


def _union(probabilities: list[Tensor], ones: Tensor) -> Tensor:
    if len(probabilities) == 1:
        return probabilities[0]
    none = ones
    for p in probabilities:
        none = none * (1 - p)
    return 1 - none


def _decisive_readers(graph: Graph) -> dict[str, list[str]]:
    """Per node, its readers less those post-dominated by another reader of the same node.

    If every path from reader a to the output passes reader b, then a runs only if b does, unless a site between
    them is loaded instead, in which case a is dead too: so a adds nothing to the node's liveness.
    """
    readers = {n: [r for r in those if r != graph.guidance] for n, those in graph.consumers().items()}
    backwards = nx.DiGraph((reader, name) for name, those in readers.items() for reader in those)
    backwards.add_nodes_from(graph.nodes)
    parent = nx.immediate_dominators(backwards, graph.output)

    def dominators(name: str) -> set[str]:
        found = set()
        while parent.get(name) not in (None, name):
            name = parent[name]
            found.add(name)
        return found

    return {name: [r for r in those if not dominators(r) & (set(those) - {r})] for name, those in readers.items()}
