"""What the nodes of a graph compute: one flat function per operation of the frozen models.

Each follows the forward of the diffusers 0.42 class it is named after, to the bit, split where a site may cut
it. All take the node's `Call` and the tensors the node reads. Shapes: images are [batch, channels, height,
width], tokens [batch, height * width, channels].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, _chunked_feed_forward
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor, nn


@dataclass
class Call:
    """The arguments of one forward of the UNet or of a ControlNet, as its nodes need them.

    `encoder_hidden_states` and the masks are in the form that the attention layers take (see `unet_call` and
    `controlnet_call`); `prompt_embeds` is what the model was given. `sizes[level]` is (height, width) of the
    latents after `level` downsamplings. `has_halves`: both of guidance are asked for; `is_half`: only the guided one is
    run.
    """

    sample: Tensor
    timestep: Tensor | float | int
    encoder_hidden_states: Any
    prompt_embeds: Tensor
    class_labels: Tensor | None = None
    timestep_cond: Tensor | None = None
    attention_mask: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    cross_attention_kwargs: dict[str, Any] | None = None
    added_cond_kwargs: dict[str, Any] | None = None
    controlnet_cond: Tensor | None = None
    conditioning_scale: float = 1.0
    guess_mode: bool = False
    has_halves: bool = False
    is_half: bool = False
    sizes: list[tuple[int, int]] = field(default_factory=list)
    forward_upsample_size: bool = False

    @property
    def num_halves(self) -> int:
        return 2 if self.has_halves and not self.is_half else 1


def unet_call(
    unet: UNet2DConditionModel, sample: Tensor, timestep: Any, encoder_hidden_states: Any, **kwargs: Any
) -> Call:
    """What `UNet2DConditionModel.forward` does to its arguments before the first layer."""
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0
    if unet.config.addition_embed_type == "image_hint":
        raise ValueError("UNets with addition_embed_type='image_hint' are not supported.")
    if (kwargs.get("cross_attention_kwargs") or {}).get("gligen") is not None:
        raise ValueError("GLIGEN inputs (cross_attention_kwargs['gligen']) are not supported with a schedule.")
    context = unet.process_encoder_hidden_states(
        encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=kwargs.get("added_cond_kwargs")
    )
    for mask in ("attention_mask", "encoder_attention_mask"):
        kwargs[mask] = _mask_to_bias(kwargs.get(mask), sample.dtype)
    call = Call(sample, timestep, context, encoder_hidden_states, **kwargs)
    size = (sample.shape[-2], sample.shape[-1])
    call.forward_upsample_size = any(dim % 2**unet.num_upsamplers for dim in size)
    for _ in unet.up_blocks:
        call.sizes.append(size)
        size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    return call


def controlnet_call(
    net: ControlNetModel,
    sample: Tensor,
    timestep: Any,
    encoder_hidden_states: Any,
    controlnet_cond: Tensor,
    **kwargs: Any,
) -> Call:
    """What `ControlNetModel.forward` does to its arguments before the first layer."""
    if net.config.controlnet_conditioning_channel_order == "bgr":
        controlnet_cond = torch.flip(controlnet_cond, dims=[1])
    kwargs["attention_mask"] = _mask_to_bias(kwargs.get("attention_mask"), sample.dtype)
    kwargs["controlnet_cond"] = controlnet_cond
    return Call(sample, timestep, encoder_hidden_states, encoder_hidden_states, **kwargs)


def guided_half(call_arguments: Any) -> Any:
    """The second half of every tensor in nested arguments whose first dimension is a batch."""
    return map_tensors(call_arguments, lambda tensor: tensor[tensor.shape[0] // 2 :])


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of every tensor in nested arguments that has a batch."""
    if isinstance(value, Tensor):
        return function(value) if value.ndim else value
    if isinstance(value, dict):
        return {name: map_tensors(part, function) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(part, function) for part in value)
    return value


def _mask_to_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def add_all(call: Call, *inputs: Tensor) -> Tensor:
    total = inputs[0]
    for x in inputs[1:]:
        total = total + x
    return total


# UNet2DConditionModel


