"""Pipelines of well-known architectures with random weights: time and memory do not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from hgc_learn.models.architectures import Architecture
from hgc_learn.models.graph import controlnet_list


def random_pipeline(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> Any:
    """A pipeline of an architecture (on the meta device, as `hgc_learn.models.architectures` builds them) without text
    encoders, and with a VAE of a few channels: call it by `random_arguments`."""
    nets = controlnet_list(architecture.controlnet)
    # The models' own `to` warns of layers that pretrained weights need in float32.
    models = [nn.Module.to(model.to_empty(device=device), dtype) for model in (architecture.unet, *nets)]
    unet, *controlnets = map(randomized, models)
    num_levels = architecture.vae_scale_factor.bit_length()
    vae = AutoencoderKL(
        block_out_channels=(8,) * num_levels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
    )
    nn.Module.to(vae, device, dtype)
    scheduler = UniPCMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet,
        "scheduler": scheduler,
        "feature_extractor": None,
    }
    if controlnets:
        parts["controlnet"] = controlnets[0] if len(controlnets) == 1 else controlnets
    kind: Any
    if unet.config.addition_embed_type == "text_time":
        kind = StableDiffusionXLControlNetPipeline if controlnets else StableDiffusionXLPipeline
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    else:
        kind = StableDiffusionControlNetPipeline if controlnets else StableDiffusionPipeline
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def randomized(model: nn.Module) -> Any:
    """Small normal weights, so that nothing overflows."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.5 * parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)


def random_arguments(pipe: Any, *, size: int, num_inference_steps: int, guidance_scale: float) -> dict[str, Any]:
    """What to call such a pipeline with: embeddings are given and latents asked for, so that a call is the denoising
    loop and next to nothing else."""
    generator = torch.Generator().manual_seed(0)
    dtype, device = pipe.unet.dtype, pipe.unet.device

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(device, dtype)

    arguments: dict[str, Any] = {
        "prompt_embeds": random(77, pipe.unet.config.cross_attention_dim),
        "negative_prompt_embeds": random(77, pipe.unet.config.cross_attention_dim),
        "height": size,
        "width": size,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "latents": random(pipe.unet.config.in_channels, size // pipe.vae_scale_factor, size // pipe.vae_scale_factor),
        "output_type": "latent",
    }
    nets = controlnet_list(getattr(pipe, "controlnet", None))
    if nets:
        image = torch.rand(1, 3, size, size, generator=generator)
        arguments["image"] = image if len(nets) == 1 else [image] * len(nets)
    if pipe.unet.config.addition_embed_type == "text_time":
        pooled = pipe.unet.config.projection_class_embeddings_input_dim - 6 * pipe.unet.config.addition_time_embed_dim
        arguments |= {"pooled_prompt_embeds": random(pooled), "negative_pooled_prompt_embeds": random(pooled)}
    return arguments
