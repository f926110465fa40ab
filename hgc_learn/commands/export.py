"""Turns a trained router into a static schedule file at a budget.

Of several checkpoints, trained with other seeds, it takes the one that rounds to the best schedule at the budget.
Writes DIR/hgc_schedule.json, its tensors in DIR/hgc_schedule.safetensors, without which it is refused, and a picture of
it, DIR/hgc_schedule.png. One training run can be exported at several budgets, each to a folder of its own: one that
holds the schedule of another budget is refused. Needs the `train` extra. The checkpoint's configuration names classes
that are built: export your own checkpoints, and share schedule files, which are only data. Routers trained by other
objectives than Rollout are exported as they are: of the numbers below only the budget counts for them, and a
max_patterns that they exceed is refused.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from hgc_learn.export.learning import Learning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ckpt_path",
        type=Path,
        nargs="+",
        required=True,
        metavar="CKPT",
        help="checkpoint of train.py fit; of several, trained with other seeds, the best at this budget is exported",
    )
    parser.add_argument("--budget", type=float, default=0.5, help="fraction of the full MACs to keep (default 0.5)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    add_learning(parser)
    parser.add_argument(
        "--max_patterns",
        type=int,
        metavar="N",
        help="at most so many different steps, for torch.compile makes one graph for each (default: no limit)",
    )


def run(args: argparse.Namespace) -> None:
    from hgc_learn.export.export import export

    ckpt_path, *others = args.ckpt_path
    path = export(ckpt_path, args.output, args.budget, learning(args), args.max_patterns, others)
    print(f"wrote {path}")


def add_learning(parser: argparse.ArgumentParser) -> None:
    """How much is learned at an export, for every command that exports."""
    for name, words in (
        ("learning_samples", "training samples that the following learn from"),
        ("reorder_trials", "trials whether steps should change places, for this budget alone; 0 for none"),
        ("specialise_updates", "more training steps of the router, for this budget alone; 0 for none"),
        ("fill_updates", "steps of learning how to fill in what is skipped; 0 for none"),
    ):
        default = getattr(Learning, name)
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{words} (default {default})")


def learning(args: argparse.Namespace) -> Learning:
    return Learning(**{field.name: getattr(args, field.name) for field in fields(Learning)})
