"""From a trained router to a static schedule file: rounding, polishing, measuring."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from hgc_learn import __version__
from hgc_learn.cli import rebuild
from hgc_learn.evaluation import picture_psnr
from hgc_learn.figures import gate_heatmap
from hgc_learn.fingerprint import ModelFingerprint
from hgc_learn.plan import compile_plan
from hgc_learn.refine import refine
from hgc_learn.schedule import HGCSchedule
from hgc_learn.training import RouterModule


def export(
    ckpt_path: Path,
    output: Path,
    budget: float = 0.5,
    refine_rounds: int = 4,
    refine_batches: int = 4,
) -> Path:
    """Writes `hgc_schedule.json` and a picture of it.

    Args:
        ckpt_path: checkpoint of `train.py fit`.
        output: folder to write to.
        budget: fraction of the full MACs to keep.
        refine_rounds: rounds of local search with real rollouts on training batches; 0 for none.
        refine_batches: training batches it measures on.

    Raises:
        ValueError: the checkpoint cannot be found or read, or the budget cannot be met.
    """
    module, data = load_run(ckpt_path)
    compute = module.router.threshold(budget)
    with Progress() as progress:
        if refine_rounds:
            batches = list(itertools.islice(data.train_dataloader(), refine_batches))
            task = progress.add_task("refining", total=refine_rounds)

            def report(index: int, error: float, swaps: int) -> None:
                progress.update(task, advance=1, description=f"refining, latent error {error:.5f}")

            compute = refine(module, batches, compute, budget, num_rounds=refine_rounds, report=report)
            progress.update(task, completed=refine_rounds)
        task = progress.add_task("measuring on validation samples", total=None)
        fidelity = measure_fidelity(module, data, compute)
    settings = {"ckpt_path": ckpt_path.name, "budget": budget, "refine_rounds": refine_rounds, **module.hparams}
    schedule = make_schedule(module, compute, policy="learned", settings=settings, fidelity=fidelity)
    path = output / "hgc_schedule.json"
    schedule.save(path)
    figure = gate_heatmap(compute, module.router.sites, f"budget {budget:g}")
    figure.savefig(output / "hgc_schedule.png", dpi=150)
    return path


def load_run(ckpt_path: Path) -> tuple[RouterModule, Any]:
    """Rebuilds the module (with the checkpoint's router) and the data module of a training run."""
    if not ckpt_path.is_file():
        raise ValueError(f"{ckpt_path}: no such checkpoint.")
    try:
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError):
        config = None
    if not isinstance(config, str):
        raise ValueError(f"{ckpt_path}: not a checkpoint written by `python train.py fit`.")
    cli = rebuild(config)
    try:
        cli.model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"{ckpt_path}: its router is not one of its own configuration ({error}).") from None
    cli.datamodule.setup("fit")
    cli.model.pipe.to(cli.model.device)
    return cli.model, cli.datamodule


def make_schedule(
    module: RouterModule, compute: Tensor, *, policy: str, settings: dict[str, Any], fidelity: dict[str, Any]
) -> HGCSchedule:
    """A schedule for the module's pipeline and sampling from a hard table [steps, sites]."""
    sampling, pipe = module.sampling, module.pipe
    rows = HGCSchedule.rows(module.router.table(compute))
    plan = compile_plan(module.graph, module.router.table(compute), len(module.timesteps))
    full = compile_plan(module.graph, {}, len(module.timesteps))
    batch_size = 2 if sampling.guidance_scale > 1 else 1
    macs = {}
    for suffix, attention in (("", False), ("_attention", True)):
        macs[f"full{suffix}"] = full.macs(module.costs, batch_size=batch_size, attention=attention)
        macs[f"cached{suffix}"] = plan.macs(module.costs, batch_size=batch_size, attention=attention)
    return HGCSchedule(
        sites=rows,
        timesteps=module.timesteps,
        scheduler=type(pipe.scheduler).__name__,
        guidance_scale=sampling.guidance_scale,
        height=sampling.height,
        width=sampling.width,
        model=ModelFingerprint.of(pipe.unet, getattr(pipe, "controlnet", None)),
        producer={"policy": policy, "version": __version__, "settings": settings},
        macs=macs,
        fidelity=fidelity,
    )


@torch.no_grad()
def measure_fidelity(module: RouterModule, data: Any, compute: Tensor) -> dict[str, Any]:
    """Paired comparison with the uncached pipeline on the validation samples."""
    all_compute = torch.ones_like(compute)
    psnr = []
    for batch in data.val_dataloader():
        batch = module.transfer_batch_to_device(batch, module.device, 0)
        full = module.rollout(batch, all_compute, "pt")
        cached = module.rollout(batch, compute, "pt")
        psnr.append(picture_psnr(cached, full))
    values = torch.cat(psnr)
    return {"psnr_db": round(float(values.mean()), 3), "num_samples": len(values), "split": "validation"}
