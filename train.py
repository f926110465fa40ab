"""Trains a router: `python train.py fit --config configs/demo.yaml`."""

import os

# Threads that wait by spinning starve each other when something else takes a core: some hundred times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of each image processor it finds no torchvision for

from hgc_learn.cli import train

if __name__ == "__main__":
    train()
