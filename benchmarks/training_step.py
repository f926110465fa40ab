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
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import read_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import CLIPTextConfig, CLIPTextModel

from hgc_learn.__main__ import guarded
from hgc_learn.files import save_json
from hgc_learn.models.architectures import build_architecture
from hgc_learn.models.random_pipeline import random_pipeline
from hgc_learn.objectives import Rollout
from hgc_learn.sampling import SamplingConfig
from hgc_learn.teachers.pipeline import build_tokenizer
from hgc_learn.training.module import RouterModule


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is entered, and that are not freed yet: what an
    allocator without waste would need besides the weights, on any device.

    Args:
        no_products: convolutions and products of matrices give zeros, of the right shape: the same tensors live in a
            fraction of the time.
    """

    def __init__(self, no_products: bool = False) -> None:
        super().__init__()
        self.no_products = no_products
        self.held: dict[int, int] = {}
        self.num_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if self.no_products and func.overloadpacket in PRODUCTS:
            shapes = func(*tree_map_only(torch.Tensor, _on_meta, args), **tree_map_only(torch.Tensor, _on_meta, kwargs))
            outputs = tree_map_only(torch.Tensor, lambda t: torch.zeros_like(t, device="cpu"), shapes)
        else:
            outputs = func(*args, **kwargs)
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in before and id(storage) not in self.held:
                    self.held[id(storage)] = storage.nbytes()
                    self.num_bytes += storage.nbytes()
                    weakref.finalize(storage, self._freed, id(storage))
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        return outputs

    def _freed(self, key: int) -> None:
        self.num_bytes -= self.held.pop(key)


PRODUCTS = {
    torch.ops.aten.convolution,
    torch.ops.aten.convolution_backward,
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def save_random_pipeline(folder: Path, arch: str, dtype: torch.dtype) -> None:
    """A pipeline folder of an architecture of SD1.5's kind with a ControlNet, with random weights."""
    pipe = random_pipeline(build_architecture(arch), dtype, torch.device("cpu"))
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=pipe.unet.config.cross_attention_dim,
            num_hidden_layers=1,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    pipe.register_modules(text_encoder=text_encoder.to(dtype), tokenizer=tokenizer)
    pipe.save_pretrained(folder)


def measure(folder: Path, args: argparse.Namespace, num_steps: int) -> dict[str, Any]:
    """The second of two updates at one number of steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampling = SamplingConfig(num_inference_steps=num_steps, guidance_scale=7.5, height=args.size, width=args.size)
    module = RouterModule(
        str(folder),
        sampling,
        errors_of="latents",
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
    budget = max(args.budget, module.router.least_budget)
    module.seed(0)
    if not args.only_count:
        module.teacher_latents(batch)  # chooses kernels
        module.kept_latents.clear()
    start = time.monotonic()
    if not args.only_count:
        module.teacher_latents(batch)
    teacher_seconds = time.monotonic() - start
    weights = sum(p.nbytes for net in (module.pipe.unet, module.pipe.controlnet) for p in net.parameters())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    latents = torch.zeros(1, 4, args.size // 8, args.size // 8, dtype=module.pipe.unet.dtype)
    uncounted = patch.object(module, "teacher_latents", lambda batch: latents) if args.only_count else nullcontext()
    with uncounted, LiveTensors(args.only_count) as tensors:
        logs = objective.gradients(module, batch, budget)
    kept = float(logs["sampled_macs"])
    module.router.zero_grad()
    start = time.monotonic()
    if not args.only_count:  # once more, for the first one counted tensors and chose kernels
        objective.gradients(module, batch, budget)
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
        "teacher_seconds": None if args.only_count else round(teacher_seconds, 1),
        "update_seconds": None if args.only_count else round(time.monotonic() - start, 1),
        "weights_gib": round(weights / 2**30, 3),
        "tensors_gib": round((weights + tensors.peak_bytes) / 2**30, 3),
        "peak_gib": None if args.only_count else round(peak / 2**30, 3),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sd15-controlnet")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--budget", type=float, default=0.37)
    parser.add_argument("--num_steps", type=int, default=2, help="of one process: the peak is the process's")
    parser.add_argument("--no_gradient_checkpointing", action="store_true")
    parser.add_argument("--only_count", action="store_true", help="tensors, without computing what is in them")
    parser.add_argument("--output", type=Path, help="JSON file to add a row to")
    args = parser.parse_args(argv)
    torch.manual_seed(0)  # the same schedule is drawn
    with tempfile.TemporaryDirectory() as folder:
        save_random_pipeline(Path(folder), args.arch, getattr(torch, args.dtype))
        row = measure(Path(folder), args, args.num_steps)
    print(json.dumps(row, indent=1))
    if args.output:
        save_json(args.output, [*read_rows(args.output), row])


if __name__ == "__main__":
    sys.exit(guarded(main))