def unet_time_embedding(unet: UNet2DConditionModel, call: Call) -> Tensor:
    emb = unet.time_embedding(unet.get_time_embed(sample=call.sample, timestep=call.timestep), call.timestep_cond)
    class_emb = unet.get_class_embed(sample=call.sample, class_labels=call.class_labels)
    if class_emb is not None:
        emb = torch.cat([emb, class_emb], dim=-1) if unet.config.class_embeddings_concat else emb + class_emb
    aug_emb = unet.get_aug_embed(
        emb=emb, encoder_hidden_states=call.prompt_embeds, added_cond_kwargs=call.added_cond_kwargs
    )
    emb = emb if aug_emb is None else emb + aug_emb
    return emb if unet.time_embed_act is None else unet.time_embed_act(emb)


def unet_conv_in(unet: UNet2DConditionModel, call: Call) -> Tensor:
    return unet.conv_in(call.sample)


def unet_head(unet: UNet2DConditionModel, call: Call, x: Tensor) -> Tensor:
    if unet.conv_norm_out:
        x = unet.conv_act(unet.conv_norm_out(x))
    return unet.conv_out(x)


def guidance(call: Call, prediction: Tensor) -> Tensor:
    """The guided minus the unguided prediction, of a batch that holds the unguided half first."""
    unguided, guided = prediction.tensor_split(2)
    return guided - unguided


# ControlNetModel


def controlnet_time_embedding(net: ControlNetModel, call: Call) -> Tensor:
    timestep = call.timestep
    if not torch.is_tensor(timestep):
        timestep = torch.tensor([timestep], device=call.sample.device)
    elif timestep.ndim == 0:
        timestep = timestep[None].to(call.sample.device)
    t_emb = net.time_proj(timestep.expand(call.sample.shape[0])).to(dtype=call.sample.dtype)
    emb = net.time_embedding(t_emb, call.timestep_cond)
    if net.class_embedding is not None:
        labels = call.class_labels
        if labels is None:
            raise ValueError("This ControlNet needs class_labels.")
        labels = net.time_proj(labels) if net.config.class_embed_type == "timestep" else labels
        emb = emb + net.class_embedding(labels).to(dtype=net.dtype)
    if net.config.addition_embed_type == "text":
        emb = emb + net.add_embedding(call.prompt_embeds)
    elif net.config.addition_embed_type == "text_time":
        added = call.added_cond_kwargs or {}
        missing = {"text_embeds", "time_ids"} - set(added)
        if missing:
            raise ValueError(f"This ControlNet needs added_cond_kwargs {sorted(missing)}.")
        text_embeds, time_ids = added["text_embeds"], added["time_ids"]
        time_embeds = net.add_time_proj(time_ids.flatten()).reshape(text_embeds.shape[0], -1)
        emb = emb + net.add_embedding(torch.cat([text_embeds, time_embeds], dim=-1).to(emb.dtype))
    return emb


def condition_embedding(net: ControlNetModel, call: Call) -> Tensor:
    return net.controlnet_cond_embedding(call.controlnet_cond)


def controlnet_conv_in(net: ControlNetModel, call: Call, cond: Tensor) -> Tensor:
    return net.conv_in(call.sample) + cond


def control_residual(net: ControlNetModel, n: int, total: int, call: Call, x: Tensor) -> Tensor:
    """The n-th of `total` residuals, scaled as the UNet receives it."""
    # Looked up anew each time: loading a LoRA replaces the convolution.
    x = net.controlnet_mid_block(x) if n == total - 1 else net.controlnet_down_blocks[n](x)
    if call.guess_mode and not net.config.global_pool_conditions:
        scales = torch.logspace(-1, 0, total, device=x.device) * call.conditioning_scale
        x = x * scales[n]
    else:
        x = x * call.conditioning_scale
    return torch.mean(x, dim=(2, 3), keepdim=True) if net.config.global_pool_conditions else x


def control_shapes(net: ControlNetModel, sample: Tensor) -> list[tuple[int, ...]]:
    """The shapes of all residuals, in order, for latents [batch, channels, height, width]."""
    height, width = sample.shape[-2:]
    shapes = [(net.config.block_out_channels[0], height, width)]
    for channels, block in zip(net.config.block_out_channels, net.down_blocks, strict=True):
        shapes += [(channels, height, width)] * len(block.resnets)
        if block.downsamplers is not None:
            height, width = (height + 1) // 2, (width + 1) // 2
            shapes.append((channels, height, width))
    shapes.append((net.config.block_out_channels[-1], height, width))
    if net.config.global_pool_conditions:
        shapes = [(channels, 1, 1) for channels, _, _ in shapes]
    return [(len(sample), *shape) for shape in shapes]


