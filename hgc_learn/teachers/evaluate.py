"""Measure the demonstration teacher on held-out scenes: `python -m hgc_learn.teachers.evaluate`.

Writes `figures.json` and `grid.png` beside the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionControlNetPipeline
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hgc_learn.__main__ import guarded
from hgc_learn.demo import TEACHER_DIR
from hgc_learn.demo.metrics import scene_metrics
from hgc_learn.demo.scenes import IMAGE_SIZE, SceneDataset, draw_batches
from hgc_learn.evaluation import picture_psnr
from hgc_learn.figures import save_figure
from hgc_learn.files import save_json
from hgc_learn.sampling import SamplingConfig, generate
from hgc_learn.teachers.pipeline import GUIDANCE_SCALE

BATCH_SIZE = 32
NUM_ROWS = 8  # of the grid


@torch.inference_mode()
def evaluate_teacher(
    pipeline: StableDiffusionControlNetPipeline,
    *,
    split: str = "test",
    num_scenes: int = 512,
    guidance_scale: float = GUIDANCE_SCALE,
    num_steps: tuple[int, ...] = (20, 10),
) -> dict[str, Any]:
    """Figures of the teacher on the first `num_scenes` scenes of a split.

    The noise of a picture comes from the seed of its scene, so pictures of different step counts are paired.

    Args:
        pipeline: the teacher.
        split: "validation" or "test".
        num_scenes: number of scenes.
        guidance_scale: classifier-free guidance.
        num_steps: sampler steps; the first is the reference of the paired PSNR of the others.

    Returns:
        Control mIoU and colour accuracy (in [0, 1]) of generated, drawn and autoencoded pictures, and paired PSNR in
        dB, the mean over pictures.
    """
    dataset = SceneDataset(split, num_scenes)
    metrics = {name: scene_metrics() for name in ("drawn", "vae", *(f"steps_{steps}" for steps in num_steps))}
    psnrs: dict[str, list[Tensor]] = {}
    for batch in tqdm(DataLoader(dataset, BATCH_SIZE), desc="generating", unit="batch"):
        drawn, truth = batch["image"] / 2 + 0.5, (batch["label_map"], batch["object_colors"])
        latents = pipeline.vae.encode(batch["image"].to(pipeline.device, pipeline.dtype)).latent_dist.mean
        decoded = (pipeline.vae.decode(latents).sample.float().cpu() / 2 + 0.5).clamp(0, 1)
        metrics["drawn"].update(drawn, *truth)
        metrics["vae"].update(decoded, *truth)
        psnrs.setdefault("vae_to_drawn", []).append(picture_psnr(decoded, drawn))
        reference = None
        for steps in num_steps:
            sampling = SamplingConfig(steps, guidance_scale, IMAGE_SIZE, IMAGE_SIZE)
            pictures = generate(pipeline, sampling, batch, output_type="pt").float().cpu()
            metrics[f"steps_{steps}"].update(pictures, *truth)
            if reference is None:
                reference = pictures
            else:
                psnrs.setdefault(f"steps_{steps}_to_{num_steps[0]}", []).append(picture_psnr(pictures, reference))
    scores = {
        kind: {name: round(value.item(), 4) for name, value in judged.compute().items()}
        for kind, judged in metrics.items()
    }
    return {
        "split": split,
        "num_scenes": num_scenes,
        "scheduler": type(pipeline.scheduler).__name__,
        "guidance_scale": guidance_scale,
        "scores": scores,
        "paired_psnr_db": {name: round(torch.cat(values).mean().item(), 2) for name, values in psnrs.items()},
    }


def save_grid(
    pipeline: StableDiffusionControlNetPipeline,
    path: Path,
    *,
    guidance_scale: float = GUIDANCE_SCALE,
) -> None:
    """Save a picture of test scenes: control, 20 steps, 10 steps, the drawn picture; two scenes per row."""
    from matplotlib import pyplot as plt

    (batch,) = draw_batches("test", 2 * NUM_ROWS, 2 * NUM_ROWS)
    columns = {"control": batch["conditioning_image"]}
    for steps in (20, 10):
        sampling = SamplingConfig(steps, guidance_scale, IMAGE_SIZE, IMAGE_SIZE)
        columns[f"{steps} steps"] = generate(pipeline, sampling, batch, output_type="pt")
    columns["drawn"] = batch["image"] / 2 + 0.5
    figure, axes = plt.subplots(NUM_ROWS, 8, figsize=(12, 1.68 * NUM_ROWS), layout="constrained")
    for index, caption in enumerate(batch["text"]):
        row, side = divmod(index, 2)
        for column, (name, pictures) in enumerate(columns.items()):
            axis = axes[row, 4 * side + column]
            axis.imshow(pictures[index].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_axis_off()
            axis.text(0.5, -0.02, name, transform=axis.transAxes, ha="center", va="top", fontsize=6, color="gray")
        axes[row, 4 * side].set_title(caption, loc="left", fontsize=8)
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=TEACHER_DIR, help="pipeline folder")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--num_scenes", type=int, default=512)
    parser.add_argument("--guidance_scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--output", type=Path, help="folder for figures.json and grid.png; default: beside the weights")
    args = parser.parse_args(argv)
    if args.num_scenes < 1:
        parser.error(f"--num_scenes is {args.num_scenes}; it must be at least 1.")
    if not args.pipeline.is_dir():
        parser.error(f"--pipeline is {args.pipeline}; there is no such folder.")
    output = args.output or args.pipeline

    pipeline = StableDiffusionControlNetPipeline.from_pretrained(args.pipeline)
    output.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    figures = evaluate_teacher(
        pipeline, split=args.split, num_scenes=args.num_scenes, guidance_scale=args.guidance_scale
    )
    command = f"python -m hgc_learn.teachers.evaluate --split {args.split} --num_scenes {args.num_scenes}"
    if args.pipeline != TEACHER_DIR:
        command += f" --pipeline {args.pipeline}"
    figures = {"command": f"{command} --guidance_scale {args.guidance_scale:g}", **figures}
    print(json.dumps(figures, indent=1))
    save_json(output / "figures.json", figures)
    save_grid(pipeline, output / "grid.png", guidance_scale=args.guidance_scale)


if __name__ == "__main__":
    sys.exit(guarded(main))
