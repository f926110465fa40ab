"""A whole tiny pipeline folder, prompts and all: what training starts from."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    UniPCMultistepScheduler,
)
from tiny_models import UNET_CONFIGS, build_models

from hgc_learn.demo.teacher import HIDDEN_SIZE, build_text_encoder, build_tokenizer
from hgc_learn.rollout import SamplingConfig

SAMPLING = SamplingConfig(num_inference_steps=5, guidance_scale=3.0, height=64, width=64)


def save_tiny_teacher(folder: Path) -> None:
    """Saves an SD1.5-shaped pipeline for 64x64 pictures with random weights."""
    unet, _ = build_models(UNET_CONFIGS["sd15"] | {"cross_attention_dim": HIDDEN_SIZE, "sample_size": 8})
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 8))
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    tokenizer = build_tokenizer()
    StableDiffusionControlNetPipeline(
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        controlnet=controlnet,
        scheduler=UniPCMultistepScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
