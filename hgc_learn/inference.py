"""Runs a schedule inside a diffusers pipeline: `apply_schedule(pipe, schedule)`, then `pipe(...)` as always.

The forward of the UNet and of each ControlNet is replaced by one that walks the schedule's plan: the live nodes
run through the models' own submodules, reused sites are read from the cache, all else is skipped. Nothing is read
back from the device during a run. Needs torch, diffusers and safetensors only.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hgc_learn import ops
from hgc_learn.architectures import Architecture
from hgc_learn.fingerprint import ModelFingerprint
from hgc_learn.forwards import RoutedForwards
from hgc_learn.graph import Graph, build_graph
from hgc_learn.plan import Plan, StepPlan, compile_plan
from hgc_learn.schedule import HGCSchedule, ScheduleError
from hgc_learn.sites import enclosing_module, is_inside

__all__ = ["HGCSchedule", "ScheduleError", "ScheduleHandle", "apply_schedule", "remove_schedule"]


def apply_schedule(
    pipe: Any, schedule: HGCSchedule | str | os.PathLike[str], *, allow_other_weights: bool = False
) -> ScheduleHandle:
    """Makes every later call of `pipe` follow `schedule`, until `remove_schedule(pipe)`.

    Args:
        pipe: a diffusers pipeline with a `unet`, a `scheduler` and optionally a `controlnet`.
        schedule: a schedule or the path of its file. One that is already applied is replaced.
        allow_other_weights: accept models of the same architecture with other weights. The schedule then runs,
            but the quality it was measured with is not promised.

    Returns:
        A handle with `stats()` and `remove()`; as a context manager it removes the schedule on leaving.

    Raises:
        ScheduleError: the file is invalid, or made for another model or scheduler; the message says which.
        ValueError: the pipeline has models whose dataflow is not known.
    """
    if not hasattr(pipe, "unet"):
        raise ValueError(f"{type(pipe).__name__} has no unet; schedules support diffusers pipelines with a UNet.")
    if not isinstance(schedule, HGCSchedule):
        schedule = HGCSchedule.load(schedule)
    controlnet = getattr(pipe, "controlnet", None)
    _check_model(schedule, pipe.unet, controlnet, allow_other_weights)
    expand = {enclosing_module(site) for site in schedule.sites if is_inside(site)}
    graph = build_graph(pipe.unet, controlnet, expand)
    try:
        plan = compile_plan(graph, schedule.compute_table(), schedule.num_inference_steps)
    except ValueError as error:
        raise ScheduleError(f"sites: {error}") from None
    remove_schedule(pipe)
    runtime = _Runtime(pipe, schedule, graph, plan)
    runtime.install()
    return ScheduleHandle(pipe, runtime)


def remove_schedule(pipe: Any) -> None:
    """Gives the pipeline its own forwards back. Does nothing if no schedule is applied."""
    runtime = RoutedForwards.installed_on(pipe.unet)
    if runtime is not None:
        runtime.uninstall()


class ScheduleHandle:
    """What `apply_schedule` returns."""

    def __init__(self, pipe: Any, runtime: _Runtime):
        self.pipe = pipe
        self._runtime = runtime

    @property
    def schedule(self) -> HGCSchedule:
        return self._runtime.schedule

    @property
    def plan(self) -> Plan:
        return self._runtime.plan

    def stats(self) -> dict[str, Any]:
        """What the schedule saves by its plan, and what the latest run did.

        Keys: `num_inference_steps`; `macs_full`, `macs_cached`, `macs_reduction` per image at the schedule's size
        (attention matmuls not counted) and the same with `_attention`; `cache_bytes` at its peak; `steps_run` and
        `steps_refreshed` of the latest run (a step is refreshed when its inputs changed in mid-run).
        """
        return self._runtime.stats()

    def remove(self) -> None:
        self._runtime.uninstall()

    def __enter__(self) -> ScheduleHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@dataclass(frozen=True)
class _Op:
    name: str
    run: Any
    inputs: tuple[str, ...]
    drop: tuple[str, ...]  # values that nothing after this op reads


@dataclass(frozen=True)
class _Program:
    """What one model runs at one step."""

    ops: tuple[_Op, ...]
    load: tuple[str, ...]
    store: tuple[str, ...]
    free: tuple[str, ...]


def _compile(graph: Graph, step: StepPlan, model: str) -> _Program:
    nodes = [graph.nodes[name] for name in step.run if graph.nodes[name].model == model]
    given = set(graph.residuals)  # they reach the UNet as arguments
    nodes = [node for node in nodes if node.name not in given]
    own = {node.name for node in nodes}
    last_reader = {name: node.name for node in nodes for name in node.inputs}
    results = {graph.output} | {i for name in graph.residuals for i in graph.nodes[name].inputs} | set(step.store)
    program = []
    for node in nodes:
        drop = {name for name in node.inputs if last_reader[name] == node.name and name not in results}
        program.append(_Op(node.name, node.run, node.inputs, tuple(drop)))

    def mine(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if graph.nodes[name].model == model)

    return _Program(tuple(program), mine(step.load), tuple(n for n in step.store if n in own), mine(step.free))


class _Runtime(RoutedForwards):
    """One schedule on one pipeline: runs the nodes of its plan, keeps and reads the cache."""

    def __init__(self, pipe: Any, schedule: HGCSchedule, graph: Graph, plan: Plan):
        super().__init__(pipe, graph, len(plan.steps))
        self.schedule, self.plan = schedule, plan
        # A refresh computes everything and keeps whatever any later step may load.
        loaded = {name for step in plan.steps for name in step.load}
        refresh = StepPlan(tuple(graph.nodes), (), tuple(n for n in graph.nodes if n in loaded))
        self.programs = {m: [_compile(graph, step, m) for step in plan.steps] for m in self.models}
        self.refresh = {m: _compile(graph, refresh, m) for m in self.models}

    def check_run(self, timesteps: Tensor, timestep: Any) -> int:
        """Compares the run with the schedule, once, and returns the index of its first step."""
        scheduler = type(self.pipe.scheduler).__name__
        expected = self.schedule.timesteps
        actual = [float(t) for t in timesteps.tolist()]
        if scheduler != self.schedule.scheduler:
            raise ScheduleError(
                f"scheduler: the schedule was made for {self.schedule.scheduler}, the pipeline has {scheduler}. "
                "Set pipe.scheduler accordingly or train a schedule for it."
            )
        if len(actual) != len(expected):
            raise ScheduleError(
                f"num_inference_steps: the schedule has {len(expected)} steps, this run {len(actual)}. "
                f"Call the pipeline with num_inference_steps={len(expected)}."
            )
        if any(abs(a - b) > 1e-3 * max(1.0, abs(b)) for a, b in zip(actual, expected, strict=True)):
            raise ScheduleError(
                f"timesteps: this run visits {_brief(actual)}, the schedule was made for {_brief(expected)}. "
                "Use the scheduler settings (timestep_spacing, ...) it was made with."
            )
        guidance_scale = getattr(self.pipe, "_guidance_scale", None)
        if guidance_scale is not None and abs(guidance_scale - self.schedule.guidance_scale) > 1e-6:
            warnings.warn(
                f"guidance_scale is {guidance_scale}, the schedule was made for {self.schedule.guidance_scale}: "
                "its measured quality does not carry over.",
                stacklevel=2,
            )
        # img2img starts in the middle of the scheduler's timesteps.
        return min(range(len(actual)), key=lambda i: abs(actual[i] - float(timestep)))

    def execute(self, model: str, step: int, call: ops.Call, given: dict[str, Tensor]) -> dict[str, Tensor]:
        program = self.refresh[model] if step in self.refreshed else self.programs[model][step]
        values = given
        for name in program.load:
            values[name] = self.cache[name]
        for op in program.ops:
            values[op.name] = op.run(call, *[values[name] for name in op.inputs])
            for name in op.drop:
                del values[name]
        for name in program.store:
            self.cache[name] = values[name]
        for name in program.free:
            del self.cache[name]
        return values

    def stats(self) -> dict[str, Any]:
        schedule, batch = self.schedule, self.schedule.batch_size
        graph, costs = Architecture.of(self.pipe).measure((schedule.height, schedule.width))
        plan = compile_plan(graph, schedule.compute_table(), schedule.num_inference_steps)
        full = compile_plan(graph, {}, schedule.num_inference_steps)
        result: dict[str, Any] = {"num_inference_steps": schedule.num_inference_steps}
        for suffix, attention in (("", False), ("_attention", True)):
            macs_full = full.macs(costs, batch_size=batch, attention=attention)
            macs_cached = plan.macs(costs, batch_size=batch, attention=attention)
            result[f"macs_full{suffix}"] = macs_full
            result[f"macs_cached{suffix}"] = macs_cached
            result[f"macs_reduction{suffix}"] = 1 - macs_cached / macs_full
        result["cache_bytes"] = plan.cache_bytes(costs, batch_size=batch, itemsize=self.pipe.unet.dtype.itemsize)
        result["steps_run"] = self.num_calls["unet"]
        result["steps_refreshed"] = len(self.refreshed)
        return result


def _check_model(schedule: HGCSchedule, unet: Any, controlnet: Any, allow_other_weights: bool) -> None:
    difference = schedule.model.difference(ModelFingerprint.of(unet, controlnet))
    if difference is None or (difference[0] == "weights" and allow_other_weights):
        return
    what, detail = difference
    way_out = "Use the model it was made for or train a schedule for this one."
    if what == "weights":
        way_out = "Pass allow_other_weights=True to run it all the same; its measured quality does not carry over."
    raise ScheduleError(f"model: the schedule was made for another model ({what}: {detail}). {way_out}")


def _brief(timesteps: Any) -> str:
    return ", ".join(f"{t:g}" for t in timesteps[:3]) + f", ... {timesteps[-1]:g}"
