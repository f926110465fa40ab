"""From a schedule to what runs: liveness over the dataflow graph, step by step, and its MACs.

At one step a node is *live* if something that runs reads it, starting from the UNet's prediction. A live site
that the schedule reuses is *loaded*, every other live node *runs*, the rest is dead. What is loaded is the value
of the last step at which the site really ran.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor

from hgc_learn.graph import Graph
from hgc_learn.macs import NodeCost


@dataclass(frozen=True)
class StepPlan:
    """One step. `run` is in execution order; `store` are the sites that ran and whose value a later step loads;
    `free` are the sites whose kept value no step after this one loads."""

    run: tuple[str, ...]
    load: tuple[str, ...]
    store: tuple[str, ...] = ()
    free: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a schedule runs at each step."""

    steps: tuple[StepPlan, ...]

    def macs(self, costs: Mapping[str, NodeCost], *, batch_size: int = 2, attention: bool = False) -> int:
        """Multiply-accumulates of all steps. `batch_size` is 2 per image with guidance, 1 without; `attention`
        counts the attention matmuls too (papers mostly leave them out)."""
        return sum(self.macs_per_step(costs, batch_size=batch_size, attention=attention))

    def macs_per_step(
        self, costs: Mapping[str, NodeCost], *, batch_size: int = 2, attention: bool = False
    ) -> list[int]:
        return [batch_size * sum(costs[n].total(attention) for n in step.run) for step in self.steps]

    def ages(self) -> dict[str, list[int]]:
        """Per site that is ever loaded: how many steps old the value is where it is loaded, 0 elsewhere."""
        ages = {site: [0] * len(self.steps) for step in self.steps for site in step.load}
        last_run: dict[str, int] = {}
        for i, step in enumerate(self.steps):
            for site in step.load:
                ages[site][i] = i - last_run[site]
            last_run.update((name, i) for name in step.run if name in ages)
        return ages

    def cache_bytes(self, costs: Mapping[str, NodeCost], *, batch_size: int = 2, itemsize: int = 4) -> int:
        """The most bytes that kept tensors take at any one time."""
        kept: set[str] = set()
        peak = 0
        for step in self.steps:
            kept.update(step.store)
            peak = max(peak, sum(costs[name].numel for name in kept))
            kept.difference_update(step.free)
        return batch_size * itemsize * peak

    def num_patterns(self) -> int:
        """How many different sets of running nodes there are: the graphs that torch.compile would make."""
        return len({step.run for step in self.steps})


def live_step(graph: Graph, reused: Collection[str]) -> StepPlan:
    """Liveness of one step at which the sites `reused` are loaded where they are needed."""
    live = {graph.output}
    run, load = [], []
    for name in reversed(graph.nodes):
        if name not in live:
            continue
        if name in reused:
            load.append(name)
        else:
            run.append(name)
            live.update(graph.nodes[name].inputs)
    return StepPlan(tuple(reversed(run)), tuple(reversed(load)))


def compile_plan(graph: Graph, compute: Mapping[str, Sequence[bool]], num_steps: int) -> Plan:
    """Compiles a schedule's table.

    Args:
        graph: the models' dataflow, with every site of the table in it.
        compute: per site, whether it is computed (True) or reused (False) at each step.
        num_steps: number of model calls of a run.

    Raises:
        ValueError: a site that the graph does not have, a row of the wrong length, or a step that would load a
            value that no earlier step computed.
    """
    for site, row in compute.items():
        if site not in graph.nodes:
            raise ValueError(f"Site {site!r} does not exist in this model.")
        if len(row) != num_steps:
            raise ValueError(f"Site {site!r} has {len(row)} steps, the schedule {num_steps}.")
    steps = [live_step(graph, {site for site, row in compute.items() if not row[i]}) for i in range(num_steps)]
    ran: set[str] = set()
    for i, step in enumerate(steps):
        for site in step.load:
            if site not in ran:
                raise ValueError(
                    f"Step {i} reuses site {site!r}, which no earlier step has computed. Let it compute at or before "
                    "that step (it may be scheduled, yet dead because all that reads it is reused)."
                )
        ran.update(name for name in step.run if name in compute)
    return Plan(tuple(_with_lifetimes(steps, set(compute))))


def _with_lifetimes(steps: Sequence[StepPlan], sites: set[str]) -> list[StepPlan]:
    """Adds what to store and to free, walking backwards over the steps."""
    wanted: set[str] = set()  # sites whose kept value a later step loads before they run again
    result = []
    for step in reversed(steps):
        store = tuple(name for name in step.run if name in wanted)
        free = tuple(name for name in step.load if name not in wanted)
        wanted.difference_update(step.run)
        wanted.update(step.load)
        result.append(StepPlan(step.run, step.load, store, free))
    return result[::-1]


class ExpectedMacs:
    """Expected MACs of random gates, differentiable: P(node runs), from the output backwards.

    Gates are taken as independent. A reader of a node counts only if no other reader of it runs whenever that
    one does (a residual branch runs only if the sum behind it does), which keeps residual streams exact: their
    events are nested, not independent.
    """

    def __init__(self, graph: Graph, costs: Mapping[str, NodeCost], sites: Sequence[str], *, attention: bool = False):
        self.sites = {name: s for s, name in enumerate(sites)}
        self.readers = _decisive_readers(graph)
        self.order = list(reversed(graph.nodes))
        self.output = graph.output
        full = sum(cost.total(attention) for cost in costs.values())
        self.costs = {name: costs[name].total(attention) / full for name in graph.nodes}

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
    readers = graph.consumers()
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
