"""Memory and time of one update of the router at real size: `python benchmarks/training_step.py --num_steps 2`.

Weights do not matter for either, so they are random; the text encoder is a stand-in of one layer, for its cost is paid
once per prompt. One update is what `Rollout` does per batch: a rollout with guidance in which the reused sites' fresh
values are computed besides, and two backward passes through all of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UniPCMultistepScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from hgc_learn.architectures import build_architecture
from hgc_learn.demo.teacher import build_tokenizer, build_vae
from hgc_learn.objectives import Rollout
from hgc_learn.rollout import SamplingConfig
from hgc_learn.training import RouterModule


def save_random_pipeline(folder: Path, arch: str, dtype: torch.dtype) -> None:
    """A pipeline folder of an architecture with a ControlNet, with random weights."""
    architecture = build_architecture(arch)
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=architecture.unet.config.cross_attention_dim,
            num_hidden_layers=1,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    assert isinstance(architecture.controlnet, ControlNetModel)
    unet, controlnet = (
        randomized(model.to_empty(device="cpu").to(dtype)) for model in (architecture.unet, architecture.controlnet)
    )
    StableDiffusionControlNetPipeline(
        vae=build_vae((8, 8, 8, 8)).to(dtype),
        text_encoder=text_encoder.to(dtype),
        tokenizer=tokenizer,
        unet=unet,
        controlnet=controlnet,
        scheduler=UniPCMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@torch.no_grad()
def randomized(model: nn.Module) -> Any:
    """Small normal weights, so that nothing overflows."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.5 * parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


def measure(folder: Path, args: argparse.Namespace, num_steps: int) -> dict[str, Any]:
    """One update at one number of steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampling = SamplingConfig(num_inference_steps=num_steps, guidance_scale=7.5, height=args.size, width=args.size)
    module = RouterModule(
        str(folder),
        sampling,
        budgets=[1.0],
        dtype=args.dtype,
        gradient_checkpointing=not args.no_gradient_checkpointing,
    ).to(device)
    module.pipe.to(device)
    objective = module.objective
    assert isinstance(objective, Rollout)
    batch = {"text": ["a red circle"], "seed": [0], "conditioning_image": torch.rand(1, 3, args.size, args.size)}
    with torch.no_grad():
        module.router.logits[1:].copy_(torch.randn(module.router.logits[1:].shape))
    budget = max(args.budget, 1.001 * module.router.least_budget)
    module.seed(0)
    start = time.monotonic()
    module.teacher_latents(batch)
    teacher_seconds = time.monotonic() - start
    weights = sum(p.nbytes for net in (module.pipe.unet, module.pipe.controlnet) for p in net.parameters())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    logs = objective.gradients(module, batch, budget)
    kept = float(logs["sampled_macs"])
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "arch": args.arch,
        "size": args.size,
        "dtype": args.dtype,
        "gradient_checkpointing": not args.no_gradient_checkpointing,
        "num_inference_steps": num_steps,
        "kept_macs": round(kept, 4),
        "num_gates": module.router.logits.numel(),
        "teacher_seconds": round(teacher_seconds, 1),
        "update_seconds": round(time.monotonic() - start, 1),
        "weights_gib": round(weights / 2**30, 3),
        "peak_gib": round(peak / 2**30, 3),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sd15-controlnet")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--budget", type=float, default=0.37)
    parser.add_argument("--num_steps", type=int, default=2, help="of one process: the peak is the process's")
    parser.add_argument("--no_gradient_checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file to add a row to")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        save_random_pipeline(Path(folder), args.arch, getattr(torch, args.dtype))
        row = measure(Path(folder), args, args.num_steps)
    print(json.dumps(row, indent=1))
    if args.output:
        rows = json.loads(args.output.read_text()) if args.output.is_file() else []
        args.output.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
