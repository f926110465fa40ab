"""What training costs, in forward passes of the uncached teacher: `python benchmarks/training_cost.py`.

Everything that a run computes, backward passes included, is counted by torch's own FLOP counter and divided by what the
uncached pipeline needs for one step of one sample (both halves of guidance). Two rows:

- `learned`: the training of a configuration, and what its exports learn at every budget. Some updates or trials of each
  part are run, and scaled to all of them: their gates keep to the budget, so that all cost the same.
- `l2c`: Learning-to-Cache's own recipe, 50,000 updates of 64 samples (the settings of its published code), each of a
  full step, the target and the blended prediction of the step after it, and a backward pass.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from hgc_learn.__main__ import guarded
from hgc_learn.demo.scenes import draw_batches
from hgc_learn.export.export import decide, in_batches, training_samples
from hgc_learn.export.learning import NOTHING, Learning
from hgc_learn.files import save_json
from hgc_learn.models.macs import flop_counter
from hgc_learn.sampling import generate
from hgc_learn.training.lightning_cli import RouterCLI, train

L2C_UPDATES, L2C_BATCH_SIZE, L2C_INTERVAL = 50_000, 64, 2
FEW, MORE = 4, 8  # updates of a training that are run; a multiple of the number of budgets
PARTS = {"reorder_trials": (4, 12), "specialise_updates": (2, 4), "fill_updates": (2, 4)}  # likewise, of an export


class NoModules:
    """Instead of torch's tracker of modules, whose hooks fail under the runtime's forwards."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def flops(action: Callable[[], Any]) -> tuple[Any, float]:
    """What `action` returns, and its floating point operations."""
    counter = flop_counter()
    counter.mod_tracker = cast(Any, NoModules())
    with counter:
        result = action()
    return result, float(counter.get_total_flops())


def per_update(config: Path, *arguments: str) -> tuple[RouterCLI, float, float]:
    """A short training; operations of an update and of what comes before the first."""

    def fit(num_updates: int) -> RouterCLI:
        with tempfile.TemporaryDirectory() as folder:
            paths = f"--trainer.default_root_dir={folder}", f"--checkpoint.dirpath={folder}"
            short = f"--trainer.max_steps={num_updates}", "--trainer.limit_val_batches=0"
            return train(["fit", f"--config={config}", *paths, *short, *arguments])

    _, few = flops(partial(fit, FEW))
    cli, more = flops(partial(fit, MORE))
    slope = (more - few) / (MORE - FEW)
    return cli, slope, few - FEW * slope


def teacher_forward(cli: RouterCLI) -> float:
    """Operations of the uncached pipeline per step and sample."""
    module = cli.model
    (batch,) = draw_batches("validation", 2, 2)
    _, total = flops(lambda: generate(module.pipe, module.sampling, batch))
    return total / 2 / module.num_steps


def export_flops(cli: RouterCLI, budget: float) -> float:
    """Operations of all that an export learns, besides those of the uncached pipeline's pictures."""

    def count(name: str, number: int) -> float:
        learning = replace(NOTHING, **{name: number})
        return flops(partial(decide, cli.model, cli.datamodule, budget, learning))[1]

    total = 0.0
    for name, numbers in PARTS.items():
        (few, more), (low, high) = numbers, (count(name, number) for number in numbers)
        total += low + (getattr(Learning, name) - few) * (high - low) / (more - few)
    return total


def learned_row(config: Path) -> dict[str, Any]:
    """Training and exports."""
    cli, update, start = per_update(config)
    module, unit = cli.model, teacher_forward(cli)
    settings = cli.config["fit"]
    num_updates = settings["trainer"]["limit_train_batches"] * cli.trainer.max_epochs
    for batch in in_batches(training_samples(cli.datamodule, Learning.learning_samples), 8):
        module.teacher_latents(batch)
    teachers = Learning.learning_samples * module.num_steps
    exports = {f"{b:g}": round(export_flops(cli, b) / unit + teachers) for b in module.hparams["budgets"]}
    training = (start + num_updates * update) / unit
    return {
        "policy": "learned",
        "config": str(config),
        "updates": num_updates,
        "batch_size": settings["data"]["init_args"]["batch_size"],
        "teacher_forward_gflops": round(unit / 1e9, 4),
        "training_teacher_forwards": round(training),
        "export_teacher_forwards": exports,
        "teacher_forwards": round(training + sum(exports.values())),
    }


def l2c_row(config: Path) -> dict[str, Any]:
    """An update visits all steps of a run, one in `L2C_INTERVAL` of them full."""
    interval = f"--model.objective.intervals=[{L2C_INTERVAL}]"
    cli, update, _ = per_update(config, "--data.batch_size=1", interval, "--model.budgets=[0.9]")
    unit, num_steps = teacher_forward(cli), cli.model.num_steps
    # Clean samples come from the data in the paper, from the teacher here: these are not counted.
    visits = num_steps - len(range(0, num_steps, L2C_INTERVAL))
    per_sample = (update / unit - num_steps) / visits
    return {
        "policy": "l2c",
        "config": str(config),
        "updates": L2C_UPDATES,
        "batch_size": L2C_BATCH_SIZE,
        "teacher_forwards_per_sample": round(per_sample, 3),
        "teacher_forwards": round(per_sample * L2C_UPDATES * L2C_BATCH_SIZE),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", nargs="+", default=["UniPC-20", "DDIM-50"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/training_cost.json"))
    args = parser.parse_args(argv)
    configs, rows = Path("configs/compare/train"), []
    for sampler in args.samplers:
        rows += [l2c_row(configs / f"l2c-{sampler}.yaml"), learned_row(configs / f"learned-{sampler}.yaml")]
        print(json.dumps(rows[-2:], indent=1), flush=True)
        save_json(args.output, rows)


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(guarded(main))
