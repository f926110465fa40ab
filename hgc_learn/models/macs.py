"""Counts multiply-accumulates (MACs) and tensor sizes per node, on meta tensors: no weights, no arithmetic.

Two conventions: with and without the attention matmuls (QK^T and AV). The caching papers mostly leave them out;
wall-clock follows the count that has them in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hgc_learn.models import ops
from hgc_learn.models.graph import Graph, architecture_key, build_graph, meta_copy, named_models

# Linear layers reach the counter as mm/addmm, attention as batched products or fused attention.
_ATTENTION_OPS = ("bmm", "baddbmm", "_scaled_dot_product", "_efficient_attention", "_flash_attention")


class BudgetError(ValueError):
    """A budget, the fraction of the full MACs to keep, that cannot be met. Says what can."""


@dataclass(frozen=True)
class NodeCost:
    """MACs, output elements and channels of one node for one sample (half of a guided pair)."""

    macs: int
    attention_macs: int
    numel: int
    channels: int

    def total(self, attention: bool) -> int:
        return self.macs + self.attention_macs if attention else self.macs


def flop_counter() -> FlopCounterMode:
    """Torch's counter, which by itself does not know the fused attention of the CPU."""

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    on_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=on_cpu)


def split_macs(counter: FlopCounterMode) -> tuple[int, int]:
    """(MACs without attention matmuls, MACs of the attention matmuls) that a counter has seen at batch size 1 (linear
    layers on larger batches may reach it as batched products too)."""
    macs = attention = 0
    for op, flops in counter.get_flop_counts().get("Global", {}).items():
        if any(name in str(op) for name in _ATTENTION_OPS):
            attention += flops // 2
        else:
            macs += flops // 2
    return macs, attention


def channels(value: Tensor) -> int:
    """The second axis of images, the last of tokens."""
    return value.shape[1] if value.ndim == 4 else value.shape[-1]


_measured: dict[Any, tuple[Graph, dict[str, NodeCost]]] = {}  # it takes longer than a small pipeline's run
_MAX_MEASURED = 16


def measure_costs(
    unet: UNet2DConditionModel,
    controlnet: Any = None,
    *,
    latent_size: tuple[int, int],
    image_size: tuple[int, int],
    num_tokens: int = 77,
) -> tuple[Graph, dict[str, NodeCost]]:
    """Runs the fully expanded graph of the models' architecture on meta tensors, one node at a time. What it gives for
    an architecture at a size is kept, and shared by all who ask for it again: it is not to be changed.

    Args:
        unet, controlnet: the models, or models of the same architecture on any device; their weights are not read.
        latent_size, image_size: (height, width) of the latents and of the control image, in pixels.
        num_tokens: length of the prompt embeddings (77 for CLIP).

    Returns:
        The expanded graph of meta copies of the models, and the cost of each of its nodes per sample.
    """
    models = [*named_models(unet, controlnet).values()]
    key = (*map(architecture_key, models), latent_size, image_size, num_tokens)
    if key not in _measured:
        while len(_measured) >= _MAX_MEASURED:
            del _measured[next(iter(_measured))]
        copies = [meta_copy(model) for model in models]
        _measured[key] = _measure(copies[0], copies[1:], latent_size, image_size, num_tokens)
    return _measured[key]


def _measure(
    unet: UNet2DConditionModel,
    nets: Sequence[ControlNetModel],
    latent_size: tuple[int, int],
    image_size: tuple[int, int],
    num_tokens: int,
) -> tuple[Graph, dict[str, NodeCost]]:
    graph = build_graph(unet, nets)
    calls = meta_calls(unet, nets, latent_size=latent_size, image_size=image_size, num_tokens=num_tokens)
    costs: dict[str, NodeCost] = {}
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for node in graph.nodes.values():
            with flop_counter() as counter:
                value = node.run(calls[node.model], *(values[name] for name in node.inputs))
            values[node.name] = value
            costs[node.name] = NodeCost(*split_macs(counter), value.numel(), channels(value))
    # One difference per guided pair, and the tensors above are those of one sample.
    costs[graph.guidance] = NodeCost(0, 0, values[graph.output].numel() // 2, channels(values[graph.output]))
    return graph, costs


def meta_calls(
    unet: UNet2DConditionModel,
    nets: Sequence[ControlNetModel],
    *,
    latent_size: tuple[int, int],
    image_size: tuple[int, int],
    num_tokens: int,
) -> dict[str, ops.Call]:
    """Batch-1 arguments on the meta device for the UNet and every ControlNet."""
    with torch.device("meta"):
        dim = unet.config.cross_attention_dim
        dim = unet.config.encoder_hid_dim or (dim if isinstance(dim, int) else dim[0])
        sample = torch.empty(1, unet.config.in_channels, *latent_size)
        prompt = torch.empty(1, num_tokens, dim)
        timestep = torch.empty(1)
        kwargs: dict[str, Any] = {}
        if unet.config.addition_embed_type == "text_time":
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            kwargs["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        labels = _class_labels(unet.config)
        calls = {"unet": ops.unet_call(unet, sample, timestep, prompt, class_labels=labels, **dict(kwargs))}
        for name, net in [*named_models(unet, nets).items()][1:]:
            cond = torch.empty(1, net.config.conditioning_channels, *image_size)
            control_sample = torch.empty(1, net.config.in_channels, *latent_size)
            labels = _class_labels(net.config)
            calls[name] = ops.controlnet_call(
                net, control_sample, timestep, prompt, cond, class_labels=labels, **dict(kwargs)
            )
    return calls


def _class_labels(config: Any) -> Tensor | None:
    """As a model takes them for one sample: a class, a time, or an embedding."""
    if config.class_embed_type is None:
        return None if config.num_class_embeds is None else torch.zeros(1, dtype=torch.long)
    if config.class_embed_type == "timestep":
        return torch.empty(1)
    if config.class_embed_type == "identity":
        return torch.empty(1, config.get("time_embedding_dim") or 4 * config.block_out_channels[0])
    return torch.empty(1, config.projection_class_embeddings_input_dim)
