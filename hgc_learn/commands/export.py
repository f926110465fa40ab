"""Turns a trained router into a static schedule file at a budget.

Writes DIR/hgc_schedule.json and a picture of it, DIR/hgc_schedule.png. One training run can be exported at several
budgets. Needs the `train` extra. The checkpoint's configuration names classes that are built: export your own
checkpoints, and share schedule files, which are only data.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt_path", type=Path, required=True, metavar="CKPT", help="checkpoint of train.py fit")
    parser.add_argument("--budget", type=float, default=0.5, help="fraction of the full MACs to keep (default 0.5)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--learning_samples", type=int, default=64, help="training samples that the following learn from (default 64)"
    )
    parser.add_argument(
        "--reorder_trials",
        type=int,
        default=96,
        help="rollouts that try whether steps should trade places, for this budget; 0 for none (default 96)",
    )
    parser.add_argument(
        "--specialise_updates",
        type=int,
        default=192,
        help="more training steps of the router, for this budget alone; 0 for none (default 192)",
    )
    parser.add_argument(
        "--tune_updates",
        type=int,
        default=128,
        help="steps of learning how to fill in what is skipped; 0 for none (default 128)",
    )
    parser.add_argument(
        "--max_patterns",
        type=int,
        metavar="N",
        help="at most so many different steps, for torch.compile makes one graph for each (default: no limit)",
    )


def run(args: argparse.Namespace) -> None:
    from hgc_learn.export import Learning, export

    learning = Learning(args.learning_samples, args.reorder_trials, args.specialise_updates, args.tune_updates)
    path = export(args.ckpt_path, args.output, args.budget, learning, args.max_patterns)
    print(f"wrote {path}")
