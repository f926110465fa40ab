"""One schedule on one pipeline: runs the nodes of its plan, keeps and loads what it reuses."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from diffusers.models import attention_processor
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import Tensor

from hgc_learn.models import ops
from hgc_learn.models.architectures import Architecture
from hgc_learn.models.graph import Graph, original
from hgc_learn.plan import Load, StepPlan, compile_plan
from hgc_learn.runtime.ahead import find_batches, stack_call, stack_steps, unstack_steps
from hgc_learn.runtime.cache import Cache
from hgc_learn.runtime.compiled import CompiledPrograms, check_options
from hgc_learn.runtime.forwards import RoutedForwards, routed_models
from hgc_learn.runtime.once import Once
from hgc_learn.runtime.program import Program, compile_program, run_program
from hgc_learn.runtime.unchanged import state
from hgc_learn.schedule import HGCSchedule
from hgc_learn.scheduler_config import how_to_set, other_setting
from hgc_learn.strict import ScheduleError
from hgc_learn.timesteps import steps_for_calls


@dataclass(frozen=True)
class RuntimeOptions:
    """How a schedule is run; what it gives is the same but for rounding.

    Attributes:
        resample: accept runs with other timesteps or settings of the scheduler.
        exact_savings: compute once per run what does not change in it, and no ControlNet whose scale is 0.
        max_steps_at_once: how many steps that do not depend on each other's latents may run as one batch.

    Raises:
        ValueError: `max_steps_at_once` is not a whole number of at least 1.
    """

    resample: bool = False
    exact_savings: bool = True
    max_steps_at_once: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.max_steps_at_once, int) or self.max_steps_at_once < 1:
            raise ValueError(f"max_steps_at_once is {self.max_steps_at_once!r}; it must be at least 1 (no batches).")


class Runtime(RoutedForwards):
    """Runs the models of a pipeline as a schedule says.

    Args:
        schedule: None computes everything, at any number of steps.
        graph: the models' dataflow, with every site of the schedule in it.
    """

    def __init__(self, pipe: Any, schedule: HGCSchedule | None, graph: Graph, options: RuntimeOptions):
        self.original, self.options = schedule, options
        self.compile_options: dict[str, Any] | None = None
        self.compiled: CompiledPrograms | None = None
        self.once = Once(routed_models(pipe).values()) if options.exact_savings else None
        self.cache = Cache({}, {})
        self.given_tensors: Mapping[str, Tensor] | None = None  # instead of the schedule's own
        self.gradient_checkpointing = False
        super().__init__(pipe, graph, 0 if schedule is None else schedule.num_steps)
        self.follow(schedule)

    def follow(self, schedule: HGCSchedule | None) -> None:
        graph, self.schedule = self.graph, schedule
        if schedule is not None:
            self.num_steps = schedule.num_steps
        self.rows = {} if schedule is None else schedule.sites
        self.plan = plan = compile_plan(graph, self.rows, self.num_steps)
        # A refresh computes everything and keeps whatever any later step may load.
        loaded = {name for step in plan.steps for name in step.loaded}
        everything = tuple(name for name in graph.nodes if name != graph.guidance or name in loaded)
        refresh = StepPlan(everything, (), store=tuple(name for name in everything if name in loaded))
        self.programs = {m: [compile_program(graph, step, m) for step in plan.steps] for m in self.models}
        self.refresh = {m: compile_program(graph, refresh, m) for m in self.models}
        self.batches = {
            first: (length, compile_program(graph, _of_batch(plan.steps[first : first + length]), "unet"))
            for first, length in find_batches(graph, plan, self.options.max_steps_at_once).items()
        }
        own = {} if schedule is None else schedule.tensors
        self.cache = Cache(self.rows, own if self.given_tensors is None else self.given_tensors)
        if self.compile_options is not None:
            self.compile(**self.compile_options)

    def compile(self, **options: Any) -> None:
        """Runs its programs by torch.compile from now on, but for refreshed steps and batches of steps.

        Raises:
            ValueError: options that record CUDA graphs.
        """
        check_options(options)
        programs = [
            (program, is_half)
            for of_model in self.programs.values()
            for program, step in zip(of_model, self.plan.steps, strict=True)
            for is_half in {step.is_half, False}  # where guidance is switched off there are no halves
        ]
        self.compile_options = options
        self.compiled = CompiledPrograms(programs, self.graph.guidance, options)

    def use_tensors(self, tensors: Mapping[str, Tensor], *, gradient_checkpointing: bool = False) -> None:
        """Fills in with these from now on. Raises ValueError if they are not for what the schedule fills in."""
        own = {} if self.original is None else self.original.tensors
        if wrong := sorted(tensors.keys() ^ own.keys()):
            raise ValueError(
                f"tensors: {wrong[0]!r} is {'missing' if wrong[0] in own else 'not one of the schedule'}; give as many "
                "as schedule.tensors has, by the same names."
            )
        self.given_tensors, self.gradient_checkpointing = tensors, gradient_checkpointing
        self.cache = Cache(self.rows, tensors)

    # A run

    def uninstall(self) -> None:
        super().uninstall()
        if self.once is not None:
            self.once.uninstall()

    def new_run(self) -> None:
        super().new_run()
        self.in_guess_mode = False
        self.end_run()

    def end_run(self) -> None:
        num_steps = self.last_step - self.first_step + 1
        num_changed = len(self.refreshed - {self.first_step})
        if self.original is not None and num_changed > max(2, num_steps / 2):
            warnings.warn(
                f"{num_changed} of this run's {num_steps} steps were computed in full, because what the models were "
                "called with had changed (prompt embeddings, control images, scales, ...): the schedule saved little. "
                "A callback or a hook that copies tensors at every step does that, too.",
                stacklevel=2,
            )
        self.ahead: dict[int, dict[str, Tensor]] = {}  # by step: what has been computed before its turn
        self.cache.clear()
        if self.once is not None:
            self.once.clear()

    def runs_half(self, step: int) -> bool:
        return self.plan.steps[step].is_half and step not in self.refreshed

    def check_run(self, timesteps: Tensor) -> None:
        """Compares the run with the schedule, once."""
        if self.once is not None:
            self.once.prepare()
        if self.original is None:
            if self.num_steps != len(timesteps):
                self.num_steps = len(timesteps)
                self.follow(None)
            return
        scheduler = type(self.pipe.scheduler).__name__
        expected, actual = self.original.timesteps, tuple(float(t) for t in timesteps.tolist())
        is_same = len(actual) == len(expected) and all(map(_is_close, actual, expected))
        if scheduler != self.original.scheduler:
            raise ScheduleError(
                f"scheduler: the schedule was made for {self.original.scheduler}, the pipeline has {scheduler}. "
                "Set pipe.scheduler accordingly or train a schedule for it."
            )
        if otherwise := other_setting(self.original.scheduler_config, self.pipe.scheduler):
            name, made_with, now = otherwise
            problem = f"scheduler_config: the schedule was made with {name}={made_with!r}, the pipeline has {now!r}"
            if not self.options.resample:
                advice = how_to_set(scheduler, name, made_with)
                raise ScheduleError(f"{problem}. {advice}, or apply_schedule(..., resample=True).")
            warnings.warn(f"{problem}: its measured quality does not carry over.", stacklevel=2)
        if is_same:
            if self.schedule is not self.original:
                self.follow(self.original)
        elif self.options.resample:
            if self.given_tensors is not None:
                raise ScheduleError(
                    f"timesteps: this run visits {_brief(actual)}, and the tensors that use_tensors was given are for "
                    f"{_brief(expected)}. Run the schedule's own timesteps, or apply it anew."
                )
            warnings.warn(
                f"timesteps: this run visits {len(actual)} ({_brief(actual)}), the schedule was made for "
                f"{len(expected)} ({_brief(expected)}). It is resampled: each step does what the schedule does at the "
                "nearest timestep; what was measured of it, quality and savings, does not carry over.",
                stacklevel=2,
            )
            if self.schedule is None or self.schedule.timesteps != actual:
                self.follow(self.original.resampled(actual))
        elif len(actual) != len(expected):
            num_steps = steps_for_calls(self.pipe.scheduler, len(expected))
            raise ScheduleError(
                f"num_inference_steps: the schedule has {len(expected)} steps, this run {len(actual)}. Call the "
                f"pipeline with num_inference_steps={num_steps or len(expected)}, or apply_schedule(..., "
                "resample=True)."
            )
        else:
            raise ScheduleError(
                f"timesteps: this run visits {_brief(actual)}, the schedule was made for {_brief(expected)}. Use the "
                "scheduler settings (timestep_spacing, ...) it was made with, or apply_schedule(..., resample=True)."
            )
        _compare_scale("guidance_scale", getattr(self.pipe, "_guidance_scale", None), self.original.guidance_scale)

    # A step

    def execute(self, model: str, step: int, call: ops.Call, given: dict[str, Tensor]) -> dict[str, Tensor]:
        is_refresh = step in self.refreshed
        if is_refresh and self.once is not None:
            self.once.clear()  # what it depends on may have changed
        program = self.refresh[model] if is_refresh else self.programs[model][step]
        if model != "unet":
            if self.original is not None:
                made_with = self.original.sampling.get("controlnet_conditioning_scale")
                _compare_scale("controlnet_conditioning_scale", call.conditioning_scale, made_with)
            self.in_guess_mode |= call.guess_mode
            if self.options.exact_savings and _is_off(call.conditioning_scale):
                values = self._zero_controls(model, program, call)
                self._free(program)
                return self._keep(model, step, program, values, is_refresh)
        elif step in self.ahead and not is_refresh:
            return self.ahead.pop(step)
        elif not is_refresh and step in self.batches and self._may_run_ahead(step, call, given):
            return self._execute_ahead(step, *self.batches[step], call, given)
        values = given
        self._load(values, program.load, step, call)
        self._free(program)
        guidance = self.graph.guidance
        if self.compiled is not None and not is_refresh and not self.gradient_checkpointing:
            self.compiled.run(program, call, values)
            if call.has_halves and any(op.name == guidance for op in program.ops):
                values[guidance] = ops.guidance(call, values[self.graph.output])
        else:
            self._run(program, call, values)
        return self._keep(model, step, program, values, is_refresh)

    def _run(self, program: Program, call: ops.Call, values: dict[str, Tensor]) -> None:
        # Where guidance has been switched off there is no difference to compute.
        skip = None if call.has_halves else self.graph.guidance
        run_program(program, call, values, skip, checkpointed=self.gradient_checkpointing)

    def _load(self, values: dict[str, Tensor], loads: Iterable[Load], step: int, call: ops.Call) -> None:
        """Adds to `values` what is filled in at a step."""
        num_guided = len(call.sample) // call.num_halves
        for load in loads:
            if call.has_halves:
                values[load.site] = self.cache.load_halves(load, step, num_guided, call.is_half)
            elif load.site != self.graph.guidance:
                values[load.site] = self.cache.load(load, step)

    def _free(self, program: Program) -> None:
        """What has been loaded for the last time: before the rest of the step needs memory."""
        for key in program.free:
            self.cache.drop(key)

    def _keep(
        self, model: str, step: int, program: Program, values: dict[str, Tensor], is_refresh: bool
    ) -> dict[str, Tensor]:
        if is_refresh:
            self._keep_for_all(model, step, values)
        else:
            for name in program.store:
                if name in values:
                    self.cache.keep(name, step, values[name])
        return values

    def _keep_for_all(self, model: str, step: int, values: dict[str, Tensor]) -> None:
        """After a refresh the fresh value stands for every older one that a later step would load."""
        for site, i in list(self.cache.values):
            if self.graph.nodes[site].model == model:
                self.cache.drop((site, i))
        later = {key for plan in self.plan.steps[step + 1 :] for load in plan.load for key in load.keys}
        for site, i in later:
            if i <= step and site in values and self.graph.nodes[site].model == model:
                self.cache.keep(site, i, values[site])
        self.ahead.clear()

    def _zero_controls(self, model: str, program: Program, call: ops.Call) -> dict[str, Tensor]:
        """What a ControlNet gives whose scale is 0: those residuals that are read."""
        shapes = ops.control_shapes(self.models[model], call.sample)
        read = {op.name for op in program.ops} | {load.site for load in program.load}
        return {
            name: call.sample.new_zeros(shape)
            for name, shape in zip(self.residuals[model], shapes, strict=True)
            if name in read
        }

    def _may_run_ahead(self, step: int, call: ops.Call, given: dict[str, Tensor]) -> bool:
        """Whether the steps of a batch are part of this run, and nothing tells them apart from samples."""
        num_steps, _ = self.batches[step]
        is_part = step + num_steps - 1 <= self.last_step
        # Others may look across the batch, from one frame of a video to the next.
        are_known = all(type(m.processor).__module__ == attention_processor.__name__ for m in self.settings.attentions)
        is_told = not self.in_guess_mode and not call.cross_attention_kwargs and self._are_as_handed_on(given)
        return is_part and are_known and is_told

    def _are_as_handed_on(self, given: dict[str, Tensor]) -> bool:
        """Whether the UNet was given what the ControlNets gave. Later steps of a batch take that from the cache, where
        what hooks and the like do to it on its way is not."""
        if len(self.models) < 3:
            residuals = [given[name] for name in self.graph.residuals]
            pairs = zip(residuals, self.handed_on, strict=True)
            return all(ours is theirs and state(ours) == before for ours, (theirs, before) in pairs)
        # Sums of several are other tensors, and comparing values would wait for the device.
        multi = original(self.pipe.controlnet)
        giving = [multi, *(net for model, net in self.models.items() if model != "unet")]
        are_hooked = any(module._forward_hooks for module in giving) or self.models["unet"]._forward_pre_hooks
        return type(multi) is MultiControlNetModel and not are_hooked

    def _execute_ahead(
        self, first: int, num_steps: int, program: Program, call: ops.Call, given: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Runs the UNet for `num_steps` steps from `first` on at once. They load what is kept already, from the
        ControlNets too."""
        graph, num_halves = self.graph, call.num_halves
        steps = range(first, first + num_steps)
        by_step = [given]
        for step in steps:
            values = by_step[step - first] if step == first else {}
            # The ControlNets' own forwards have loaded their residuals for the first step, and freed them.
            loads = self.programs["unet"][step].load if step == first else self.plan.steps[step].load
            self._load(values, loads, step, call)
            if step > first:
                for name in self.plan.steps[step].run:
                    if name in graph.residuals:
                        residual = ops.add_all(call, *[values[control] for control in graph.nodes[name].inputs])
                        values[name] = residual.to(given[name])  # which offloading may have moved
                by_step.append(values)
            self._free(self.programs["unet"][step])
        read = {name for op in program.ops for name in op.inputs}
        stacked = {
            name: stack_steps([values[name] for values in by_step], num_halves) for name in by_step[0] if name in read
        }
        timesteps = self.pipe.scheduler.timesteps[first : first + num_steps]
        with nullcontext() if self.once is None else self.once.without_keeping():  # no step after them has their prompt
            self._run(program, stack_call(call, timesteps, num_halves), stacked)
        results = {
            name: unstack_steps(stacked[name], 1 if name == graph.guidance else num_halves, num_steps)
            for name in program.results
            if name in stacked
        }
        for step in steps:
            values = {name: result[step - first] for name, result in results.items()}
            if call.is_half:
                values[graph.guidance] = by_step[step - first][graph.guidance]
            self.ahead[step] = self._keep("unet", step, self.programs["unet"][step], values, False)
        return self.ahead.pop(first)

    def stats(self) -> dict[str, Any]:
        schedule = self.schedule
        architecture = Architecture.of(self.pipe)
        size = architecture.default_size if schedule is None else (schedule.height, schedule.width)
        graph, costs = architecture.measure(size)
        num_halves = graph.num_halves(7.5 if schedule is None else schedule.guidance_scale)
        plan = compile_plan(graph, self.rows, self.num_steps)
        full = compile_plan(graph, {}, self.num_steps)
        macs = plan.macs_beside(full, costs, num_halves=num_halves)
        result: dict[str, Any] = {"num_steps": self.num_steps}
        result |= {f"macs_{name}": count for name, count in macs.items()}
        for suffix in ("", "_attention"):
            whole = macs[f"full{suffix}"]  # 0 before any run
            result[f"macs_reduction{suffix}"] = 1 - macs[f"cached{suffix}"] / whole if whole else 0.0
        result["num_patterns"] = plan.num_patterns()
        result["cache_bytes"] = plan.cache_bytes(costs, num_halves=num_halves, itemsize=self.pipe.unet.dtype.itemsize)
        result["steps_run"] = self.num_calls["unet"]
        result["steps_refreshed"] = len(self.refreshed)
        return result


def _of_batch(steps: Sequence[StepPlan]) -> StepPlan:
    """Of steps that run the same: what any of them keeps is kept."""
    kept = {name for step in steps for name in step.store}
    return replace(steps[0], store=tuple(name for name in steps[0].run if name in kept))


def _compare_scale(name: str, scale: Any, made_with: Any) -> None:
    numbers = isinstance(scale, int | float) and isinstance(made_with, int | float)
    if numbers and abs(scale - made_with) > 1e-6:
        warnings.warn(
            f"{name} is {scale}, the schedule was made for {made_with}: its measured quality does not carry over.",
            stacklevel=3,
        )


def _is_off(conditioning_scale: Any) -> bool:
    """A tensor is not looked at: nothing is read from the device."""
    return isinstance(conditioning_scale, int | float) and conditioning_scale == 0


def _is_close(actual: float, expected: float) -> bool:
    return abs(actual - expected) <= 1e-3 * max(1.0, abs(expected))


def _brief(timesteps: Any) -> str:
    return ", ".join(f"{t:g}" for t in timesteps[:3]) + f", ... {timesteps[-1]:g}"
