"""From a trained router to a static schedule file: rounding, refining, measuring."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from rich.progress import Progress
from torch.utils.data import DataLoader

from hgc_learn.cli import rebuild
from hgc_learn.evaluation import picture_psnr
from hgc_learn.figures import gate_heatmap
from hgc_learn.fills import BATCH_SIZE, tune_fills
from hgc_learn.fingerprint import ModelFingerprint
from hgc_learn.hard import HardSchedule
from hgc_learn.refine import Refiner
from hgc_learn.setting import Draft, Setting
from hgc_learn.training import RouterModule

Report = Callable[[int, float], None]
"""(round, squared error of the latents as a geometric mean)."""


def export(
    ckpt_path: Path,
    output: Path,
    budget: float = 0.5,
    refine_rounds: int = 4,
    refine_samples: int = 64,
    refine_batch_size: int = 8,
    tune_updates: int = 128,
) -> Path:
    """Writes `hgc_schedule.json` and a picture of it.

    Args:
        ckpt_path: checkpoint of `train.py fit`.
        output: folder to write to.
        budget: fraction of the full MACs to keep.
        refine_rounds: rounds of local search with real rollouts on training batches; 0 for none. It is part of
            `Rollout` only, other objectives are exported as they are.
        refine_samples: training samples that the rounds take in turns.
        refine_batch_size: how many of them run at once.
        tune_updates: steps of learning, on the same samples, how the schedule fills in what it skips; 0 for none. It is
            part of `Rollout` only too.

    Raises:
        ValueError: the checkpoint cannot be found or read, the budget cannot be met, or a negative number.
    """
    check_counts(refine_rounds, tune_updates)
    module, data = load_run(ckpt_path)
    rounds, updates = (refine_rounds, tune_updates) if module.objective.is_refined else (0, 0)
    with Progress() as progress:
        task = progress.add_task("refining", total=rounds, visible=rounds > 0)

        def report(index: int, error: float) -> None:
            progress.update(task, advance=1, description=f"refining, latent error {error:.5f}")

        batches = refining_batches(module, data, refine_samples, refine_batch_size) if rounds else []
        hard = decide(module, budget, batches, num_rounds=rounds, report=report)
        progress.update(task, completed=rounds)
        task = progress.add_task("learning to fill in", total=updates, visible=updates > 0)

        def report_update(index: int, log_error: float) -> None:
            progress.update(task, advance=1, description=f"learning to fill in, latent error {math.exp(log_error):.5f}")

        batches = refining_batches(module, data, refine_samples, BATCH_SIZE) if updates else []
        draft = tune_fills(module, hard, batches, updates, report=report_update)
        task = progress.add_task("measuring on validation samples", total=None)
        fidelity = measure_fidelity(module, data, draft)
    settings = {
        "ckpt_path": ckpt_path.name,
        "budget": budget,
        "refine_rounds": rounds,
        "tune_updates": updates,
        **module.hparams,
    }
    schedule = module.setting.schedule(draft, policy=module.objective.policy, settings=settings, fidelity=fidelity)
    path = output / "hgc_schedule.json"
    schedule.save(path)
    figure = gate_heatmap(hard.compute, module.router.sites, f"budget {budget:g}")
    figure.savefig(output / "hgc_schedule.png", dpi=150)
    return path


def check_counts(refine_rounds: int, tune_updates: int) -> None:
    """Raises ValueError where a number of rounds or updates is negative."""
    for name, number in (("refine_rounds", refine_rounds), ("tune_updates", tune_updates)):
        if number < 0:
            raise ValueError(f"{name} is {number}; it must be 0 (none) or more.")


def refining_batches(module: RouterModule, data: Any, num_samples: int, batch_size: int) -> list[dict[str, Any]]:
    """The first samples of the training's own data, on the module's device.

    Raises:
        ValueError: a number below 1.
    """
    for name, number in (("refine_samples", num_samples), ("refine_batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1. For no refining set refine_rounds to 0.")
    loader = DataLoader(data.train_dataloader().dataset, batch_size)
    batches = itertools.islice(loader, math.ceil(num_samples / batch_size))
    return [module.transfer_batch_to_device(batch, module.device, 0) for batch in batches]


def decide(
    module: RouterModule,
    budget: float,
    batches: Sequence[dict[str, Any]] = (),
    *,
    num_rounds: int = 0,
    report: Report = lambda *_: None,
) -> HardSchedule:
    """The hard schedule of a trained router at a budget; with rounds of refining (see `refine`) on `batches`."""
    schedule = module.hard_schedule(budget)
    if not num_rounds:
        return schedule
    module.generator = torch.Generator(module.device)  # whenever it is asked for, the same schedule
    refiner = Refiner(module, batches, schedule, budget)
    for index in range(num_rounds):
        refiner.round()
        report(index, math.exp(refiner.log_error))
    best = refiner.schedule
    return replace(best, compute=best.compute | module.router.dead(best.compute))  # not in the file's rows


def load_trained(setting: Setting, ckpt_path: str, policy: str) -> tuple[RouterModule, Any]:
    """A training run for a policy to write from, on the setting's own pipeline; as for `load_run`.

    Raises:
        ValueError: there is no such checkpoint, or it belongs to another policy, sampler or model.
    """
    if not ckpt_path:
        raise ValueError(f"{policy} needs ckpt_path, a checkpoint of train.py fit (see configs/compare/train).")
    key = ("load_trained", ckpt_path)
    if key not in setting.memo:
        setting.memo[key] = load_run(Path(ckpt_path))
    module, data = setting.memo[key]
    if module.objective.policy != policy:
        raise ValueError(f"{ckpt_path}: trained for the policy {module.objective.policy}, not for {policy}.")
    if (module.sampling, module.timesteps) != (setting.sampling, setting.timesteps):
        raise ValueError(f"{ckpt_path}: trained for {module.sampling}; here it is {setting.sampling}.")
    if setting.pipe is not None and module.pipe is not setting.pipe:
        fingerprints = [
            ModelFingerprint.of(p.unet, getattr(p, "controlnet", None)) for p in (setting.pipe, module.pipe)
        ]
        if difference := fingerprints[0].difference(fingerprints[1]):
            raise ValueError(f"{ckpt_path}: trained for another model ({': '.join(difference)}).")
        module.to(setting.pipe.device)
        module.use_pipeline(setting.pipe)
    return module, data


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
    try:
        cli = rebuild(config)
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{ckpt_path}: its configuration is not one of this version of hgc_learn ({reason}). Export it with the "
            "version that it was trained with, or train anew."
        ) from None
    try:
        cli.model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"{ckpt_path}: its router is not one of its own configuration ({error}).") from None
    cli.datamodule.setup("fit")
    cli.model.pipe.to(cli.model.device)
    return cli.model, cli.datamodule


@torch.no_grad()
def measure_fidelity(module: RouterModule, data: Any, draft: Draft) -> dict[str, Any]:
    """Paired comparison with the uncached pipeline on the validation samples."""
    psnr = []
    for batch in data.val_dataloader():
        batch = module.transfer_batch_to_device(batch, module.device, 0)
        full = module.rollout(batch, None, "pt")
        cached = module.rollout(batch, draft, "pt")
        psnr.append(picture_psnr(cached, full))
    values = torch.cat(psnr)
    return {"psnr_db": round(float(values.mean()), 3), "num_samples": len(values), "split": "validation"}
