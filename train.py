"""Trains a router: `python train.py fit --config configs/demo.yaml`."""

import sys

from hgc_learn.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
