"""Trains a router: `python train.py fit --config configs/demo.yaml`."""

import sys

from hgc_learn.__main__ import guarded


def run() -> None:
    from hgc_learn.cli import train

    train()


if __name__ == "__main__":
    sys.exit(guarded(run))
