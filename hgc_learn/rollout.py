"""Trajectories of the frozen pipeline: the teacher's, and the student's own with its own cache.

The student runs the very pipeline that inference runs, with gates at the sites: the forward is hard (compute or
reuse, nothing in between), the backward gives, per sample, the derivative of the result by every gate.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoPipelineForText2Image, ControlNetModel, DiffusionPipeline
from torch import Tensor

from hgc_learn import ops
from hgc_learn.forwards import RoutedForwards
from hgc_learn.graph import Graph
from hgc_learn.plan import live_step


@dataclass
class SamplingConfig:
    """How pictures are made; a schedule is valid for exactly this.

    Args:
        num_inference_steps: number of denoising steps.
        guidance_scale: classifier-free guidance scale; 1 or less means none.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        negative_prompt: prompt of the unguided half.
        controlnet_conditioning_scale: weight of the ControlNet.
        scheduler: class name of a diffusers scheduler; the model's own if not given.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    height: int = 512
    width: int = 512
    negative_prompt: str = ""
    controlnet_conditioning_scale: float = 1.0
    scheduler: str | None = None


def load_pipeline(
    model: str, sampling: SamplingConfig, *, controlnet: str | None = None, dtype: str = "float32"
) -> Any:
    """Loads a diffusers pipeline, frozen, with the sampler of `sampling`.

    Args:
        model: folder or hub id of a pipeline; with a ControlNet in it unless `controlnet` names one.
        sampling: its `scheduler` replaces the pipeline's.
        controlnet: folder or hub id of a ControlNet to add.
        dtype: of all models: `float32`, `float16` or `bfloat16`.

    Raises:
        ValueError: a folder that does not exist, an unknown dtype or scheduler.
    """
    for name, source in (("model", model), ("controlnet", controlnet)):
        if source is not None and not Path(source).is_dir() and source.count("/") != 1:
            raise ValueError(f"{name}: {source!r} is neither a folder here nor a hub id (owner/name).")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is not one of float32, float16, bfloat16.")
    torch_dtype = getattr(torch, dtype)
    if controlnet is None:
        pipe = DiffusionPipeline.from_pretrained(model, dtype=torch_dtype)
    else:
        net = ControlNetModel.from_pretrained(controlnet, dtype=torch_dtype)
        pipe = AutoPipelineForText2Image.from_pretrained(model, controlnet=net, dtype=torch_dtype)
    if sampling.scheduler is not None:
        scheduler = getattr(diffusers, sampling.scheduler, None)
        if scheduler is None or not hasattr(scheduler, "from_config"):
            raise ValueError(f"diffusers has no scheduler named {sampling.scheduler!r}.")
        config = dict(pipe.scheduler.config)
        if "clip_sample" in inspect.signature(scheduler.__init__).parameters:
            # On by default, for pixels in [-1, 1]; it ruins latents. Most models' configs say so, not all.
            config.setdefault("clip_sample", False)
        pipe.scheduler = scheduler.from_config(config)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any, sampling: SamplingConfig, batch: dict[str, Any], *, output_type: str = "latent", grad: bool = False
) -> Tensor:
    """Runs the pipeline on a batch, seeded per sample.

    Args:
        batch: `text` (list of B prompts), `conditioning_image` [B, 3, height, width] in [0, 1], `seed` (B integers).
        output_type: `latent`, or `pt` for pictures in [0, 1].
        grad: keep the autograd graph (the pipeline's own call switches gradients off).

    Returns:
        Latents [B, channels, h, w] or pictures [B, 3, height, width].

    Raises:
        ValueError: control images of another size than `sampling` says.
    """
    size = tuple(batch["conditioning_image"].shape[-2:])
    if size != (sampling.height, sampling.width):
        raise ValueError(
            f"conditioning_image is {size[0]}x{size[1]}, the sampling config says {sampling.height}x{sampling.width}: "
            "give the data module the same height and width."
        )
    generators = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
    call = type(pipe).__call__
    call = inspect.unwrap(call) if grad else call
    kwargs: dict[str, Any] = {}
    if getattr(pipe, "controlnet", None) is not None:
        kwargs["image"] = batch["conditioning_image"]
        kwargs["controlnet_conditioning_scale"] = sampling.controlnet_conditioning_scale
    prompts = list(batch["text"])
    return call(
        pipe,
        prompt=prompts,
        negative_prompt=[sampling.negative_prompt] * len(prompts),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        height=sampling.height,
        width=sampling.width,
        generator=generators,
        output_type=output_type,
        return_dict=False,
        **kwargs,
    )[0]


