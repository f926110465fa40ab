"""Real, tiny diffusers models and pipelines with random non-zero weights: the table that the tests run over."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from hgc_learn.models.fingerprint import ModelFingerprint
from hgc_learn.models.graph import build_graph
from hgc_learn.schedule import HGCSchedule
from hgc_learn.sites import list_sites

NUM_STEPS = 6
NUM_TOKENS = 7
GUIDANCE_SCALE = 5.0
IMAGE_SIZE = 16
VAE_SCALE_FACTOR = 2

_SD15: dict[str, Any] = {
    "sample_size": IMAGE_SIZE // VAE_SCALE_FACTOR,
    "block_out_channels": (8, 16, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
_SD2: dict[str, Any] = _SD15 | {
    "cross_attention_dim": 16,
    "attention_head_dim": (1, 2, 2, 4),
    "use_linear_projection": True,
    "upcast_attention": True,
}
_SDXL: dict[str, Any] = {
    "sample_size": IMAGE_SIZE // VAE_SCALE_FACTOR,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 3),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 20,
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
_SMALL: dict[str, Any] = _SD15 | {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
_SMALL_SDXL: dict[str, Any] = _SDXL | {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
    "layers_per_block": 1,
}
SHAPES = ["sd15", "sd2", "sdxl"]
UNET_CONFIGS = {"sd15": _SD15, "sd2": _SD2, "sdxl": _SDXL, "small": _SMALL, "small_sdxl": _SMALL_SDXL}


def build_models(config: dict[str, Any], seed: int = 0) -> tuple[UNet2DConditionModel, ControlNetModel]:
    """A UNet and its ControlNet with random weights; zero convolutions are not left at zero."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
    controlnet = ControlNetModel.from_unet(
        unet, load_weights_from_unet=False, conditioning_embedding_out_channels=(4, 8)
    )
    for parameter in controlnet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return unet, controlnet.eval().requires_grad_(False)


def conditioning(shape: str, batch_size: int) -> dict[str, Any]:
    """The arguments of one forward of both models, but sample and timestep; the same at every call."""
    generator = torch.Generator().manual_seed(3)
    config = UNET_CONFIGS[shape]
    result: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(batch_size, NUM_TOKENS, config["cross_attention_dim"], generator=generator)
    }
    if "addition_embed_type" in config:
        text_embeds = torch.randn(batch_size, 10, generator=generator)
        time_ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(batch_size, 1)
        result["added_cond_kwargs"] = {"text_embeds": text_embeds, "time_ids": time_ids}
    return result


@dataclass
class TinyPipeline:
    """A pipeline and how it is called."""

    shape: str
    pipe: Any

    def __call__(self, **kwargs: Any) -> Tensor:
        """Runs the pipeline from fixed noise; returns the final latents."""
        return self.pipe(**{**self.arguments(), **kwargs}).images

    def arguments(self, num_images: int = 1, seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1000 + seed)
        dim = UNET_CONFIGS[self.shape]["cross_attention_dim"]

        def embeds(*shape: int) -> Tensor:
            return torch.randn(num_images, *shape, generator=generator)

        arguments: dict[str, Any] = {
            "prompt_embeds": embeds(NUM_TOKENS, dim),
            "negative_prompt_embeds": embeds(NUM_TOKENS, dim),
            "image": torch.rand(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
            "height": IMAGE_SIZE,
            "width": IMAGE_SIZE,
            "num_inference_steps": NUM_STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "output_type": "latent",
            "generator": generator,
        }
        if "addition_embed_type" in UNET_CONFIGS[self.shape]:
            arguments |= {"pooled_prompt_embeds": embeds(10), "negative_pooled_prompt_embeds": embeds(10)}
        return arguments

    def sites(self) -> list[str]:
        return list_sites(build_graph(self.pipe.unet, self.pipe.controlnet))

    def schedule(self, rows: dict[str, str] | None = None, **kwargs: Any) -> HGCSchedule:
        """A schedule for this pipeline as it stands: its scheduler, its timesteps."""
        self.pipe.scheduler.set_timesteps(NUM_STEPS)
        settings: dict[str, Any] = {
            "sites": rows or {},
            "timesteps": tuple(self.pipe.scheduler.timesteps.tolist()),
            "scheduler": type(self.pipe.scheduler).__name__,
            "guidance_scale": GUIDANCE_SCALE,
            "height": IMAGE_SIZE,
            "width": IMAGE_SIZE,
            "model": ModelFingerprint.of(self.pipe.unet, self.pipe.controlnet),
        }
        return HGCSchedule(**{**settings, **kwargs})


def build_pipeline(shape: str, *, num_controlnets: int = 1, scheduler: Any = None, seed: int = 0) -> TinyPipeline:
    unet, controlnet = build_models(UNET_CONFIGS[shape], seed)
    nets = [controlnet] + [build_models(UNET_CONFIGS[shape], seed + i)[1] for i in range(1, num_controlnets)]
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet,
        "controlnet": nets if num_controlnets > 1 else controlnet,
        "scheduler": scheduler or DDIMScheduler(),
        "feature_extractor": None,
    }
    pipe: Any
    if "projection_class_embeddings_input_dim" in UNET_CONFIGS[shape]:
        pipe = StableDiffusionXLControlNetPipeline(
            **parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False
        )
    else:
        pipe = StableDiffusionControlNetPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return TinyPipeline(shape, pipe)


@cache
def shared_pipeline(shape: str, dtype: torch.dtype = torch.float32) -> TinyPipeline:
    """One pipeline per shape for tests that leave it as they found it."""
    tiny = build_pipeline(shape)
    tiny.pipe.to(dtype)
    return tiny


def random_rows(
    sites: list[str], rng: random.Random, *, num_sites: int = 8, num_steps: int = NUM_STEPS
) -> dict[str, str]:
    chosen = rng.sample(sites, num_sites)
    return {site: "C" + "".join(rng.choice("CC---") for _ in range(num_steps - 1)) for site in chosen}


def save_configs(folder: Path, num_controlnets: int = 1) -> None:
    """A pipeline folder without any weights."""
    pipe = build_pipeline("sd15", num_controlnets=num_controlnets).pipe
    pipe.unet.save_config(folder / "unet")
    pipe.vae.save_config(folder / "vae")
    nets = pipe.controlnet.nets if num_controlnets > 1 else [pipe.controlnet]
    for i, net in enumerate(nets):
        net.save_config(folder / ("controlnet" if i == 0 else f"controlnet_{i}"))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 9}')
