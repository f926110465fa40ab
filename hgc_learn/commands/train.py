"""Train a router: Lightning's command line.

`fit` trains, `validate` judges what a checkpoint would be exported as. `hgc_learn train fit --help` explains the
settings, those of data and objective with `--data.help ControlDataModule` and `--model.objective.help Rollout`;
`hgc_learn train fit --config FILE --print_config` writes all as a configuration. Ctrl-C saves first; `--ckpt_path` goes
on.
In the repository, `python train.py` is the same. Needs the `train` extra.

  hgc_learn train fit --config configs/demo.yaml
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} SUBCOMMAND [arguments]"
    parser.add_argument("subcommand", metavar="SUBCOMMAND", help="fit or validate")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    from hgc_learn.training.lightning_cli import train

    train([args.subcommand, *args.arguments])
