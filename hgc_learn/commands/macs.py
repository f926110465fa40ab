"""Count the multiply-accumulates of one image, on meta tensors: no weights are needed or read.

Two conventions: without the attention matmuls (QK^T and AV), as most papers on caching count, and with them.
With --schedule also what is left of them under that schedule, step by step.

  hgc_learn macs --arch sd15-controlnet --steps 20 --size 512 --guidance_scale 7.5
  hgc_learn macs --model path/to/pipeline --schedule hgc_schedule.json --json
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from hgc_learn.commands import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_STEPS,
    add_architecture,
    finite,
    image_size,
    named_architecture,
)

if TYPE_CHECKING:
    from hgc_learn.models.architectures import Architecture
    from hgc_learn.schedule import HGCSchedule

CONVENTIONS = {
    "macs": "multiply-accumulates of convolutions and linear layers; attention matmuls (QK^T, AV) not counted",
    "macs_with_attention": "the same with the attention matmuls counted",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_architecture(parser, required=True)
    parser.add_argument("--schedule", metavar="FILE", help="also count what this schedule leaves")
    parser.add_argument(
        "--steps", type=int, help=f"model calls per image (default: the schedule's, else {DEFAULT_STEPS})"
    )
    parser.add_argument(
        "--size",
        type=image_size,
        help="image size in pixels, N or HEIGHTxWIDTH (default: the schedule's, else the model's)",
    )
    parser.add_argument(
        "--guidance_scale",
        type=finite,
        help="above 1 every call runs two samples per image; 1 or less: one "
        f"(default: the schedule's, else {DEFAULT_GUIDANCE_SCALE})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    from hgc_learn.schedule import HGCSchedule

    schedule = HGCSchedule.from_pretrained(args.schedule) if args.schedule else None
    architecture = named_architecture(args)
    result = count_macs(
        architecture, schedule, num_steps=args.steps, size=args.size, guidance_scale=args.guidance_scale
    )
    result = {"model": args.arch or args.model, **({"schedule": args.schedule} if schedule else {}), **result}
    print(json.dumps(result, indent=2) if args.json else _table(result))


def count_macs(
    architecture: Architecture,
    schedule: HGCSchedule | None = None,
    *,
    num_steps: int | None = None,
    size: tuple[int, int] | None = None,
    guidance_scale: float | None = None,
) -> dict[str, Any]:
    """MACs of one image, in both conventions; what is None comes from the schedule or a default.

    Raises:
        ValueError: a setting that is out of range, or a schedule for another architecture or number of steps.
    """
    from hgc_learn.plan import compile_plan

    if schedule is not None:
        architecture.check(schedule)
        if num_steps not in (None, schedule.num_steps):
            raise ValueError(f"--steps is {num_steps}, the schedule has {schedule.num_steps} steps: leave --steps out.")
        num_steps = schedule.num_steps
        size = size or (schedule.height, schedule.width)
        guidance_scale = schedule.guidance_scale if guidance_scale is None else guidance_scale
    num_steps = DEFAULT_STEPS if num_steps is None else num_steps
    guidance_scale = DEFAULT_GUIDANCE_SCALE if guidance_scale is None else guidance_scale
    if not 1 <= num_steps <= 4096:
        raise ValueError(f"--steps is {num_steps}; it must be 1 to 4096.")

    height, width = size or architecture.default_size
    graph, costs = architecture.measure((height, width))
    num_halves = graph.num_halves(guidance_scale)
    per_forward: dict[str, dict[str, int]] = {}
    for node in graph.nodes.values():
        entry = per_forward.setdefault(node.model, dict.fromkeys(CONVENTIONS, 0))
        entry["macs"] += costs[node.name].total(False)
        entry["macs_with_attention"] += costs[node.name].total(True)

    result: dict[str, Any] = {
        "num_steps": num_steps,
        "height": height,
        "width": width,
        "guidance_scale": guidance_scale,
        "num_halves": num_halves,
        "num_tokens": architecture.num_tokens,
    }
    full = compile_plan(graph, {}, num_steps)
    plan = None if schedule is None else compile_plan(graph, schedule.sites, num_steps)
    for suffix, attention in (("", False), ("_with_attention", True)):
        macs = full.macs(costs, num_halves=num_halves, attention=attention)
        result[f"macs{suffix}"] = macs
        if plan is not None:
            per_step = plan.macs_per_step(costs, num_halves=num_halves, attention=attention)
            result[f"macs_cached{suffix}"] = sum(per_step)
            result[f"macs_reduction{suffix}"] = 1 - sum(per_step) / macs
            result[f"macs_cached_per_step{suffix}"] = per_step
    if plan is not None:
        result["num_patterns"] = plan.num_patterns()
        result["cache_bytes_float16"] = plan.cache_bytes(costs, num_halves=num_halves, itemsize=2)
    result["macs_per_forward_per_sample"] = per_forward
    result["conventions"] = CONVENTIONS
    return result


def _table(result: dict[str, Any]) -> str:
    guided = "with guidance" if result["num_halves"] == 2 else "without guidance"
    lines = [
        f"{result['model']}: {result['num_steps']} steps, {result['height']}x{result['width']} pixels, "
        f"{guided} ({result['num_halves']} sample(s) per call), {result['num_tokens']} tokens",
        "",
        f"{'MACs':<28}{'attention matmuls':>20}{'attention matmuls':>20}",
        f"{'':<28}{'not counted':>20}{'counted':>20}",
    ]

    def row(name: str, macs: float, macs_with_attention: float) -> str:
        return f"{name:<28}{_engineering(macs):>20}{_engineering(macs_with_attention):>20}"

    for model, macs in result["macs_per_forward_per_sample"].items():
        lines.append(row(f"{model}, one sample", macs["macs"], macs["macs_with_attention"]))
    lines.append(row("one image", result["macs"], result["macs_with_attention"]))
    if "macs_cached" in result:
        lines.append(row("one image, scheduled", result["macs_cached"], result["macs_cached_with_attention"]))
        reduction = f"{result['macs_reduction']:.1%}", f"{result['macs_reduction_with_attention']:.1%}"
        lines.append(f"{'reduction':<28}{reduction[0]:>20}{reduction[1]:>20}")
        patterns = f"{result['num_patterns']} patterns (different sets of what runs at a step)"
        mebibytes = f"{result['cache_bytes_float16'] / 2**20:.1f} MiB"
        lines += ["", f"{patterns}; cache at most {mebibytes} per image in float16", ""]
        pairs = zip(result["macs_cached_per_step"], result["macs_cached_per_step_with_attention"], strict=True)
        lines += [row(f"step {i}", *pair) for i, pair in enumerate(pairs)]
    return "\n".join(lines)


def _engineering(macs: float) -> str:
    return f"{macs / 1e12:.2f}e12" if macs >= 1e12 else f"{macs / 1e9:.2f}e9"
