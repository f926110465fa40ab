"""The demonstration from end to end: train, export, compare on held-out scenes, show."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from hgc_learn.demo.metrics import scene_metrics
from hgc_learn.demo.scenes import draw_batches
from hgc_learn.evaluation import closeness, side_by_side
from hgc_learn.export.export import KEPT_NAME, check_folder, export
from hgc_learn.export.learning import ALL, Learning
from hgc_learn.figures import picture_grid, save_figure
from hgc_learn.files import save_json
from hgc_learn.sampling import SamplingConfig, default_device
from hgc_learn.schedule import HGCSchedule
from hgc_learn.training.lightning_cli import train

EVALUATION_BATCH_SIZE = 16
NUM_SHOWN = 8


def run_demo(
    output: Path,
    *,
    config: Path,
    budget: float,
    num_scenes: int,
    learning: Learning = ALL,
    resume: bool = False,
    training_arguments: list[str] | None = None,
) -> None:
    """Trains, exports and compares; writes what comes out to `output`/summary.json."""
    check_folder(output, budget)
    console, start = Console(), time.monotonic()
    console.rule("1. training the router")
    ckpt_path = output / "checkpoints" / "last.ckpt"
    arguments = ["fit", "--config", str(config), "--checkpoint.dirpath", str(ckpt_path.parent)]
    arguments += [f"--model.budgets=[{budget}]", "--trainer.default_root_dir", str(output), *(training_arguments or [])]
    resumed = resume and ckpt_path.is_file()
    if resumed:
        arguments += ["--ckpt_path", str(ckpt_path)]
    elif ckpt_path.is_file():
        console.print(f"{ckpt_path} of an earlier training will be replaced; --resume goes on with it instead.")
    if not resumed:
        (output / KEPT_NAME).unlink(missing_ok=True)  # of an export of that training
    cli = train(arguments)

    console.rule(f"2. exporting the schedule at a budget of {budget:g}")
    path = export(ckpt_path, output, budget, learning)

    console.rule(f"3. full against cached on {num_scenes} held-out scenes")
    model = cli.model.hparams
    pipe = cli.model.pipe.to(default_device())
    summary, pictures = judge(path, pipe, SamplingConfig(**model["sampling"]), num_scenes)
    grid = picture_grid(
        {
            "control": pictures["control"],
            "full": pictures["full"],
            f"cached\n{summary['macs_reduction']:.0%} fewer MACs": pictures["cached"],
        },
        pictures["text"],
    )
    save_figure(grid, output / "comparison.png", dpi=150)
    summary["minutes"] = None if resumed else round((time.monotonic() - start) / 60, 2)  # of the whole
    save_json(output / "summary.json", summary)
    console.print(summary_table(summary))
    for name in ("hgc_schedule.json", "comparison.png", "summary.json"):
        console.print(f"wrote {output / name}")


def judge(path: Path, pipe: Any, sampling: SamplingConfig, num_scenes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compares a schedule with the uncached teacher on held-out scenes; figures and pictures."""
    schedule = HGCSchedule.load(path)
    batches = draw_batches("test", num_scenes, EVALUATION_BATCH_SIZE)
    full, cached, speedup = side_by_side(pipe, sampling, schedule, track(batches, description="generating"))
    per_sample = closeness(cached, full)
    figures = {name: float(values.mean()) for name, values in per_sample.items()}
    obedience = {"full": _obedience(full.pictures, batches), "cached": _obedience(cached.pictures, batches)}
    macs = schedule.macs
    return {
        "budget": schedule.producer["settings"]["budget"],
        "macs_full": macs["full"],
        "macs_cached": macs["cached"],
        "macs_reduction": 1 - macs["cached"] / macs["full"],
        "macs_full_attention": macs["full_attention"],
        "macs_cached_attention": macs["cached_attention"],
        "num_samples": len(full),
        **figures,
        "psnr_ci95_db": 1.96 * float(per_sample["psnr_db"].std()) / len(full) ** 0.5,
        "wall_clock_speedup": speedup,
        **{f"{name}_{way}": value for way, values in obedience.items() for name, value in values.items()},
        **{
            f"{name}_relative_loss": _loss(value, obedience["full"][name])
            for name, value in obedience["cached"].items()
        },
        "num_threads": torch.get_num_threads(),
    }, {
        "text": batches[0]["text"][:NUM_SHOWN],
        "control": batches[0]["conditioning_image"][:NUM_SHOWN],
        "full": full.pictures[:NUM_SHOWN],
        "cached": cached.pictures[:NUM_SHOWN],
    }


def _obedience(pictures: Tensor, batches: Sequence[dict[str, Any]]) -> dict[str, float]:
    """To control and caption."""
    metrics = scene_metrics()
    for part, batch in zip(pictures.split(EVALUATION_BATCH_SIZE), batches, strict=True):
        metrics.update(part, batch["label_map"], batch["object_colors"])
    return {name: float(value) for name, value in metrics.compute().items()}


def _loss(cached: float, full: float) -> float:
    """Relative; nothing of nothing is lost."""
    return 1 - cached / full if full else 0.0


def summary_table(summary: dict[str, Any]) -> Table:
    """The figures as people read them."""
    table = Table(title=f"Full against cached, {summary['num_samples']} held-out scenes")
    for heading in ("", "full", "cached", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    full, cached = summary["macs_full"] / 1e9, summary["macs_cached"] / 1e9
    table.add_row("GMACs per picture", f"{full:.2f}", f"{cached:.2f}", f"{-summary['macs_reduction']:+.1%}")
    for name, key in (("control mIoU", "control_miou"), ("colour accuracy", "color_accuracy")):
        loss = summary[f"{key}_relative_loss"]
        table.add_row(name, f"{summary[f'{key}_full']:.4f}", f"{summary[f'{key}_cached']:.4f}", f"{-loss:+.2%}")
    table.add_row("PSNR to full", "", f"{summary['psnr_db']:.2f} dB", f"± {summary['psnr_ci95_db']:.2f}")
    table.add_row("SSIM to full", "", f"{summary['ssim']:.4f}", "")
    table.add_row("denoising speed", "1.00x", f"{summary['wall_clock_speedup']:.2f}x", "")
    return table
