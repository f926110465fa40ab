"""What each part of the learned recipe contributes: `python benchmarks/ablation.py`.

Every row leaves one part out, of the training or of what follows it, all else equal, and is judged by the final
latents' error on scenes that nothing else uses: -10 log10 of the relative squared error, in dB, the mean over scenes;
differences to the whole recipe are paired. Trainings are shared by rows and kept under `runs/ablation`; rows that are
in the output already are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils.data import DataLoader

from hgc_learn.cli import train
from hgc_learn.comparison.samples import save_json
from hgc_learn.comparison.statistics import mean_interval
from hgc_learn.demo.scenes import SceneDataset
from hgc_learn.effects import Effects, ProbedForwards
from hgc_learn.export import load_run, refining_batches
from hgc_learn.fills import BATCH_SIZE, tune_fills
from hgc_learn.hard import HardSchedule
from hgc_learn.quadratic import QuadraticModel
from hgc_learn.refine import Refiner
from hgc_learn.setting import Draft
from hgc_learn.training import RouterModule

NUM_ROUNDS, NUM_UPDATES = 4, 128  # the defaults of export.py
OFFSET = 2000  # of the judging scenes in the validation split


@dataclass(frozen=True)
class Training:
    """Arguments of train.py besides the configuration's, and what is changed in the code while it runs."""

    arguments: tuple[str, ...] = ()
    change: Callable[[], AbstractContextManager[Any]] = nullcontext


def holding() -> AbstractContextManager[Any]:
    return patch.object(Effects, "of_weights", lambda self: torch.zeros(self.weights.shape[-3:], dtype=torch.float64))


def no_refreshes() -> AbstractContextManager[Any]:
    return patch.object(ProbedForwards, "_add_refreshes", lambda self, flips, refreshes: None)


TRAININGS = {
    "recipe": Training(),
    "warm start only": Training(("--trainer.max_steps=1", "--model.objective.learning_rate=0")),
    "no warm start": Training(("--model.objective.num_warm_start_batches=0",)),
    "first order only": Training(("--model.objective.num_directions=0",)),
    "holding": Training(change=holding),
    "no refreshes": Training(change=no_refreshes),
}


class WeightsOnly(Refiner):
    """Never swaps gates."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs, max_swaps=0)


class SwapsOnly(Refiner):
    """Never moves weights."""

    def round(self) -> None:
        with patch.object(QuadraticModel, "moved", lambda self, damping: self.schedule):
            super().round()


class NoWaysUp(Refiner):
    """Leaves gates that nothing reads as they are."""

    def _with_ways_up(self, schedule: HardSchedule) -> HardSchedule:
        return schedule


class NoOtherJudges(Refiner):
    """Judges on the samples that effects were measured on."""

    def _batches(self, ahead: int) -> list[dict[str, Any]]:
        return super()._batches(0)


class NoRefreshes(Refiner):
    """Does not see what flips of gates do to the sites behind them."""

    def round(self) -> None:
        with no_refreshes():
            super().round()


class FirstOrder(Refiner):
    """Knows effects along the error only."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs, num_directions=0)


ROWS: dict[str, tuple[str, type[Refiner] | None]] = {
    "the whole recipe": ("recipe", Refiner),
    "no refining": ("recipe", None),
    "no learned fill-ins": ("recipe", Refiner),
    "neither": ("recipe", None),
    "training: none, only its warm start": ("warm start only", Refiner),
    "training: no warm start": ("no warm start", Refiner),
    "training: first-order effects only": ("first order only", Refiner),
    "held values, no weights anywhere": ("holding", SwapsOnly),
    "effects: not of sites behind a gate": ("no refreshes", Refiner),
    "refining: weights only": ("recipe", WeightsOnly),
    "refining: swaps only": ("recipe", SwapsOnly),
    "refining: first-order effects only": ("recipe", FirstOrder),
    "refining: effects not of sites behind a gate": ("recipe", NoRefreshes),
    "refining: no ways up": ("recipe", NoWaysUp),
    "refining: judged where it was measured": ("recipe", NoOtherJudges),
    "training: for this budget alone": ("budget", Refiner),
}
UNTUNED = ("no learned fill-ins", "neither", "held values, no weights anywhere")


