"""What `l2c` and `harmonica` gain by other penalties and learning rates: `python benchmarks/penalties.py`.

Trains each with its configuration of the comparison at several of both, and judges what the routers give at every
budget, L2C's at the best interval, by the PSNR to the uncached pictures of validation scenes that nothing else uses.
What is in the output already is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import UncachedPictures, add_row, mean, read_rows, train_once

from hgc_learn.__main__ import guarded
from hgc_learn.demo.scenes import draw_batches
from hgc_learn.export.export import load_run
from hgc_learn.models.macs import BudgetError
from hgc_learn.objectives import L2C
from hgc_learn.objectives.blend import MAX_LOGIT
from hgc_learn.training.gates import Gates
from hgc_learn.training.module import RouterModule


def trained(policy: str, model: str, sampler: str, penalty: float, learning_rate: float) -> Path:
    """The checkpoint of a training, made if it is missing."""
    arguments = [f"--config=configs/compare/train/{policy}-{sampler}.yaml", f"--model.model={model}"]
    arguments += [f"--model.objective.penalty={penalty}", f"--model.objective.learning_rate={learning_rate}"]
    folder = Path("runs/penalties", Path(model).name, sampler, policy, f"{penalty:g}", f"{learning_rate:g}")
    return train_once(folder, arguments)[0]


def candidates(module: RouterModule, budget: float) -> Iterator[Gates]:
    objective = module.objective
    if not isinstance(objective, L2C):
        yield module.gates(budget)
        return
    for interval in objective.intervals:
        with suppress(BudgetError):
            yield objective.gates(module.router, budget, interval=interval)


def judge(ckpt_path: Path, budgets: Sequence[float], num_scenes: int) -> dict[str, Any]:
    """PSNR by budget, and which share of the logits can move no farther: nothing tells which of these goes first."""
    module, _ = load_run(ckpt_path)
    logits = module.router.logits.detach()[1:]
    full = UncachedPictures(draw_batches("validation", num_scenes, 16, offset=2000))

    def psnr(gates: Gates) -> float:
        return mean(full.psnr(module, module.draft(gates)))

    return {
        "at_their_limit": round(float((logits.abs() >= MAX_LOGIT).float().mean()), 3),
        "psnr_db": {f"{budget:g}": max(map(psnr, candidates(module, budget))) for budget in budgets},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", default="UniPC-20")
    parser.add_argument("--model", default="hgc_learn/demo/teacher")
    parser.add_argument("--policies", nargs="+", default=["l2c", "harmonica"])
    parser.add_argument("--penalties", type=float, nargs="+", default=[3e-5, 3e-4, 3e-3, 1e-2])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[0.01, 0.02, 0.1])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.37, 0.25, 0.15])
    parser.add_argument("--num_scenes", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/penalties.json"))
    args = parser.parse_args(argv)
    rows = read_rows(args.output)
    for policy, penalty, learning_rate in itertools.product(args.policies, args.penalties, args.learning_rates):
        what = {"policy": policy, "model": args.model, "sampler": args.sampler}
        what |= {"penalty": penalty, "learning_rate": learning_rate}
        if any(what.items() <= row.items() for row in rows):
            continue
        ckpt_path = trained(policy, args.model, args.sampler, penalty, learning_rate)
        judged = judge(ckpt_path, args.budgets, args.num_scenes)
        add_row(args.output, rows, {**what, "num_scenes": args.num_scenes, **judged})


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(guarded(main))
