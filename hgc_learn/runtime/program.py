"""A plan as instructions: what one model runs, loads, keeps and frees at one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hgc_learn.models import ops
from hgc_learn.models.graph import Graph
from hgc_learn.plan import Load, StepPlan


@dataclass(frozen=True)
class Op:
    """One node; `drop` are values that nothing after it reads."""

    name: str
    run: Callable[..., Tensor]
    inputs: tuple[str, ...]
    drop: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """What one model runs at one step. `results`: what is read after it has run, by the cache or by others."""

    ops: tuple[Op, ...]
    load: tuple[Load, ...]
    store: tuple[str, ...]
    free: tuple[tuple[str, int], ...]
    results: frozenset[str]


def compile_program(graph: Graph, step: StepPlan, model: str) -> Program:
    """The part of a step that runs in the forward of `model`."""
    nodes = [graph.nodes[name] for name in step.run if graph.nodes[name].model == model]
    given = set(graph.residuals)  # they reach the UNet as arguments
    nodes = [node for node in nodes if node.name not in given]
    own = {node.name for node in nodes}
    last_reader = {name: node.name for node in nodes for name in node.inputs}
    controls = {i for name in graph.residuals for i in graph.nodes[name].inputs}
    results = {graph.output, graph.guidance} | controls | set(step.store)
    program = []
    for node in nodes:
        drop = {name for name in node.inputs if last_reader[name] == node.name and name not in results}
        program.append(Op(node.name, node.run, node.inputs, tuple(drop)))
    load = tuple(load for load in step.load if graph.nodes[load.site].model == model)
    free = tuple(key for key in step.free if graph.nodes[key[0]].model == model)
    return Program(tuple(program), load, tuple(n for n in step.store if n in own), free, frozenset(results))


def run_program(
    program: Program, call: ops.Call, values: dict[str, Tensor], skip: str | None, *, checkpointed: bool = False
) -> None:
    """Adds to `values` what the nodes give, and drops what is not read any more; the node `skip` is left out. If
    `checkpointed`, only what they give is kept for the backward pass: each is run again in it."""
    for op in program.ops:
        if op.name == skip:
            continue
        inputs = [values[name] for name in op.inputs]
        if checkpointed:
            values[op.name] = checkpoint(op.run, call, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            values[op.name] = op.run(call, *inputs)
        for name in op.drop:
            del values[name]