class GatedForwards(RoutedForwards):
    """Runs the models with a gate at every routed site.

    Besides what the hard schedule runs, it computes the fresh value of every site that is loaded (without a
    gradient of its own), so that the derivative by the gate of a reused site is known too.
    """

    def __init__(self, pipe: Any, graph: Graph, sites: Sequence[str], num_steps: int):
        super().__init__(pipe, graph, num_steps)
        self.columns = {name: s for s, name in enumerate(sites)}
        self.order = {model: [n for n in graph.nodes.values() if n.model == model] for model in self.models}
        self.given = set(graph.residuals)
        self.gates: Tensor | None = None
        self.set_schedule(torch.ones(num_steps, len(sites), dtype=torch.bool))

    def set_schedule(self, compute: Tensor, gates: Tensor | None = None) -> None:
        """Sets what the next runs do.

        Args:
            compute: hard decisions [steps, sites], bool. The first step computes whatever they say.
            gates: leaf [batch, steps, sites] that receives the derivatives; None runs without.
        """
        names = list(self.columns)
        self.gates = gates
        self.reused = [
            {name for name, c in zip(names, row, strict=True) if not c} if i else set()
            for i, row in enumerate(compute.tolist())
        ]
        plans = [live_step(self.graph, reused) for reused in self.reused]
        self.run = [set(plan.run) for plan in plans]
        self.load = [set(plan.load) for plan in plans]
        self.is_half = [plan.is_half for plan in plans]
        self.probe = [self._probe(i) if gates is not None else set() for i in range(self.num_steps)]

    def _probe(self, step: int) -> set[str]:
        """Nodes that run only to know the fresh values of the sites loaded at this step."""
        wanted, nodes = set(self.load[step]), self.graph.nodes
        needed = {i for name in wanted for i in nodes[name].inputs}
        for name in reversed(nodes):
            if name in needed and name not in self.reused[step]:
                wanted.add(name)
                needed.update(nodes[name].inputs)
        return wanted - self.run[step]

    def runs_half(self, step: int) -> bool:
        # With gates, the unguided half runs all the same: to know the fresh guidance difference.
        return self.is_half[step] and self.gates is None

    def execute(self, model: str, step: int, call: ops.Call, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if step in self.refreshed:
            raise RuntimeError(f"Inputs changed at step {step}; training needs them constant over a run.")
        run, load, probe = self.run[step], self.load[step], self.probe[step]
        values, batch_size = given, len(call.sample)
        for node in self.order[model]:
            name = node.name
            if name in self.given or name == self.graph.guidance:
                continue
            if name in run:
                fresh = node.run(call, *[self._read(values, i, step, batch_size) for i in node.inputs])
                if name not in self.columns:
                    values[name] = fresh
                    continue
                values[name] = self._gate(name, step, fresh, compute=True)
                self._keep(name, step, values[name])
            elif name in probe:
                with torch.no_grad():
                    fresh = node.run(call, *[self._read(values, i, step, batch_size) for i in node.inputs])
                values[name] = fresh
                if name in load:
                    # Kept on, for the gate decides what later steps find in the cache, too.
                    values[name] = self.cache[name] = self._gate(name, step, fresh, compute=False)
            elif name in load:
                values[name] = self.cache[name][-batch_size:]
        for name in self.residuals.get(model, ()):  # a fresh value in the UNet may read one that is not live
            if name not in values and name in self.cache:
                values[name] = self.cache[name][-batch_size:]
        if model == "unet" and self.graph.guidance in self.columns:
            self._guide(values, step)
        return values

    def _read(self, values: dict[str, Tensor], name: str, step: int, batch_size: int) -> Tensor:
        return values[name] if name in values else self.cache[name][-batch_size:]

    def _keep(self, name: str, step: int, value: Tensor) -> None:
        """Of a step that counts for the guided half only, the unguided half stays what it was."""
        if self.is_half[step]:
            old = self.cache[name]
            num_guided = len(old) // 2
            value = torch.cat([old[:num_guided], value[-num_guided:]])
        self.cache[name] = value

    def _guide(self, values: dict[str, Tensor], step: int) -> None:
        """The gate of the guidance difference, where it is one of the sites."""
        guidance, prediction = self.graph.guidance, values[self.graph.output]
        if self.runs_half(step):
            values[guidance] = self.cache[guidance]
            return
        unguided, guided = prediction.tensor_split(2)
        is_half = self.is_half[step]
        used = self._gate(guidance, step, guided - unguided, compute=not is_half)
        if is_half:
            self.cache[guidance] = used
            values[self.graph.output] = torch.cat([guided - used, guided])
            return
        if self.graph.output in self.run[step]:
            self.cache[guidance] = used
        if self.gates is not None:
            unguided = _Unguided.apply(unguided, guided, used)
            values[self.graph.output] = torch.cat([unguided, guided])

    def _gate(self, name: str, step: int, fresh: Tensor, *, compute: bool) -> Tensor:
        cached = self.cache.get(name)
        if cached is None:
            return fresh
        if self.gates is None:
            return fresh if compute else cached
        gate = self.gates[:, step, self.columns[name]]
        if not self.is_half[step] or name == self.graph.guidance:
            return _HardGate.apply(fresh, cached, gate, compute)
        num_guided = len(fresh) // 2  # what the gate decides concerns the guided half
        unguided = (fresh if compute else cached)[:num_guided]
        return torch.cat([unguided, _HardGate.apply(fresh[num_guided:], cached[num_guided:], gate, compute)])


class _Unguided(torch.autograd.Function):
    """guided - difference, where the difference is guided - unguided: the unguided prediction itself, to the bit, with
    the derivative by the difference."""

    @staticmethod
    def forward(ctx: Any, unguided: Tensor, guided: Tensor, difference: Tensor) -> Tensor:
        return unguided.view_as(unguided)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, grad, -grad


class _HardGate(torch.autograd.Function):
    """gate * fresh + (1 - gate) * cached for a gate of exactly 0 or 1, per sample.

    The derivative by the gate is <grad, fresh - cached>, summed over a sample's halves (guided and unguided).
    """

    @staticmethod
    def forward(ctx: Any, fresh: Tensor, cached: Tensor, gate: Tensor, compute: bool) -> Tensor:
        ctx.save_for_backward(fresh, cached)
        ctx.compute, ctx.batch_size = compute, gate.shape[0]
        value = fresh if compute else cached
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
        fresh, cached = ctx.saved_tensors
        by_sample = (grad * (fresh - cached)).flatten(1).sum(1)  # [halves * batch], halves outermost
        by_gate = by_sample.reshape(-1, ctx.batch_size).sum(0)
        return (grad, None, by_gate, None) if ctx.compute else (None, grad, by_gate, None)
