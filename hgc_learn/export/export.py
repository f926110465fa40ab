"""From a trained router to a static schedule file: what is learned for its budget alone, and measuring."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.progress import Progress
from torch.utils.data import default_collate

from hgc_learn.evaluation import picture_psnr
from hgc_learn.export import fills, reorder, specialise
from hgc_learn.export.choose import Weights, choose, read_routers
from hgc_learn.export.kept import NOWHERE, Kept
from hgc_learn.export.learning import ALL, NOTHING, Learning, OnUpdate, hold_out
from hgc_learn.figures import gate_heatmap, save_figure
from hgc_learn.sampling import default_device
from hgc_learn.schedule import HGCSchedule, check_output
from hgc_learn.setting import Draft, Setting
from hgc_learn.sharing import FILE_NAME
from hgc_learn.strict import ScheduleError
from hgc_learn.training.gates import Gates
from hgc_learn.training.lightning_cli import rebuild
from hgc_learn.training.module import RouterModule
from hgc_learn.training.saved import read_checkpoint

KEPT_NAME = "hgc_export.ckpt"


def export(
    ckpt_path: Path,
    output: Path,
    budget: float = 0.5,
    learning: Learning = ALL,
    max_patterns: int | None = None,
    other_ckpt_paths: Sequence[Path] = (),
) -> Path:
    """Writes `hgc_schedule.json` and a picture of it. What has been learned meanwhile is kept beside them: called again
    with the same, it goes on after an interruption.

    Args:
        ckpt_path: checkpoint of `train.py fit`.
        output: folder to write to.
        budget: fraction of the full MACs to keep.
        learning: what is learned for this budget alone.
        max_patterns: how many different steps the schedule may have, for `torch.compile` makes one graph for each.
        other_ckpt_paths: of other trainings of the same, with other seeds: the best of all at this budget goes on.

    Raises:
        ValueError: a checkpoint cannot be found or read, or is of a training of something else; the budget cannot be
            met; or the folder holds the schedule of another budget or what another export has learned so far.
        OSError: the folder cannot be made.
    """
    check_folder(output, budget)
    module, data = load_run(ckpt_path)
    module.router.check_budget(budget)
    check_output(output / FILE_NAME)  # rather now than after all has been learned
    _check_teacher(module, data)
    if not module.objective.is_specialised:
        learning = replace(NOTHING, learning_samples=learning.learning_samples)
    settings = {"budget": budget, **asdict(learning), "max_patterns": max_patterns}
    ckpt_paths = [ckpt_path, *other_ckpt_paths]
    routers = read_routers(module, ckpt_paths)
    kept = Kept.of(output / KEPT_NAME, ckpt_paths, settings)
    path = output / FILE_NAME
    with deciding(module, data, budget, routers, learning, kept, max_patterns=max_patterns) as decided:
        gates, draft, best, progress = decided
        progress.add_task("measuring on validation samples", total=None)
        fidelity = measure_fidelity(module, data, draft)
        if not fidelity:
            progress.console.print("There are no validation samples (data.num_val is 0): nothing has been measured.")
        settings = {"ckpt_path": best.name, "num_trainings": len(routers), **settings, **module.hparams}
        schedule = module.setting.schedule(draft, policy=module.objective.policy, settings=settings, fidelity=fidelity)
        check_folder(output, budget)  # hours may have passed
        schedule.save(path)
    dead = module.router.dead(gates.compute)
    figure = gate_heatmap(gates.compute, module.router.sites, f"budget {budget:g}", dead)
    save_figure(figure, output / "hgc_schedule.png", dpi=150)
    return path


class Bars:
    """One for each part of an export that learns."""

    def __init__(self, progress: Progress, learning: Learning):
        self.progress = progress
        parts = {
            "reorder": ("reordering steps", learning.reorder_trials),
            "specialise": ("specialising the router", learning.specialise_updates),
            "fill": ("learning to fill in", learning.fill_updates),
        }
        self.words = {part: words for part, (words, _) in parts.items()}
        self.tasks = {part: progress.add_task(words, total=n, visible=n > 0) for part, (words, n) in parts.items()}

    def on_update(self, part: str, update: int, log_error: float) -> None:
        self.finish(before=part)
        description = f"{self.words[part]}, error {math.exp(log_error):.2e}"
        self.progress.update(self.tasks[part], completed=update + 1, description=description)

    def finish(self, before: str = "") -> None:
        """Shows as done what may have ended early: no better order of steps is left, nothing is to be filled in."""
        for part, task in self.tasks.items():
            if part == before:
                return
            self.progress.update(task, completed=self.progress.tasks[task].total)


def check_folder(output: Path, budget: float) -> None:
    """Raises ValueError where an export at a budget would replace the schedule of another one."""
    path = output / FILE_NAME
    with suppress(ScheduleError):  # nothing that anyone could load
        other = HGCSchedule.load(path).settings.get("budget", budget)
        if other != budget:
            raise ValueError(
                f"{path} is the schedule of another budget, {other}. Export every budget to a folder of its own, or "
                "delete that one."
            )


@contextmanager
def deciding(
    module: RouterModule,
    data: Any,
    budget: float,
    routers: Mapping[Path, Weights],
    learning: Learning,
    kept: Kept,
    *,
    max_patterns: int | None = None,
) -> Iterator[tuple[Gates, Draft, Path, Progress]]:
    """`decide` with its bars, for the best of these routers at the budget, by its checkpoint's path, which comes with
    it and which the module is given. Goes on from what is `kept`; that is removed when the block has ended well.
    """
    with Progress() as progress, kept.interrupted():
        best = _choose(module, data, budget, routers, learning, max_patterns, progress)
        bars = Bars(progress, learning)
        gates, draft = decide(
            module, data, budget, learning, max_patterns=max_patterns, kept=kept, on_update=bars.on_update
        )
        bars.finish()
        yield gates, draft, best, progress
    kept.remove()


def _choose(
    module: RouterModule,
    data: Any,
    budget: float,
    routers: Mapping[Path, Weights],
    learning: Learning,
    max_patterns: int | None,
    progress: Progress,
) -> Path:
    """Gives the module the best of these routers, by the samples that judge whatever an export learns; says which it
    is, and returns its path."""
    if len(routers) == 1:  # the module's own
        return next(iter(routers))
    _, judges = hold_out(in_batches(training_samples(data, learning.learning_samples), reorder.BATCH_SIZE))
    task = progress.add_task("comparing trainings", total=len(judges) * len(routers))
    errors = choose(module, budget, routers, judges, max_patterns, on_batch=lambda: progress.advance(task))
    best = min(errors, key=errors.__getitem__)
    for path, error in errors.items():
        words = f"{path}: error {math.exp(error):.2e}{', goes on' if path == best else ''}"
        progress.console.print(words, markup=False, highlight=False, soft_wrap=True)
    return best


def decide(
    module: RouterModule,
    data: Any,
    budget: float,
    learning: Learning = ALL,
    *,
    max_patterns: int | None = None,
    kept: Kept = NOWHERE,
    on_update: OnUpdate = lambda *_: None,
) -> tuple[Gates, Draft]:
    """The gates of a trained router at a budget, and the draft that they make with fill-ins learned; all learns from
    the first samples of the training's own data, and goes on from what is `kept`. The router itself stays as it is.

    Raises:
        BudgetError: it cannot be met.
    """
    samples = training_samples(data, learning.learning_samples) if learning.is_any else []
    trained = {name: value.clone() for name, value in module.router.state_dict().items()}
    try:
        reorder.reorder(
            module,
            budget,
            in_batches(samples, reorder.BATCH_SIZE),
            learning.reorder_trials,
            max_patterns=max_patterns,
            kept=kept,
            on_update=on_update,
        )
        gates = specialise.specialise(
            module,
            budget,
            in_batches(samples, specialise.BATCH_SIZE),
            learning.specialise_updates,
            max_patterns=max_patterns,
            kept=kept,
            on_update=on_update,
        )
    finally:
        module.router.load_state_dict(trained)
    gates = replace(gates, compute=gates.compute | module.router.dead(gates.compute))  # not in the file's rows
    return gates, fills.learn_fills(
        module,
        gates,
        in_batches(samples, fills.BATCH_SIZE),
        learning.fill_updates,
        at_once=data.train_dataloader().batch_size or 1,  # where memory is short, no more than the training needed
        kept=kept,
        on_update=on_update,
    )


def training_samples(data: Any, num_samples: int) -> list[dict[str, Any]]:
    """The first samples of the training's own data, all if there are fewer. They stay on the CPU: pictures of all would
    take gigabytes of a GPU."""
    dataset = data.train_dataloader().dataset
    return [dataset[i] for i in range(min(num_samples, len(dataset)))]


def in_batches(samples: Sequence[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    return [default_collate(list(samples[i : i + batch_size])) for i in range(0, len(samples), batch_size)]


def load_trained(setting: Setting, ckpt_path: str, policy: str) -> tuple[RouterModule, Any]:
    """A training run for a policy to write from, on the setting's own pipeline; as for `load_run`.

    Raises:
        ValueError: there is no such checkpoint, or it belongs to another policy, sampler or model.
    """
    if not ckpt_path:
        raise ValueError(f"{policy} needs ckpt_path, a checkpoint of train.py fit (see configs/compare/train).")
    module, data = setting.once(("load_trained", ckpt_path), lambda: load_run(Path(ckpt_path)))
    if module.objective.policy != policy:
        raise ValueError(f"{ckpt_path}: trained for the policy {module.objective.policy}, not for {policy}.")
    if (module.sampling, module.timesteps) != (setting.sampling, setting.timesteps):
        raise ValueError(f"{ckpt_path}: trained for {module.sampling}; here it is {setting.sampling}.")
    if setting.pipe is not None and module.pipe is not setting.pipe:
        if difference := setting.fingerprint.difference(module.setting.fingerprint):
            raise ValueError(f"{ckpt_path}: trained for another model ({': '.join(difference)}).")
        module.to(setting.pipe.device)
        module.use_pipeline(setting.pipe)
    return module, data


def load_run(ckpt_path: Path) -> tuple[RouterModule, Any]:
    """Rebuilds the module of a training run (with the checkpoint's router), on the default device, and its data."""
    checkpoint = read_checkpoint(ckpt_path)
    try:
        cli = rebuild(checkpoint["config"])
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{ckpt_path}: its configuration is not one of this version of hgc_learn ({reason}). Export it with the "
            "version that it was trained with, or train anew."
        ) from None
    cli.model.check_model(checkpoint, str(ckpt_path))
    try:
        cli.model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"{ckpt_path}: its router is not one of its own configuration ({error}).") from None
    cli.model.router.temperature = checkpoint.get("temperature", cli.model.router.temperature)
    cli.datamodule.setup("fit")
    cli.model.to(device := default_device())
    cli.model.pipe.to(device)
    return cli.model, cli.datamodule


