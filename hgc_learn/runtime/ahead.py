"""Steps that do not depend on each other's latents, as one batch.

A step that reuses everything made of the latents needs nothing but its timestep: consecutive ones can run at once
(Faster-Diffusion, Li et al. 2023, arXiv 2312.09608, section 3.3, does so with its decoder).

Shape legend: H halves of the batch (2 where it holds an unguided and a guided one), K steps, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hgc_learn.models import ops
from hgc_learn.models.graph import Graph
from hgc_learn.plan import Plan


def find_batches(graph: Graph, plan: Plan, most: int) -> dict[int, int]:
    """Number of consecutive steps, at most `most`, that can run at once, by the first of them."""
    batches: dict[int, int] = {}
    step, num_steps = 1, len(plan.steps)
    while step < num_steps:
        length = 1
        if _is_independent(graph, plan, step, step):
            while (
                length < most
                and step + length < num_steps
                and plan.steps[step + length].run == plan.steps[step].run
                and plan.steps[step + length].is_half == plan.steps[step].is_half
                and _is_independent(graph, plan, step + length, step)
            ):
                length += 1
        if length > 1:
            batches[step] = length
        step += length
    return batches


def _is_independent(graph: Graph, plan: Plan, step: int, first: int) -> bool:
    """Whether it reads neither latents nor what is kept at `first` or later, and runs something, in the UNet only."""
    plan_of_step = plan.steps[step]
    nodes = [graph.nodes[name] for name in plan_of_step.run if name not in graph.residuals]
    return (
        bool(nodes)
        and all(node.model == "unet" and not node.reads_latents for node in nodes)
        and all(source < first for load in plan_of_step.load for source in load.guided + load.unguided)
    )


def stack_steps(values: Sequence[Tensor], num_halves: int) -> Tensor:
    """K tensors [H * B, ...] as one, [H * K * B, ...]."""
    parts = [value.unflatten(0, (num_halves, -1)) for value in values]
    return torch.stack(parts, dim=1).flatten(0, 2)


def unstack_steps(value: Tensor, num_halves: int, num_steps: int) -> list[Tensor]:
    """The reverse."""
    return [part.flatten(0, 1) for part in value.unflatten(0, (num_halves, num_steps, -1)).unbind(1)]


def stack_call(call: ops.Call, timesteps: Tensor, num_halves: int) -> ops.Call:
    """The call of one step for K steps at once.

    Args:
        timesteps: [K].
    """
    num_steps, num_samples = len(timesteps), len(call.sample) // num_halves

    def repeated(value: Tensor) -> Tensor:
        return stack_steps([value] * num_steps, num_halves)

    return replace(
        call,
        sample=repeated(call.sample),
        timestep=timesteps[None, :, None].expand(num_halves, num_steps, num_samples).flatten().to(call.sample.device),
        **{
            name: ops.map_tensors(getattr(call, name), repeated)
            for name in (
                "encoder_hidden_states",
                "prompt_embeds",
                "class_labels",
                "timestep_cond",
                "attention_mask",
                "encoder_attention_mask",
                "added_cond_kwargs",
            )
        },
    )
