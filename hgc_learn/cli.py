"""`python train.py`: LightningCLI over the router's module and a data module."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from hgc_learn import data  # noqa: F401  (makes the data modules known to the command line by their short names)
from hgc_learn.monitoring import ScheduleMonitor
from hgc_learn.training import RouterModule


class RouterCLI(LightningCLI):
    """Adds the checkpoint and the monitor that every training wants, and keeps sizes in one place."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ScheduleMonitor, "monitor")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "router-{step}"})


def train(args: Sequence[str] | None = None, *, run: bool = True) -> RouterCLI:
    """Runs `fit`, `validate`, ... with the given arguments, or those of the command line.

    With `run=False` nothing is run: the objects that a config describes are built and returned.
    """
    return RouterCLI(
        RouterModule,
        run=run,
        args=list(args) if args is not None else None,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"max_steps": 100, "log_every_n_steps": 1, "num_sanity_val_steps": 0},
    )
