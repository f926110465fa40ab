"""How much the training seed matters, and how long a run takes: `python benchmarks/seeds.py --seeds 0 1 2`.

Trains with each seed, exports at every budget, and judges on test scenes of the comparison. What is in the output
already is not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import UncachedPictures, add_row, mean, read_rows, train_once

from hgc_learn.__main__ import guarded
from hgc_learn.comparison.statistics import mean_interval
from hgc_learn.demo.scenes import draw_batches
from hgc_learn.export.export import decide, load_run
from hgc_learn.training.gates import Gates
from hgc_learn.training.module import RouterModule

NUM_SCENES, NUM_DRAWS = 16, 4  # for the gap between soft and hard


def soft_and_hard(module: RouterModule, budget: float) -> dict[str, float]:
    """Latent error of the trained router as it is, in dB below the latents' power, on validation scenes: of schedules
    drawn at the temperature that training ended with, and of the one that is rounded."""
    (batch,) = draw_batches("validation", NUM_SCENES, NUM_SCENES)
    target = module.teacher_latents(batch)

    def level(gates: Gates) -> float:
        error = (module.rollout(batch, module.draft(gates)) - target).square().flatten(1).mean(1)
        error /= target.square().flatten(1).mean(1)
        return float(-10 * error.log10().mean())

    router, generator = module.router, torch.Generator().manual_seed(0)
    soft = [level(router.sample(budget, generator)[0]) for _ in range(NUM_DRAWS)]
    return {
        "soft_latent_db": round(sum(soft) / NUM_DRAWS, 2),
        "hard_latent_db": round(level(module.gates(budget)), 2),
    }


@dataclass(frozen=True)
class Recipe:
    """The learned policy's configuration for a sampler, on a model."""

    sampler: str
    model: str

    def trained(self, seed: int, parent: Path = Path("runs/seeds"), *changes: str) -> tuple[Path, float]:
        """The checkpoint of a training, made if it is missing, and the minutes that it took; `changes` are arguments of
        train.py besides those of the configuration."""
        arguments = [f"--config=configs/compare/train/learned-{self.sampler}.yaml", f"--model.model={self.model}"]
        folder = parent / Path(self.model).name / self.sampler / str(seed)
        return train_once(folder, [*arguments, f"--seed_everything={seed}", *changes])


def run(recipe: Recipe, seed: int, budgets: Sequence[float], num_scenes: int) -> Iterator[dict[str, Any]]:
    """A row per budget."""
    ckpt_path, training_minutes = recipe.trained(seed)
    module, data = load_run(ckpt_path)
    full = UncachedPictures(draw_batches("test", num_scenes, 16))
    for budget in budgets:
        start = time.monotonic()
        gates, draft = decide(module, data, budget)
        exporting = (time.monotonic() - start) / 60
        psnr = full.psnr(module, draft)
        yield {
            **asdict(recipe),
            "seed": seed,
            "budget": budget,
            **soft_and_hard(module, budget),
            "threads": torch.get_num_threads(),
            "training_minutes": training_minutes,
            "exporting_minutes": round(exporting, 2),
            "kept_macs": round(module.router.kept(gates.compute), 4),
            "num_samples": len(psnr),
            "psnr_db": mean(psnr),
            "psnr_ci": [round(end, 3) for end in mean_interval(psnr.double().numpy())],
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", default="UniPC-20")
    parser.add_argument("--model", default="hgc_learn/demo/teacher")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.37, 0.25, 0.15])
    parser.add_argument("--num_scenes", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/seeds.json"))
    args = parser.parse_args(argv)
    rows = read_rows(args.output)
    recipe = Recipe(args.sampler, args.model)
    for seed in args.seeds:
        key = {**asdict(recipe), "seed": seed}.items()
        done = {row["budget"] for row in rows if key <= row.items()}
        if missing := [budget for budget in args.budgets if budget not in done]:
            for row in run(recipe, seed, missing, args.num_scenes):
                add_row(args.output, rows, row)


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(guarded(main))
