"""`python train.py`: LightningCLI over the router's module and a data module."""

from __future__ import annotations

import itertools
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from hgc_learn import data  # noqa: F401  (makes the data modules known to the command line by their short names)
from hgc_learn.files import check_writable, write_atomically
from hgc_learn.training.module import RouterModule
from hgc_learn.training.monitoring import ScheduleMonitor
from hgc_learn.training.saved import read_checkpoint, write_saved

USAGE = "%(prog)s [--config FILE] [--SETTING VALUE ...]"
"""There are more than a hundred settings, and jsonargparse prints the usage with every error."""

LAST = "last.ckpt"


class KeepConfig(SaveConfigCallback):
    """Puts the run's configuration into its checkpoints too, so that one file is all that export needs."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, RouterModule)
        pl_module.config = self.parser.dump(self.config, skip_none=False)


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's own go through the system's temporary folder; where that is another disk, moving them is copying, and
    a process that is killed leaves half a file under the checkpoint's name.

    Args:
        resumed_from: the checkpoint that this run goes on from. What another run has left under a checkpoint's name
            becomes `previous.ckpt`, or `previous-1.ckpt`, ... where that is taken.
    """

    def __init__(self, resumed_from: Path | None):
        self.resumed_from, self.saved = resumed_from, set[Path]()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):  # not on a disk
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        if target not in self.saved and target.is_file():
            if not self._is_resumed_from(target):
                _put_aside(target)
            elif read_checkpoint(target).get("global_step") == checkpoint["global_step"]:
                return  # of a run that was refused, or stopped before its first update: nothing in it is new
        write_saved(target, checkpoint)
        self.saved.add(target)

    def _is_resumed_from(self, target: Path) -> bool:
        return self.resumed_from is not None and self.resumed_from.is_file() and target.samefile(self.resumed_from)


class Checkpoints(ModelCheckpoint):
    """Lightning's own, but for two things. Without a metric to go by the end of a training is saved whatever interval
    is set: what an export wants is the router whose learning rate and temperature have fallen. And where one of several
    processes has failed, the others do not come to the barrier at which Lightning's own waits after saving: all would
    hang, and nobody would be told why. So the first process saves alone."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.monitor is None and self.save_top_k != 0 and self._last_global_step_saved != trainer.global_step:
            self._save_checkpoint(trainer, self.format_checkpoint_name(self._monitor_candidates(trainer)))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.world_size > 1:
            if not trainer.is_global_zero:
                return
            vars(trainer.strategy)["barrier"] = lambda name=None: None  # all that follows is to end this process
        super().on_exception(trainer, pl_module, exception)


def _put_aside(target: Path) -> None:
    names = itertools.chain(["previous.ckpt"], (f"previous-{i}.ckpt" for i in itertools.count(1)))
    free = next(path for path in map(target.with_name, names) if not path.exists())
    write_atomically(free, target.read_bytes())


class RouterCLI(LightningCLI):
    """Adds the checkpoint and the monitor that every training wants, and keeps sizes in one place."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those that a router has a step for."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ScheduleMonitor, "monitor")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {
                "model.objective": {"class_path": "Rollout"},
                # Not by save_last: after an epoch Lightning does that only beside another checkpoint.
                "checkpoint.filename": Path(LAST).stem,
                "checkpoint.save_top_k": 1,  # without a metric: that of the latest epoch, the router to keep
                "checkpoint.save_on_train_epoch_end": True,  # not only after those that are validated
                "checkpoint.save_on_exception": True,  # Ctrl-C loses nothing
                "checkpoint.enable_version_counter": False,  # a new run in the same folder replaces it
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Lightning's own puts the checkpoint's settings of the model over those that are asked for, without a word.
        `RouterModule.on_load_checkpoint` says which must not differ."""

    def before_fit(self) -> None:
        ckpt_path = self._checked_ckpt_path()
        for callback in self.trainer.checkpoint_callbacks:
            folder = getattr(callback, "dirpath", None)
            if folder is not None and "://" not in str(folder):
                check_writable(Path(folder, LAST))
        self.trainer.strategy.checkpoint_io = AtomicCheckpoints(None if ckpt_path is None else Path(ckpt_path))

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):  # what Lightning makes of it
                raise
            saved = [path for path in getattr(self.trainer.strategy.checkpoint_io, "saved", ()) if path.name == LAST]
            raise KeyboardInterrupt(*(f"go on with --ckpt_path={path}" for path in saved)) from None

    def before_validate(self) -> None:
        if self._checked_ckpt_path() is None:
            raise ValueError("validate judges a trained router: give its checkpoint with --ckpt_path.")

    def _checked_ckpt_path(self) -> str | None:
        """Raises ValueError or OSError if it is no checkpoint of a training."""
        ckpt_path: str | None = self.config[self.subcommand]["ckpt_path"]
        # Not one of Lightning's words, such as `last`, and on a disk.
        if ckpt_path is not None and Path(ckpt_path).suffix and "://" not in ckpt_path:
            read_checkpoint(Path(ckpt_path))
        return ckpt_path


def train(args: Sequence[str] | None = None) -> RouterCLI:
    """Runs `fit` or `validate` with the given arguments, or those of the command line.

    Raises:
        ValueError: a setting that the machine or the training does not allow.
        KeyboardInterrupt: it was interrupted, and has saved a checkpoint.
        SystemExit: an argument is not understood, and what is wrong has been printed; or the process was asked to end,
            and has saved a checkpoint (status 143).
    """
    try:
        return _cli(None if args is None else list(args), run=True)
    except MisconfigurationException as error:
        raise ValueError(" ".join(str(error).split())) from None
    except SIGTERMException:  # Lightning's own ends with status 0, as a training that is done
        raise SystemExit(128 + signal.SIGTERM) from None


def rebuild(config: str) -> RouterCLI:
    """The objects that the configuration of a run (YAML) describes, on this machine; nothing is run.

    Raises:
        ArgumentError: of jsonargparse; not a configuration of this version.
    """
    settings = yaml.safe_load(config)
    # Arguments of `fit`, not of an object; the last two, never used, are in earlier checkpoints.
    for key in ("ckpt_path", "weights_only", "optimizer", "lr_scheduler"):
        settings.pop(key, None)
    # The machines of the run need not be here, nor what it was watched with.
    for key in ("strategy", "devices", "num_nodes", "accelerator", "plugins", "logger", "callbacks", "profiler"):
        settings.get("trainer", {}).pop(key, None)
    return _cli(settings, run=False)


def _cli(args: list[str] | dict[str, Any] | None, *, run: bool) -> RouterCLI:
    # Gradients through many steps underflow; on CPUs, arithmetic with denormal numbers is many times slower.
    torch.set_flush_denormal(True)
    with warnings.catch_warnings():
        # The demonstration has arguments of its own on the command line.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        # Going on in a folder replaces its checkpoint: that is what it is for.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        # Saved within an epoch: what is wanted is the router after the update.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        return RouterCLI(
            RouterModule,
            run=run,
            args=args,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": run, **{name: {"usage": USAGE} for name in RouterCLI.subcommands()}},
            auto_configure_optimizers=False,  # the objective's own
            save_config_callback=KeepConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "devices": 1,  # on more, an epoch has fewer updates: to be asked for
                "max_epochs": 8,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
        )
