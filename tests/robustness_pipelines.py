"""Tiny pipelines of every kind for the table in `robustness.py`, and schedules for them."""

from __future__ import annotations

import inspect
import random
from typing import Any

import diffusers
import torch
from tiny_models import (
    GUIDANCE_SCALE,
    IMAGE_SIZE,
    NUM_STEPS,
    NUM_TOKENS,
    UNET_CONFIGS,
    build_models,
    build_pipeline,
    random_rows,
)
from torch import Tensor

from hgc_learn.models.fingerprint import ModelFingerprint
from hgc_learn.models.graph import build_graph
from hgc_learn.schedule import HGCSchedule
from hgc_learn.scheduler_config import scheduler_config
from hgc_learn.sites import list_sites

SDXL = {"shape": "small_sdxl"}
TWO = {"num_controlnets": 2}
XL = "StableDiffusionXLControlNetPipeline"


def build(
    kind: str = "StableDiffusionControlNetPipeline",
    *,
    shape: str = "small",
    num_controlnets: int = 1,
    scheduler: str = "DDIMScheduler",
    dtype: torch.dtype = torch.float64,
    scheduler_config: dict[str, Any] | None = None,
    unet_config: dict[str, Any] | None = None,
    **more: Any,
) -> Any:
    """A pipeline of the class `kind`. Double precision leaves no room for differences that are not rounding."""
    settings: dict[str, Any] = {"clip_sample": False, "steps_offset": 1} if scheduler == "DDIMScheduler" else {}
    settings |= scheduler_config or {}
    tiny = build_pipeline(shape, num_controlnets=num_controlnets, scheduler=getattr(diffusers, scheduler)(**settings))
    if unet_config is not None:
        tiny.pipe.unet = build_models(UNET_CONFIGS[shape] | unet_config)[0]
    pipeline_class = getattr(diffusers, kind)
    accepted = inspect.signature(pipeline_class.__init__).parameters
    parts: dict[str, Any] = dict.fromkeys(accepted.keys() - {"self", "args", "kwargs"})
    parts |= {"requires_safety_checker": False, "add_watermarker": False, "force_zeros_for_empty_prompt": True}
    parts |= {"requires_aesthetics_score": False, "unet": tiny.pipe.unet, **tiny.pipe.components, **more}
    pipe = pipeline_class(**{name: value for name, value in parts.items() if name in accepted})
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            torch.nn.Module.to(component, dtype)
    return pipe


def arguments(pipe: Any, *, num_images: int = 1, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> dict[str, Any]:
    """What the pipeline is called with, always the same."""
    generator = torch.Generator().manual_seed(11)
    dim = pipe.unet.config.cross_attention_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(num_images, *shape, generator=generator)

    def image() -> Tensor:
        return torch.rand(num_images, 3, *size, generator=generator)

    nets = getattr(getattr(pipe, "controlnet", None), "nets", None)
    control = image() if nets is None else [image() for _ in nets]
    possible = {
        "prompt_embeds": random(NUM_TOKENS, dim),
        "negative_prompt_embeds": random(NUM_TOKENS, dim),
        "pooled_prompt_embeds": random(10),
        "negative_pooled_prompt_embeds": random(10),
        "height": size[0],
        "width": size[1],
        "image": image() if hasattr(pipe, "vae_scale_factor") and _takes(pipe, "strength") else control,
        "control_image": control,
        "mask_image": (image()[:, :1] > 0.5).float(),
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "output_type": "latent",
        "generator": generator,
    }
    return {name: value for name, value in possible.items() if _takes(pipe, name)}


def _takes(pipe: Any, name: str) -> bool:
    return name in inspect.signature(type(pipe).__call__).parameters


def run(pipe: Any, **kwargs: Any) -> Tensor:
    """Calls the pipeline as always but for `kwargs`; returns the final latents."""
    size = (kwargs.pop("num_images", 1), kwargs.pop("size", (IMAGE_SIZE, IMAGE_SIZE)))
    return pipe(**{**arguments(pipe, num_images=size[0], size=size[1]), **kwargs}).images


def animatediff() -> Any:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    parts = {name: part for name, part in build().components.items() if name in ("vae", "unet", "scheduler")}
    return AnimateDiffPipeline(**parts, text_encoder=None, tokenizer=None, motion_adapter=adapter)


def t2i_adapter() -> Any:
    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    )
    return build("StableDiffusionAdapterPipeline", adapter=adapter)


def controlnet_union() -> Any:
    pipe = build()
    pipe.controlnet = diffusers.ControlNetUnionModel(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
        attention_head_dim=8,
        cross_attention_dim=12,
        num_attention_heads=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
    )
    return pipe


# Schedules


def schedules(pipe: Any, rng: random.Random | None = None) -> list[dict[str, str]]:
    """One with values held; one with lines, means of the halves and half steps besides; one whose steps are decoders
    that do not depend on each other, from the second on, with the guided half alone at some."""
    pipe.scheduler.set_timesteps(NUM_STEPS)
    num_steps, rng = len(pipe.scheduler.timesteps), rng or random.Random(1)
    sites = [s for s in list_sites(build_graph(pipe.unet, getattr(pipe, "controlnet", None))) if s != "unet:guidance"]
    held = random_rows(sites, rng, num_sites=len(sites) // 3, num_steps=num_steps)
    mixed = random_rows(sites, rng, num_sites=len(sites) // 4, num_steps=num_steps)
    mixed = {site: "".join(rng.choice("-1m") if code == "-" else code for code in row) for site, row in mixed.items()}
    mixed["unet:guidance"] = "C" + "".join(rng.choice("CC-10") for _ in range(num_steps - 1))
    of_encoder = [s for s in sites if "up_blocks" not in s and s != "unet:eps"]
    decoders = {site: "CC" + "".join(rng.choice("--1m") for _ in range(num_steps - 2)) for site in of_encoder}
    if rng.random() < 0.5:
        decoders["unet:guidance"] = "CC" + "C" * rng.randrange(2) + "-" * (num_steps - 2)
        decoders["unet:guidance"] = decoders["unet:guidance"][:num_steps]
    return [held, mixed, decoders]


def schedule_for(pipe: Any, rows: dict[str, str]) -> HGCSchedule:
    pipe.scheduler.set_timesteps(NUM_STEPS)
    return HGCSchedule(
        sites=rows,
        timesteps=tuple(pipe.scheduler.timesteps.tolist()),
        scheduler=type(pipe.scheduler).__name__,
        scheduler_config=scheduler_config(pipe.scheduler),
        guidance_scale=GUIDANCE_SCALE,
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        model=ModelFingerprint.of(pipe.unet, getattr(pipe, "controlnet", None)),
    )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    assert (actual - expected).norm() <= tolerance * expected.norm()
