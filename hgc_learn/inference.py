"""Runs a schedule inside a diffusers pipeline: `apply_schedule(pipe, schedule)`, then `pipe(...)` as always.

The forward of the UNet and of each ControlNet is replaced by one that walks the schedule's plan: the live nodes
run through the models' own submodules, reused sites are read from the cache, all else is skipped. Nothing is read
back from the device in mid-run. Needs torch, diffusers and safetensors only.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hgc_learn import ops
from hgc_learn.architectures import Architecture
from hgc_learn.fingerprint import ModelFingerprint
from hgc_learn.forwards import RoutedForwards, routed_models
from hgc_learn.graph import Graph, build_graph
from hgc_learn.plan import Load, Plan, StepPlan, compile_plan
from hgc_learn.predictors import BY_CODE, Fill
from hgc_learn.schedule import HGCSchedule, ScheduleError
from hgc_learn.sites import enclosing_module, is_inside

__all__ = ["HGCSchedule", "ScheduleError", "ScheduleHandle", "apply_schedule", "remove_schedule"]


def apply_schedule(
    pipe: Any,
    schedule: HGCSchedule | str | os.PathLike[str],
    *,
    allow_other_weights: bool = False,
    resample: bool = False,
) -> ScheduleHandle:
    """Makes every later call of `pipe` follow `schedule`, until `remove_schedule(pipe)`.

    Args:
        pipe: a diffusers pipeline with a `unet`, a `scheduler` and optionally a `controlnet`.
        schedule: a schedule, its file, or a folder or hub id (owner/name) that holds one. One that is already applied
            is replaced.
        allow_other_weights: accept models of the same architecture with other weights. The schedule then runs,
            but the quality it was measured with is not promised.
        resample: run with any number of steps and any timesteps: each step does, with a warning, what the schedule
            does at the nearest timestep. Without it such runs are refused.

    Returns:
        A handle with `stats()` and `remove()`; as a context manager it removes the schedule on leaving.

    Raises:
        ScheduleError: the file is invalid, or made for another model or scheduler; the message says which.
        ValueError: the pipeline has models whose dataflow is not known.
    """
    if not hasattr(pipe, "unet"):
        raise ValueError(f"{type(pipe).__name__} has no unet; schedules support diffusers pipelines with a UNet.")
    if not isinstance(schedule, HGCSchedule):
        schedule = HGCSchedule.from_pretrained(schedule)
    unet, *controlnets = routed_models(pipe).values()
    expand = {enclosing_module(site) for site in schedule.sites if is_inside(site)}
    graph = build_graph(unet, controlnets, expand)  # refuses unknown models by name
    _check_model(schedule, unet, controlnets, allow_other_weights)
    try:
        runtime = _Runtime(pipe, schedule, graph, resample)
    except ValueError as error:
        raise ScheduleError(f"sites: {error}") from None
    remove_schedule(pipe)
    runtime.install()
    return ScheduleHandle(pipe, runtime)


def remove_schedule(pipe: Any) -> None:
    """Gives the pipeline its own forwards back. Does nothing if no schedule is applied.

    Raises:
        ValueError: others have wrapped the forwards since, and must be undone first.
    """
    runtime = RoutedForwards.installed_on(routed_models(pipe)["unet"])
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

    def use_tensors(self, tensors: Mapping[str, Tensor], *, gradient_checkpointing: bool = False) -> None:
        """Fills in with these numbers from now on instead of the schedule's own: for those who learn them.

        Args:
            tensors: as `schedule.tensors`; gradients reach them in runs that keep the autograd graph.
            gradient_checkpointing: keep only what nodes give for the backward pass, and run each again in it.
        """
        self._runtime.use_tensors(tensors, gradient_checkpointing=gradient_checkpointing)

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
    load: tuple[Load, ...]
    store: tuple[str, ...]
    free: tuple[tuple[str, int], ...]


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
    load = tuple(load for load in step.load if graph.nodes[load.site].model == model)
    free = tuple(key for key in step.free if graph.nodes[key[0]].model == model)
    return _Program(tuple(program), load, tuple(n for n in step.store if n in own), free)


class _Runtime(RoutedForwards):
    """One schedule on one pipeline: runs the nodes of its plan, keeps and reads the cache."""

    def __init__(self, pipe: Any, schedule: HGCSchedule, graph: Graph, resample: bool):
        super().__init__(pipe, graph, schedule.num_inference_steps)
        self.original = schedule
        self.resample = resample
        self.follow(schedule)

    def follow(self, schedule: HGCSchedule) -> None:
        graph, self.schedule, self.num_steps = self.graph, schedule, schedule.num_inference_steps
        self.plan = plan = compile_plan(graph, schedule.sites, self.num_steps)
        # A refresh computes everything and keeps whatever any later step may load.
        loaded = {name for step in plan.steps for name in step.loaded}
        everything = tuple(name for name in graph.nodes if name != graph.guidance or name in loaded)
        refresh = StepPlan(everything, (), store=tuple(name for name in everything if name in loaded))
        self.programs = {m: [_compile(graph, step, m) for step in plan.steps] for m in self.models}
        self.refresh = {m: _compile(graph, refresh, m) for m in self.models}
        self.use_tensors(schedule.tensors)

    def use_tensors(self, tensors: Mapping[str, Tensor], *, gradient_checkpointing: bool = False) -> None:
        self.gradient_checkpointing = gradient_checkpointing
        self.fills = {
            (load.site, i, sources): self._coefficients(load, i, sources, tensors)
            for i, step in enumerate(self.plan.steps)
            for load in step.load
            for sources in (load.guided, load.unguided)
            if sources
        }

    def _coefficients(self, load: Load, step: int, sources: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Fill:
        predictor = BY_CODE[load.code]
        parameters = {parameter.name: tensors[f"{load.site}/{parameter.name}"] for parameter in predictor.parameters}
        if any("fills" in parameter.axes for parameter in predictor.parameters):
            index = self.schedule.sites[load.site][:step].count(load.code)
        else:
            index = step
        return predictor.fill([step - source for source in sources], index, parameters)

    def runs_half(self, step: int) -> bool:
        return self.plan.steps[step].is_half and step not in self.refreshed

    def check_run(self, timesteps: Tensor) -> None:
        """Compares the run with the schedule, once."""
        scheduler = type(self.pipe.scheduler).__name__
        expected, actual = self.original.timesteps, tuple(float(t) for t in timesteps.tolist())
        is_same = len(actual) == len(expected) and all(map(_is_close, actual, expected))
        if scheduler != self.schedule.scheduler:
            raise ScheduleError(
                f"scheduler: the schedule was made for {self.schedule.scheduler}, the pipeline has {scheduler}. "
                "Set pipe.scheduler accordingly or train a schedule for it."
            )
        if is_same:
            if self.schedule is not self.original:
                self.follow(self.original)
        elif self.resample:
            warnings.warn(
                f"timesteps: this run visits {len(actual)} ({_brief(actual)}), the schedule was made for "
                f"{len(expected)} ({_brief(expected)}). It is resampled: each step does what the schedule does at the "
                "nearest timestep; what was measured of it, quality and savings, does not carry over.",
                stacklevel=2,
            )
            if self.schedule.timesteps != actual:
                self.follow(self.original.resampled(actual))
        elif len(actual) != len(expected):
            raise ScheduleError(
                f"num_inference_steps: the schedule has {len(expected)} steps, this run {len(actual)}. Call the "
                f"pipeline with num_inference_steps={len(expected)}, or apply_schedule(..., resample=True)."
            )
        else:
            raise ScheduleError(
                f"timesteps: this run visits {_brief(actual)}, the schedule was made for {_brief(expected)}. Use the "
                "scheduler settings (timestep_spacing, ...) it was made with, or apply_schedule(..., resample=True)."
            )
        guidance_scale = getattr(self.pipe, "_guidance_scale", None)
        if guidance_scale is not None and abs(guidance_scale - self.schedule.guidance_scale) > 1e-6:
            warnings.warn(
                f"guidance_scale is {guidance_scale}, the schedule was made for {self.schedule.guidance_scale}: "
                "its measured quality does not carry over.",
                stacklevel=2,
            )

    def execute(self, model: str, step: int, call: ops.Call, given: dict[str, Tensor]) -> dict[str, Tensor]:
        is_refresh = step in self.refreshed
        program = self.refresh[model] if is_refresh else self.programs[model][step]
        has_halves = self.is_guided and not call.guess_mode
        is_half = has_halves and self.runs_half(step)
        num_guided = len(call.sample) if is_half else len(call.sample) // 2
        values, guidance = given, self.graph.guidance
        for load in program.load:
            if has_halves:
                values[load.site] = self._load(load, step, num_guided, is_half)
            elif load.site != guidance:
                values[load.site] = self._fill_in(load, step, load.guided, slice(None))
        for op in program.ops:
            if op.name == guidance and not has_halves:  # guidance was switched off: there is no difference
                continue
            inputs = [values[name] for name in op.inputs]
            if self.gradient_checkpointing:
                values[op.name] = checkpoint(op.run, call, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                values[op.name] = op.run(call, *inputs)
            for name in op.drop:
                del values[name]
        if is_refresh:
            self._keep_for_all(model, step, values)
            return values
        for name in program.store:
            if name in values:
                self.cache[name, step] = values[name]
        for key in program.free:
            self.cache.pop(key, None)
        return values

    def _keep_for_all(self, model: str, step: int, values: dict[str, Tensor]) -> None:
        """After a refresh the fresh value stands for every older one that a later step would load."""
        for site, i in list(self.cache):
            if self.graph.nodes[site].model == model:
                del self.cache[site, i]
        later = {key for plan in self.plan.steps[step + 1 :] for load in plan.load for key in load.keys}
        for site, i in later:
            if i <= step and site in values and self.graph.nodes[site].model == model:
                self.cache[site, i] = values[site]

    def _load(self, load: Load, step: int, num_guided: int, is_half: bool) -> Tensor:
        """Fills a site in where a batch has an unguided and a guided half, of `num_guided` samples each. Kept values
        may be of both halves or of the guided one alone."""
        guided, unguided = slice(-num_guided, None), slice(0, num_guided)
        if BY_CODE[load.code].mean_of_halves:
            halves = [self._fill_in(load, step, load.guided, half) for half in (unguided, guided)]
            mean = (halves[0] + halves[1]) / 2
            return mean if is_half else torch.cat([mean, mean])
        if is_half:
            return self._fill_in(load, step, load.guided, guided)
        if load.guided == load.unguided:
            return self._fill_in(load, step, load.guided, slice(None))
        return torch.cat(
            [
                self._fill_in(load, step, load.unguided, unguided),
                self._fill_in(load, step, load.guided, guided),
            ]
        )

    def _fill_in(self, load: Load, step: int, sources: tuple[int, ...], samples: slice) -> Tensor:
        """sum_j c_j F_j + bias over some samples of the kept values."""
        values = [self.cache[load.site, source] for source in sources]
        fill = self._fill_on(values[0], load.site, step, sources)
        if fill.holds:
            return values[0][samples]
        total = values[0][samples] * fill.coefficients[0]
        for value, coefficient in zip(values[1:], fill.coefficients[1:], strict=False):
            total = total + value[samples] * coefficient
        return total if fill.bias is None else total + fill.bias

    def _fill_on(self, value: Tensor, site: str, step: int, sources: tuple[int, ...]) -> Fill:
        """The coefficients on the device of `value`, shaped to be multiplied with it; moved once."""
        fill = self.fills[site, step, sources]
        tensors = [c for c in (*fill.coefficients, fill.bias) if isinstance(c, Tensor)]
        if all(t.device == value.device and t.dtype == value.dtype and t.ndim > 1 for t in tensors):
            return fill
        is_image = value.ndim == 4
        num_channels = value.shape[1] if is_image else value.shape[-1]
        for tensor in tensors:
            if tensor.numel() != num_channels:
                raise ScheduleError(
                    f"tensors: those of {site!r} have {tensor.numel()} channels, it has {num_channels}."
                )
        fill = fill.map(lambda t: t.reshape((1, -1, 1, 1) if is_image else (1, 1, -1)).to(value))
        self.fills[site, step, sources] = fill
        return fill

    def stats(self) -> dict[str, Any]:
        schedule, batch = self.schedule, self.schedule.batch_size
        unet, *controlnets = self.models.values()
        architecture = replace(Architecture.of(self.pipe), unet=unet, controlnet=controlnets)
        graph, costs = architecture.measure((schedule.height, schedule.width))
        plan = compile_plan(graph, schedule.sites, schedule.num_inference_steps)
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


def _is_close(actual: float, expected: float) -> bool:
    return abs(actual - expected) <= 1e-3 * max(1.0, abs(expected))


def _brief(timesteps: Any) -> str:
    return ", ".join(f"{t:g}" for t in timesteps[:3]) + f", ... {timesteps[-1]:g}"