# Blocks


def downsample(sampler: nn.Module, call: Call, x: Tensor) -> Tensor:
    return sampler(x)


def upsample(sampler: nn.Module, level: int, call: Call, x: Tensor) -> Tensor:
    return sampler(x, call.sizes[level] if call.forward_upsample_size else None)


def concat_skip(block: Any, call: Call, x: Tensor, skip: Tensor) -> Tensor:
    factors = {name: getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")}
    if all(factors.values()):
        x, skip = apply_freeu(block.resolution_idx, x.clone(), skip, **factors)  # it writes into x, which may be kept
    return torch.cat([x, skip], dim=1)


# ResnetBlock2D


def resnet(module: ResnetBlock2D, call: Call, x: Tensor, temb: Tensor) -> Tensor:
    return module(x, temb)


def resnet_branch(module: ResnetBlock2D, call: Call, x: Tensor, temb: Tensor) -> Tensor:
    """The residual branch without the shortcut (what Learning-to-Cache reuses, arXiv 2406.01733)."""
    x = module.conv1(module.nonlinearity(module.norm1(x)))
    if module.time_emb_proj is not None:
        temb = module.time_emb_proj(temb if module.skip_time_act else module.nonlinearity(temb))[:, :, None, None]
    if module.time_embedding_norm == "scale_shift":
        scale, shift = torch.chunk(temb, 2, dim=1)
        x = module.norm2(x) * (1 + scale) + shift
    else:
        x = module.norm2(x + temb if module.time_emb_proj is not None else x)
    return module.conv2(module.dropout(module.nonlinearity(x)))


def resnet_sum(module: ResnetBlock2D, call: Call, x: Tensor, branch: Tensor) -> Tensor:
    shortcut = x if module.conv_shortcut is None else module.conv_shortcut(x)
    return (shortcut + branch) / module.output_scale_factor


# Transformer2DModel and BasicTransformerBlock


def transformer(module: Transformer2DModel, call: Call, x: Tensor) -> Tensor:
    return module(
        x,
        encoder_hidden_states=call.encoder_hidden_states,
        cross_attention_kwargs=call.cross_attention_kwargs,
        attention_mask=call.attention_mask,
        encoder_attention_mask=call.encoder_attention_mask,
        return_dict=False,
    )[0]


def transformer_in(module: Transformer2DModel, call: Call, x: Tensor) -> Tensor:
    """Norm and input projection: image to tokens."""
    batch, _, height, width = x.shape
    x = module.norm(x)
    if module.use_linear_projection:
        x = x.permute(0, 2, 3, 1).reshape(batch, height * width, x.shape[1])
        return module.proj_in(x)
    x = module.proj_in(x)
    return x.permute(0, 2, 3, 1).reshape(batch, height * width, x.shape[1])


def transformer_out(module: Transformer2DModel, call: Call, h: Tensor, x: Tensor) -> Tensor:
    """Output projection: tokens to image, without the residual `x` (which gives the shape only)."""
    batch, _, height, width = x.shape
    h = module.proj_out(h) if module.use_linear_projection else h
    h = h.reshape(batch, height, width, h.shape[-1]).permute(0, 3, 1, 2).contiguous()
    return h if module.use_linear_projection else module.proj_out(h)


def block_attn1(block: BasicTransformerBlock, call: Call, h: Tensor) -> Tensor:
    context = call.encoder_hidden_states if block.only_cross_attention else None
    kwargs = call.cross_attention_kwargs or {}
    return block.attn1(block.norm1(h), encoder_hidden_states=context, attention_mask=call.attention_mask, **kwargs)


def block_attn2(block: BasicTransformerBlock, call: Call, h: Tensor) -> Tensor:
    return block.attn2(
        block.norm2(h),
        encoder_hidden_states=call.encoder_hidden_states,
        attention_mask=call.encoder_attention_mask,
        **(call.cross_attention_kwargs or {}),
    )


def block_ff(block: BasicTransformerBlock, call: Call, h: Tensor) -> Tensor:
    h = block.norm3(h)
    if block._chunk_size is None:
        return block.ff(h)
    return _chunked_feed_forward(block.ff, h, block._chunk_dim, block._chunk_size)
