"""What training costs, in forward passes of the uncached teacher: `python benchmarks/training_cost.py`.

Everything that a run computes, backward passes and rollouts of refining included, is counted by torch's own FLOP
counter and divided by what the uncached pipeline needs for one step of one sample (both halves of guidance). Two rows:

- `learned`: the whole training of a configuration, then refining at every budget. All of it is run.
- `l2c`: Learning-to-Cache's own recipe, 50,000 updates of 64 samples (the settings of its published code), each of a
  full step, the target and the blended prediction of the step after it, and a backward pass. A few updates are run, and
  scaled up.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hgc_learn.cli import RouterCLI, train
from hgc_learn.comparison.samples import draw_batches
from hgc_learn.export import decide, refining_batches
from hgc_learn.rollout import generate

L2C_UPDATES, L2C_BATCH_SIZE, L2C_INTERVAL = 50_000, 64, 2
NUM_L2C_UPDATES = 4  # that are run


def flops(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `action` returns, its floating point operations and its seconds."""
    start = time.monotonic()
    with FlopCounterMode(display=False) as counter:
        result = action()
    return result, float(counter.get_total_flops()), time.monotonic() - start


def fit(config: Path, folder: Path, *more: str) -> RouterCLI:
    """Trains as `python train.py fit` does."""
    paths = f"--trainer.default_root_dir={folder}", f"--checkpoint.dirpath={folder}"
    return train(["fit", f"--config={config}", *paths, *more])


def teacher_forward(cli: RouterCLI) -> float:
    """Operations of the uncached pipeline per step and sample."""
    module = cli.model
    (batch,) = draw_batches("validation", 2, 2)
    _, total, _ = flops(lambda: generate(module.pipe, module.sampling, batch))
    return total / 2 / module.num_steps


def learned_row(config: Path, folder: Path, seed: int, rounds: int) -> dict[str, Any]:
    """Trains and refines at every budget."""
    cli, training, seconds = flops(lambda: fit(config, folder, f"--seed_everything={seed}"))
    unit = teacher_forward(cli)
    module = cli.model
    batches = refining_batches(module, cli.datamodule, 64, 8)
    refining = {}
    for budget in module.hparams["budgets"]:
        _, total, taken = flops(partial(decide, module, budget, batches, num_rounds=rounds))
        refining[f"{budget:g}"] = {"teacher_forwards": round(total / unit), "seconds": round(taken)}
    row = {
        "policy": "learned",
        "config": str(config),
        "seed": seed,
        "updates": cli.trainer.global_step,
        "teacher_forward_gflops": round(unit / 1e9, 4),
        "training": {"teacher_forwards": round(training / unit), "seconds": round(seconds)},
        "refining": refining,
    }
    total = row["training"]["teacher_forwards"] + sum(r["teacher_forwards"] for r in refining.values())
    return row | {"teacher_forwards": total}


def l2c_row(config: Path, folder: Path) -> dict[str, Any]:
    """Runs a few updates; each visits all steps of a run, one in `L2C_INTERVAL` of them full."""
    more = [f"--trainer.max_steps={NUM_L2C_UPDATES}", "--trainer.limit_val_batches=0", "--data.batch_size=1"]
    more += [f"--model.objective.intervals=[{L2C_INTERVAL}]", "--model.budgets=[0.9]"]
    # Clean samples come from the data in the paper, from the teacher here: these are not counted.
    _, before, _ = flops(lambda: fit(config, folder / "1", *more, "--trainer.max_steps=1"))
    cli, after, seconds = flops(lambda: fit(config, folder / "n", *more))
    unit = teacher_forward(cli)
    clean = unit * cli.model.num_steps
    per_update = (after - before) / (NUM_L2C_UPDATES - 1) - clean
    visits = len(range(0, cli.model.num_steps, L2C_INTERVAL))
    per_sample = per_update / visits / unit
    return {
        "policy": "l2c",
        "config": str(config),
        "updates": L2C_UPDATES,
        "batch_size": L2C_BATCH_SIZE,
        "teacher_forwards_per_sample": round(per_sample, 3),
        "teacher_forwards": round(per_sample * L2C_UPDATES * L2C_BATCH_SIZE),
        "measured_updates": NUM_L2C_UPDATES - 1,
        "seconds": round(seconds),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", default="UniPC-20")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--refine_rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/training_cost.json"))
    args = parser.parse_args(argv)
    configs = Path("configs/compare/train")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rows.append(l2c_row(configs / f"l2c-{args.sampler}.yaml", Path(folder)))
        print(json.dumps(rows[-1], indent=1), flush=True)
        for seed in args.seeds:
            config = configs / f"learned-{args.sampler}.yaml"
            rows.append(learned_row(config, Path(folder) / "learned", seed, args.refine_rounds))
            print(json.dumps(rows[-1], indent=1), flush=True)
    args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