def _validation_batches(module: RouterModule, data: Any) -> Iterator[dict[str, Any]]:
    """On the module's device; none where the data have none."""
    loader = data.val_dataloader() if is_overridden("val_dataloader", data) else None
    for batch in [] if loader is None else loader:
        yield module.transfer_batch_to_device(batch, module.device, 0)


@torch.no_grad()
def _check_teacher(module: RouterModule, data: Any) -> None:
    """Raises ValueError where the uncached pipeline's own pictures are not finite."""
    for batch in itertools.islice(_validation_batches(module, data), 1):
        if not module.rollout({name: values[:1] for name, values in batch.items()}, None, "pt").isfinite().all():
            raise ValueError(
                f"The uncached pipeline's own picture comes out as NaN or infinity in {module.hparams['dtype']}: its "
                "VAE may overflow. Train with --model.dtype=bfloat16 or float32."
            )


@torch.no_grad()
def measure_fidelity(module: RouterModule, data: Any, draft: Draft) -> dict[str, Any]:
    """Paired comparison with the uncached pipeline on the validation samples; empty if there are none.

    Raises:
        ValueError: pictures that are not finite.
    """
    psnr = []
    for batch in _validation_batches(module, data):
        full = module.rollout(batch, None, "pt")
        cached = module.rollout(batch, draft, "pt")
        psnr.append(picture_psnr(cached, full))
    if not psnr:
        return {}
    values = torch.cat(psnr)
    if not values.isfinite().all():
        raise ValueError(
            f"With this schedule {int((~values.isfinite()).sum())} of {len(values)} validation samples come out as NaN "
            "or infinity. Export with a larger --budget, or train with --model.dtype=float32."
        )
    return {"psnr_db": round(float(values.mean()), 3), "num_samples": len(values), "split": "validation"}