def trained(name: str, sampler: str, budget: float) -> tuple[RouterModule, Any]:
    """The run of a training, made if it is missing."""
    training, label = TRAININGS.get(name), name
    if training is None:
        training, label = Training((f"--model.budgets=[{budget}]",)), f"{budget:g} alone"
    folder = Path("runs/ablation") / sampler / label.replace(" ", "-")
    ckpt_path = folder / "last.ckpt"
    if not (folder / "done").is_file():
        config = f"--config=configs/compare/train/learned-{sampler}.yaml"
        paths = f"--trainer.default_root_dir={folder}", f"--checkpoint.dirpath={folder}"
        with training.change():
            cli = train(["fit", config, *paths, "--trainer.limit_val_batches=0", *training.arguments])
        if cli.trainer.interrupted:
            raise KeyboardInterrupt
        (folder / "done").touch()
    with training.change():
        return load_run(ckpt_path)


def relative_errors(module: RouterModule, draft: Draft, scenes: list[dict[str, Any]]) -> list[float]:
    """In dB, per scene."""
    values = []
    for batch in scenes:
        target = module.teacher_latents(batch)
        error = module.rollout_errors(batch, draft, target) / target.square().flatten(1).mean(1)
        values += (-10 * error.clamp_min(1e-30).log10()).tolist()
    return values


def run(name: str, sampler: str, budget: float, scenes: list[dict[str, Any]]) -> dict[str, Any]:
    """One row."""
    training, refiner_class = ROWS[name]
    module, data = trained(training, sampler, budget)
    change = TRAININGS[training].change if training in TRAININGS else nullcontext
    start = time.monotonic()
    schedule, rounds = module.hard_schedule(budget), []
    if refiner_class:
        module.generator = torch.Generator()
        refiner = refiner_class(module, refining_batches(module, data, 64, 8), schedule, budget)
        for _ in range(NUM_ROUNDS):
            with change():
                refiner.round()
            rounds.append(round(-10 / np.log(10) * refiner.log_error, 2))
        schedule = refiner.schedule
    schedule = replace(schedule, compute=schedule.compute | module.router.dead(schedule.compute))
    draft = module.draft(schedule)
    if name not in UNTUNED:
        draft = tune_fills(module, schedule, refining_batches(module, data, 64, BATCH_SIZE), NUM_UPDATES)
    seconds = time.monotonic() - start
    values = relative_errors(module, draft, scenes)
    kept = module.router.kept(schedule.compute)
    return {
        "row": name,
        "sampler": sampler,
        "budget": budget,
        "kept_macs": round(kept, 4),
        "latent_db": round(float(np.mean(values)), 3),
        "seconds": round(seconds),
        "rounds": rounds,
        "scenes": [round(value, 3) for value in values],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Differences to the whole recipe, in Markdown."""
    cells = {(row["row"], row["sampler"], row["budget"]): row for row in rows}
    settings = sorted({key[1:] for key in cells}, key=lambda key: (key[0], -key[1]))
    lines = ["| | " + " | ".join(f"{sampler}, {budget:.0%}" for sampler, budget in settings) + " |"]
    lines.append("|---" * (len(settings) + 1) + "|")
    for name in ROWS:
        entries = []
        for setting in settings:
            cell, whole = cells.get((name, *setting)), cells.get(("the whole recipe", *setting))
            if cell is None or whole is None:
                entries.append("-")
            elif cell is whole:
                entries.append(f"{cell['latent_db']:.2f} dB")
            else:
                difference = np.array(cell["scenes"]) - np.array(whole["scenes"])
                low, high = mean_interval(difference)
                entries.append(f"{difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]")
        lines.append(f"| {name} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", default="UniPC-20")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.37, 0.15])
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS])
    parser.add_argument("--num_scenes", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/ablation.json"))
    args = parser.parse_args(argv)
    scenes = list(DataLoader(SceneDataset("validation", args.num_scenes, OFFSET), 16))
    rows = json.loads(args.output.read_text()) if args.output.is_file() else []
    for name in args.rows:
        for budget in args.budgets:
            if not any((r["row"], r["sampler"], r["budget"]) == (name, args.sampler, budget) for r in rows):
                rows.append(run(name, args.sampler, budget, scenes))
                save_json(args.output, rows)
                print(f"{name}, {args.sampler}, {budget:g}: {rows[-1]['latent_db']:.2f} dB", flush=True)
    print(table(rows))


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
