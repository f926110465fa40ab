"""Tiny Stable Diffusion pipelines, with and without a ControlNet, in which attention has a say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from tiny_models import GUIDANCE_SCALE, IMAGE_SIZE, VAE_SCALE_FACTOR, TinyPipeline, build_pipeline
from torch import Tensor

from hgc_learn.inference import apply_schedule
from hgc_learn.policies import POLICIES
from hgc_learn.sampling import SamplingConfig
from hgc_learn.setting import Setting

NUM_STEPS = 12


def build(*, controlnet: bool, shape: str = "small") -> TinyPipeline:
    """With random weights attention and control hardly move the latents; here every step that reuses them shows."""
    tiny = build_pipeline(shape, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False))
    for model in (tiny.pipe.unet, tiny.pipe.controlnet):
        for module in model.modules():
            if isinstance(module, Attention):
                module.to_out[0].weight.mul_(20)
    for zero_conv in (*tiny.pipe.controlnet.controlnet_down_blocks, tiny.pipe.controlnet.controlnet_mid_block):
        zero_conv.weight.mul_(10)
    if not controlnet:
        pipe = tiny.pipe
        tiny.pipe = StableDiffusionPipeline(
            vae=pipe.vae,
            text_encoder=None,
            tokenizer=None,
            unet=pipe.unet,
            scheduler=pipe.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        tiny.pipe.set_progress_bar_config(disable=True)
    return tiny


def arguments(tiny: TinyPipeline, **kwargs: Any) -> dict[str, Any]:
    """Those of one call, for two pictures; a new generator each time."""
    result = tiny.arguments(num_images=2) | {"num_inference_steps": NUM_STEPS} | kwargs
    if not hasattr(tiny.pipe, "controlnet"):
        del result["image"]
    return result


def run(tiny: TinyPipeline, **kwargs: Any) -> Tensor:
    """The latents that the pipeline as it stands gives."""
    return tiny.pipe(**arguments(tiny, **kwargs)).images


def run_policy(tiny: TinyPipeline, name: str, knobs: dict[str, Any], **kwargs: Any) -> Tensor:
    """The latents with the schedule that the policy writes."""
    sampling = SamplingConfig(NUM_STEPS, kwargs.get("guidance_scale", GUIDANCE_SCALE), IMAGE_SIZE, IMAGE_SIZE)
    schedule = POLICIES[name].schedule(Setting.of_pipeline(tiny.pipe, sampling), **knobs)
    with apply_schedule(tiny.pipe, schedule):
        return run(tiny, **kwargs)


@torch.no_grad()
def denoise(tiny: TinyPipeline, gate: int, begin_step: Callable[[int], None]) -> Tensor:
    """The denoising loop of a ControlNet pipeline written out: guidance up to `gate`, from then on the guided half
    alone, its prediction taken as it is. `begin_step(i)` is called before step i."""
    pipe, call = tiny.pipe, arguments(tiny)
    prompts = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    images = torch.cat([call["image"]] * 2)
    size = IMAGE_SIZE // VAE_SCALE_FACTOR
    num_images = len(call["image"])
    latents = torch.randn(num_images, 4, size, size, generator=call["generator"])
    pipe.scheduler.set_timesteps(NUM_STEPS)
    for i, t in enumerate(pipe.scheduler.timesteps):
        begin_step(i)
        if i == gate:
            prompts, images = prompts[num_images:], images[num_images:]
        x = torch.cat([latents] * (2 if i < gate else 1))
        down, mid = pipe.controlnet(x, t, encoder_hidden_states=prompts, controlnet_cond=images, return_dict=False)
        (prediction,) = pipe.unet(
            x,
            t,
            encoder_hidden_states=prompts,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )
        if i < gate:
            unguided, guided = prediction.chunk(2)
            prediction = unguided + GUIDANCE_SCALE * (guided - unguided)
        latents = pipe.scheduler.step(prediction, t, latents).prev_sample
    return latents


@contextmanager
def controlnet_at(net: Any, steps: Collection[int]) -> Iterator[None]:
    """Calls the ControlNet at these steps only and repeats what it gave."""
    forward, calls, kept = net.forward, [0], {}

    def repeat(*args: Any, **kwargs: Any) -> Any:
        if calls[0] in steps:
            kept["result"] = forward(*args, **kwargs)
        calls[0] += 1
        return kept["result"]

    net.forward = repeat
    try:
        yield
    finally:
        del net.forward


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to `b`."""
    return float((a - b).norm() / b.norm())


def sd15_attention_macs(*, controlnet: bool) -> tuple[int, int]:
    """MACs of all self-attentions and of all cross-attentions of SD1.5 at 512x512, for one sample at one step, worked
    out by hand: projections of (tokens, channels), attention matmuls not counted."""
    prompt_tokens, prompt_channels = 77, 768
    self_macs = cross_macs = 0
    per_level = 5 + 2 * controlnet  # layers: two in the encoder, three in the decoder, two in the ControlNet
    for tokens, channels, layers in (
        (64 * 64, 320, per_level),
        (32 * 32, 640, per_level),
        (16 * 16, 1280, per_level),
        (8 * 8, 1280, 1 + controlnet),  # the mid block
    ):
        query_or_output = tokens * channels**2
        self_macs += layers * 4 * query_or_output
        cross_macs += layers * (2 * query_or_output + 2 * prompt_tokens * prompt_channels * channels)
    return self_macs, cross_macs
