"""The whole idea on the demonstration teacher: train a router, export a schedule, compare on held-out scenes.

Writes DIR/hgc_schedule.json with its tensors and a picture of it, DIR/comparison.png and DIR/summary.json, and prints a
table. Takes one to two hours on a CPU core. Run it from the root of the repository; `--resume` goes on with an
interrupted training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hgc_learn.commands.export import add_learning, learning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default runs/demo")
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="of the training")
    parser.add_argument("--budget", type=float, default=0.5, help="fraction of the full MACs to keep (default 0.5)")
    parser.add_argument("--num_scenes", type=int, default=256, help="held-out scenes to judge on (default 256)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    add_learning(parser)
    parser.add_argument(
        "training_arguments", nargs="*", metavar="-- ARGUMENT", help="more arguments for the training, after --"
    )


def run(args: argparse.Namespace) -> None:
    if not args.config.is_file():
        raise ValueError(f"{args.config}: no such file; run the demo from the root of the repository.")
    if args.num_scenes < 2:
        raise ValueError(f"--num_scenes is {args.num_scenes}; at least 2 are needed to say how sure a mean is.")
    from hgc_learn.demo.journey import run_demo

    run_demo(
        args.output,
        config=args.config,
        budget=args.budget,
        learning=learning(args),
        num_scenes=args.num_scenes,
        resume=args.resume,
        training_arguments=args.training_arguments,
    )
