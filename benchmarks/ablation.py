"""What each part of the learned recipe contributes: `python benchmarks/ablation.py`.

Two trainings that differ in their seed alone differ, so every row leaves one part out with several seeds, and is
compared with the whole recipe of the same seed, by the PSNR to the uncached pictures of scenes that nothing else uses.
Parts of the training are judged by what the router rounds to at every budget before an export learns anything; parts
of the export by what it writes at one budget. What is in the output already is not run again; trainings are kept under
`runs`, those of the whole recipe where `seeds.py` keeps them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import UncachedPictures, add_row, mean, read_rows
from seeds import Recipe

from hgc_learn.__main__ import guarded
from hgc_learn.demo.scenes import draw_batches
from hgc_learn.export.export import decide, load_run
from hgc_learn.export.learning import ALL, NOTHING, Learning
from hgc_learn.objectives import Rollout
from hgc_learn.training.effects import Choices, Effects
from hgc_learn.training.gates import Gates
from hgc_learn.training.router import Router

WHOLE = "the whole recipe"


@dataclass(frozen=True)
class Training:
    """Arguments of train.py besides the configuration's, and what is changed in the code while it runs."""

    arguments: tuple[str, ...] = ()
    change: Callable[[], AbstractContextManager[Any]] = nullcontext


def holding() -> AbstractContextManager[Any]:
    return patch.object(Effects, "of_reach", lambda self: torch.zeros_like(self.reach[0, 0]))


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
    def sample(router: Router, budget: float, generator: torch.Generator) -> tuple[Gates, float]:
        fair = price(router, budget)
        return router.gates(torch.bernoulli(router.probabilities(fair), generator=generator).bool()), fair

    return patch.object(Router, "sample", sample)


def one_by_one() -> AbstractContextManager[Any]:
    """Gates without groups."""

    def optimizer(self: Rollout, router: Router) -> torch.optim.Optimizer:
        return torch.optim.Adam(router.parameters(), lr=self.learning_rate, betas=(0.9, 0.95))

    return patch.object(Rollout, "optimizer", optimizer)


TRAININGS = {
    WHOLE: Training(),
    "warm start only": Training(("--trainer.max_steps=1", "--model.objective.learning_rate=0")),
    "no warm start": Training(("--model.objective.num_warm_start_batches=0",)),
    "first-order effects only": Training(("--model.objective.num_directions=0",)),
    "effects not of sites behind a gate": Training(change=no_refreshes),
    "held values, no reaches": Training(change=holding),
    "gates drawn independently": Training(change=independent),
    "every gate moves by itself": Training(change=one_by_one),
    "errors of latents": Training(("--model.errors_of=latents",)),
    "two thirds of the updates": Training(("--trainer.max_epochs=4",)),
    "three times the updates": Training(("--trainer.max_epochs=18",)),
}

ALONE = "trained for this budget alone"

EXPORTS = {
    WHOLE: ALL,
    "no reordering": Learning(reorder_trials=0),
    "no specialising": Learning(specialise_updates=0),
    "no learned fill-ins": Learning(fill_updates=0),
    "none of these": NOTHING,
    ALONE: ALL,
}


class Judge:
    """Makes the rows of the tables."""

    def __init__(self, recipe: Recipe, num_scenes: int):
        self.recipe = recipe
        self.full = UncachedPictures(draw_batches("validation", num_scenes, 16, offset=2000))

    def of_training(self, part: str, seed: int) -> dict[str, float]:
        """PSNR by budget of what the router rounds to."""
        training = TRAININGS[part]
        with training.change():
            module, _ = load_run(self._trained(part, seed, training))
            return {
                f"{budget:g}": mean(self.full.psnr(module, module.draft(module.gates(budget))))
                for budget in module.hparams["budgets"]
            }

    def of_export(self, part: str, seed: int, budget: float) -> dict[str, float]:
        """PSNR at one budget of what an export writes."""
        name, training = WHOLE, Training()
        if part == ALONE:
            name, training = f"{budget:g} alone", Training((f"--model.budgets=[{budget}]",))
        module, data = load_run(self._trained(name, seed, training))
        _, draft = decide(module, data, budget, EXPORTS[part])
        return {f"{budget:g}": mean(self.full.psnr(module, draft))}

    def _trained(self, name: str, seed: int, training: Training) -> Path:
        folder = Path("runs/seeds") if name == WHOLE else Path("runs/ablation", name.replace(" ", "-"))
        return self.recipe.trained(seed, folder, *training.arguments)[0]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown: of the whole recipe the PSNR per seed, of all else the difference to it."""
    cells = {(row["part"], row["seed"]): row["psnr_db"] for row in rows}
    whole = {seed: values for (part, seed), values in cells.items() if part == WHOLE}
    budgets = sorted({budget for values in cells.values() for budget in values}, key=float, reverse=True)
    lines = [
        "| | " + " | ".join(f"{float(budget):.0%}" for budget in budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for part in dict.fromkeys(part for part, _ in cells):
        entries = []
        for budget in budgets:
            seeds = [seed for seed in whole if budget in cells.get((part, seed), {}) and budget in whole[seed]]
            values = [cells[part, seed][budget] for seed in seeds]
            if part == WHOLE:
                entries.append(", ".join(f"{value:.2f}" for value in values))
            else:
                pairs = zip(values, seeds, strict=True)
                entries.append(", ".join(f"{value - whole[seed][budget]:+.2f}" for value, seed in pairs) or "-")
        lines.append(f"| {part} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", default="UniPC-20")
    parser.add_argument("--model", default="hgc_learn/demo/teacher")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--trainings", nargs="*", choices=[*TRAININGS], default=[*TRAININGS])
    parser.add_argument("--exports", nargs="*", choices=[*EXPORTS], default=[*EXPORTS])
    parser.add_argument("--budget", type=float, default=0.25, help="of the exports")
    parser.add_argument("--num_scenes", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/ablation.json"))
    args = parser.parse_args(argv)
    recipe = Recipe(args.sampler, args.model)
    judge = Judge(recipe, args.num_scenes)
    jobs: list[tuple[dict[str, Any], Callable[[], dict[str, float]]]] = []
    for seed in args.seeds:
        common = {**asdict(recipe), "seed": seed}
        jobs += [
            ({"table": "training", "part": part, **common}, partial(judge.of_training, part, seed))
            for part in args.trainings
        ]
        jobs += [
            (
                {"table": "export", "part": part, **common, "budget": args.budget},
                partial(judge.of_export, part, seed, args.budget),
            )
            for part in args.exports
        ]
    rows = read_rows(args.output)
    for what, psnr in jobs:
        if not any(what.items() <= row.items() for row in rows):
            add_row(args.output, rows, {**what, "num_scenes": args.num_scenes, "psnr_db": psnr()})
    for name in ("training", "export"):
        shown = {"table": name, **asdict(recipe)}.items()
        print(f"\n{name}\n\n" + table([row for row in rows if shown <= row.items()]))


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(guarded(main))
