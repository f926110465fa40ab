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
from dataclasses import dataclass, field
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
from hgc_learn.effects import Choices, Effects
from hgc_learn.export import decide, load_run
from hgc_learn.hard import HardSchedule
from hgc_learn.learning import Learning
from hgc_learn.router import Router
from hgc_learn.setting import Draft
from hgc_learn.training import RouterModule

OFFSET = 2000  # of the judging scenes in the validation split


@dataclass(frozen=True)
class Training:
    """Arguments of train.py besides the configuration's, and what is changed in the code while it runs."""

    arguments: tuple[str, ...] = ()
    change: Callable[[], AbstractContextManager[Any]] = nullcontext


def holding() -> AbstractContextManager[Any]:
    return patch.object(Effects, "of_weights", lambda self: torch.zeros(self.weights.shape[-3:], dtype=torch.float64))


def no_refreshes() -> AbstractContextManager[Any]:
    return patch.object(Choices, "_add_refreshes", lambda self, flips, refreshes: None)


def independent() -> AbstractContextManager[Any]:
    """Every gate is drawn by itself: draws keep to the budget on average only, as the expected MACs have it."""

    def price(router: Router, budget: float) -> float:
        low, high = float(router.logits.min()) - 20, float(router.logits.max()) + 20
        for _ in range(30):
            middle = (low + high) / 2
            kept = float(router.expected_macs(router.probabilities(middle)))
            low, high = (middle, high) if kept > budget else (low, middle)
        return middle

    @torch.no_grad()
    def sample(router: Router, budget: float, generator: torch.Generator) -> tuple[HardSchedule, float]:
        fair = price(router, budget)
        return router.hard(torch.bernoulli(router.probabilities(fair), generator=generator).bool()), fair

    return patch.object(Router, "sample", sample)


TRAININGS = {
    "recipe": Training(),
    "warm start only": Training(("--trainer.max_steps=1", "--model.objective.learning_rate=0")),
    "no warm start": Training(("--model.objective.num_warm_start_batches=0",)),
    "first order only": Training(("--model.objective.num_directions=0",)),
    "holding": Training(change=holding),
    "no refreshes": Training(change=no_refreshes),
    "independent": Training(change=independent),
}


@dataclass(frozen=True)
class Row:
    """Which training, and what follows it at export."""

    training: str = "recipe"
    learning: Learning = field(default_factory=Learning)


ROWS = {
    "the whole recipe": Row(),
    "no steps trading places": Row(learning=Learning(reorder_trials=0)),
    "no specialising": Row(learning=Learning(specialise_updates=0)),
    "no learned fill-ins": Row(learning=Learning(tune_updates=0)),
    "none of these": Row(learning=Learning(reorder_trials=0, specialise_updates=0, tune_updates=0)),
    "training: none, only its warm start": Row("warm start only"),
    "training: no warm start": Row("no warm start"),
    "training: for this budget alone": Row("budget"),
    "first-order effects only": Row("first order only"),
    "effects: not of sites behind a gate": Row("no refreshes"),
    "held values, no weights anywhere": Row("holding", Learning(tune_updates=0)),
    "gates drawn independently": Row("independent"),
}


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
        error = (module.rollout(batch, draft) - target).square().flatten(1).mean(1)
        error /= target.square().flatten(1).mean(1)
        values += (-10 * error.clamp_min(1e-30).log10()).tolist()
    return values


def run(name: str, sampler: str, budget: float, scenes: list[dict[str, Any]]) -> dict[str, Any]:
    """One row."""
    row = ROWS[name]
    module, data = trained(row.training, sampler, budget)
    change = TRAININGS[row.training].change if row.training in TRAININGS else nullcontext
    start = time.monotonic()
    with change():
        hard, draft = decide(module, data, budget, row.learning)
    seconds = time.monotonic() - start
    values = relative_errors(module, draft, scenes)
    kept = module.router.kept(hard.compute)
    return {
        "row": name,
        "sampler": sampler,
        "budget": budget,
        "kept_macs": round(kept, 4),
        "latent_db": round(float(np.mean(values)), 3),
        "seconds": round(seconds),
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
