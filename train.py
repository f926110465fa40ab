"""Trains a router: `python train.py fit --config configs/demo.yaml`."""

from hgc_learn.cli import train

if __name__ == "__main__":
    train()
