"""Runs a schedule inside a diffusers pipeline: `apply_schedule(pipe, schedule)`, then `pipe(...)` as always.

The forward of the UNet and of each ControlNet is replaced by one that walks the schedule's plan: the live nodes
run through the models' own submodules, reused sites are read from the cache, all else is skipped (`runtime`). Nothing
is read back from the device in mid-run. Needs torch, diffusers, safetensors and networkx only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hgc_learn.models.fingerprint import ModelFingerprint
from hgc_learn.models.graph import build_graph
from hgc_learn.plan import Plan
from hgc_learn.runtime.forwards import RoutedForwards, routed_models
from hgc_learn.runtime.runtime import Runtime, RuntimeOptions
from hgc_learn.schedule import HGCSchedule
from hgc_learn.sites import to_lay_open
from hgc_learn.strict import ScheduleError

__all__ = ["HGCSchedule", "ScheduleError", "ScheduleHandle", "apply_exact_savings", "apply_schedule", "remove_schedule"]


def apply_schedule(
    pipe: Any,
    schedule: HGCSchedule | str | os.PathLike[str],
    *,
    allow_other_weights: bool = False,
    resample: bool = False,
    exact_savings: bool = True,
    max_steps_at_once: int = 4,
) -> ScheduleHandle:
    """Makes every later call of `pipe` follow `schedule`, until `remove_schedule(pipe)`.

    Args:
        pipe: a diffusers pipeline with a `unet`, a `scheduler` and optionally a `controlnet`.
        schedule: a schedule, its file, or a folder or hub id (owner/name) that holds one. One that is already applied
            is replaced.
        allow_other_weights: accept models of the same architecture with other weights. The schedule then runs,
            but the quality it was measured with is not promised.
        resample: run with any number of steps, any timesteps and other settings of the scheduler: each step does, with
            a warning, what the schedule does at the nearest timestep. Without it such runs are refused.
        exact_savings: compute once per run what does not change in it (the ControlNet's condition embedding, keys and
            values of the prompt), and no ControlNet whose scale is 0. Nothing is kept so under `torch.inference_mode`
            or with gradients; diffusers' pipelines themselves run under `torch.no_grad`.
        max_steps_at_once: how many steps that do not depend on each other's latents may run as one batch; it takes
            the memory of so many decoders. 1 switches that off.

    Returns:
        A handle with `stats()` and `remove()`; as a context manager it removes the schedule on leaving.

    Raises:
        ScheduleError: the file is invalid, or made for another model; the message says which. Another scheduler,
            other settings of it or other timesteps are noticed, and raise it, when the pipeline runs.
        ValueError: the pipeline has no UNet, models whose dataflow is not known or whose forwards are wrapped, or a
            ControlNet that another pipeline has a schedule for.
    """
    if not hasattr(pipe, "unet"):
        raise ValueError(f"{type(pipe).__name__} has no unet; schedules support diffusers pipelines with a UNet.")
    if not isinstance(schedule, HGCSchedule):
        schedule = HGCSchedule.from_pretrained(schedule)
    unet, *controlnets = routed_models(pipe).values()
    graph = build_graph(unet, controlnets, to_lay_open(schedule.sites))  # refuses unknown models by name
    _check_model(schedule, unet, controlnets, allow_other_weights)
    if schedule.guided_sites and not hasattr(type(pipe), "do_classifier_free_guidance"):
        raise ScheduleError(
            f"sites: {schedule.guided_sites[0]!r} is about the two halves of a guided batch, and a "
            f"{type(pipe).__name__} does not tell whether it has them. Use a schedule without such sites."
        )
    options = RuntimeOptions(resample, exact_savings, max_steps_at_once)
    try:
        runtime = Runtime(pipe, schedule, graph, options)
    except ValueError as error:
        raise ScheduleError(f"sites: {error}") from None
    _replace(runtime)
    return ScheduleHandle(pipe, runtime)


def apply_exact_savings(pipe: Any) -> ScheduleHandle:
    """Makes every later call of `pipe` compute once what does not change in it, and skip ControlNets while their scale
    is 0: the same pictures for less, with any sampler and number of steps. Under `torch.inference_mode`, and with
    gradients, only the ControlNets are skipped. `remove_schedule(pipe)` undoes it.

    Raises:
        ValueError: as of `apply_schedule`.
    """
    if not hasattr(pipe, "unet"):
        raise ValueError(f"{type(pipe).__name__} has no unet; diffusers pipelines with a UNet are supported.")
    unet, *controlnets = routed_models(pipe).values()
    runtime = Runtime(pipe, None, build_graph(unet, controlnets, ()), RuntimeOptions())
    _replace(runtime)
    return ScheduleHandle(pipe, runtime)


def remove_schedule(pipe: Any) -> None:
    """Gives the pipeline's models their own forwards back, also where a schedule was applied to another pipeline that
    has one of them. Does nothing if no schedule is applied.

    Raises:
        ValueError: others have wrapped the forwards since, and must be undone first.
    """
    for model in routed_models(pipe).values() if hasattr(pipe, "unet") else ():
        runtime = None if model is None else RoutedForwards.installed_on(model)  # a UNet may be gone, for memory
        if runtime is not None:
            runtime.uninstall()


def _replace(runtime: Runtime) -> None:
    """Puts it in the place of one that has the UNet; raises ValueError where others have a ControlNet of it."""
    before = RoutedForwards.installed_on(runtime.models["unet"])
    runtime.check_models(before)
    if before is not None:
        before.uninstall()
    runtime.install()


class ScheduleHandle:
    """What `apply_schedule` returns. `runtime` is what runs in the place of the models' forwards."""

    def __init__(self, pipe: Any, runtime: Runtime):
        self.pipe = pipe
        self.runtime = runtime

    @property
    def schedule(self) -> HGCSchedule | None:
        """What is followed; of another number of steps if it is resampled, None if only what is exact is saved."""
        return self.runtime.schedule

    @property
    def plan(self) -> Plan:
        """What every step runs, loads and keeps."""
        return self.runtime.plan

    def stats(self) -> dict[str, Any]:
        """What the schedule saves by its plan, and what the latest run did.

        Keys: `num_steps`, model calls of a run; `macs_full`, `macs_cached`, `macs_reduction` per image at the
        schedule's size (attention matmuls not counted) and the same with `_attention`; `cache_bytes` at its peak, of
        one image, by the plan; `num_patterns`, of different steps (`compile`); `steps_run` and `steps_refreshed` of the
        latest run (a step is refreshed when its inputs changed in mid-run; so is the first one of image to image).

        Raises:
            ValueError: without a schedule, a UNet whose config has no `sample_size` to count at.
        """
        return self.runtime.stats()

    def use_tensors(self, tensors: Mapping[str, Tensor], *, gradient_checkpointing: bool = False) -> None:
        """Fills in with these numbers in the next run instead of the schedule's own: for those who learn them. Call it
        again after every update of theirs.

        Args:
            tensors: as `schedule.tensors`; gradients reach those of predictors that work per channel, in runs that keep
                the autograd graph.
            gradient_checkpointing: keep only what nodes give for the backward pass, and run each again in it.

        Raises:
            ValueError: other names than those of `schedule.tensors`.
        """
        self.runtime.use_tensors(tensors, gradient_checkpointing=gradient_checkpointing)

    def compile(self, **options: Any) -> None:
        """Compiles what the schedule runs: one graph per model for each different set of nodes that a step runs
        (`stats()["num_patterns"]` of them in the UNet at most; export with `--max_patterns` for few). Each is compiled
        when it is first met. Steps that are refreshed, and those that run as one batch, are not compiled.

        Args:
            options: of `torch.compile` (mode, fullgraph, dynamic, backend, ...).

        Raises:
            ValueError: options that record CUDA graphs (`mode="reduce-overhead"`, `mode="max-autotune"`,
                `backend="cudagraphs"`).
        """
        self.runtime.compile(**options)

    def remove(self) -> None:
        """As `remove_schedule(pipe)`; raises the same."""
        self.runtime.uninstall()

    def __enter__(self) -> ScheduleHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _check_model(schedule: HGCSchedule, unet: Any, controlnet: Any, allow_other_weights: bool) -> None:
    difference = schedule.model.difference(ModelFingerprint.of(unet, controlnet))
    if difference is None or (difference[0] == "weights" and allow_other_weights):
        return
    what, detail = difference
    way_out = "Use the model it was made for or train a schedule for this one."
    if what == "weights":
        way_out = "Pass allow_other_weights=True to run it all the same; its measured quality does not carry over."
    raise ScheduleError(f"model: the schedule was made for another model ({what}: {detail}). {way_out}")
