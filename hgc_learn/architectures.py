"""Well-known architectures by name, built on the meta device: enough to count, plan and benchmark without weights.

Configurations are those of the public checkpoints' config.json files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

_SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD21: dict[str, Any] = _SD15 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

_CONFIGS = {"sd15": _SD15, "sd21": _SD21, "sdxl": _SDXL}
ARCHITECTURES = [f"{name}{suffix}" for name in _CONFIGS for suffix in ("", "-controlnet")]


@dataclass(frozen=True)
class Architecture:
    """Models on the meta device; `vae_scale_factor` is image pixels per latent pixel."""

    unet: UNet2DConditionModel
    controlnet: ControlNetModel | None
    vae_scale_factor: int = 8
    num_tokens: int = 77


def build_architecture(name: str) -> Architecture:
    """Builds one of `ARCHITECTURES` on the meta device.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"Unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}.")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**_CONFIGS[name.removesuffix("-controlnet")])
        controlnet = None
        if name.endswith("-controlnet"):
            controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    return Architecture(unet, controlnet)
