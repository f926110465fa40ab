"""Checkpoints of the policies that are trained: made when they are first needed."""

from __future__ import annotations

import time
from pathlib import Path

import yaml

from hgc_learn.comparison.config import CompareConfig
from hgc_learn.files import read_json, save_json


def checkpoint(config: CompareConfig, sampler: str, policy: str) -> Path:
    """The policy's checkpoint for a sampler; trains it if it is missing, or goes on with an interrupted training.

    Raises:
        ValueError: there is no training configuration for them, or it cannot be read, or it has changed since the
            checkpoint was made.
        KeyboardInterrupt: the training was interrupted; it goes on at the next call.
    """
    folder = Path(config.output) / "trained" / sampler / policy
    ckpt_path, done = folder / "last.ckpt", folder / "trained.json"
    training = Path(config.training_config.format(policy=policy, sampler=sampler))
    if not training.is_file():
        raise ValueError(f"{policy} reads a checkpoint, and {training}, its training for {sampler}, does not exist.")
    try:
        configuration = yaml.safe_load(training.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{training} is not YAML ({' '.join(str(error).split())}).") from None
    if done.is_file() and ckpt_path.is_file():
        if read_json(done).get("configuration") != configuration:
            raise ValueError(
                f"{ckpt_path} was trained by another configuration than {training} is now. Remove {folder} to train "
                "anew, or undo the change."
            )
        return ckpt_path
    from hgc_learn.cli import train

    done.unlink(missing_ok=True)  # an earlier training's, whose checkpoint is gone
    arguments = ["fit", f"--config={training}", f"--model.model={config.model}", f"--checkpoint.dirpath={folder}"]
    arguments.append(f"--trainer.default_root_dir={folder}")
    resumed = ckpt_path.is_file()
    if resumed:
        arguments.append(f"--ckpt_path={ckpt_path}")
    start = time.monotonic()
    try:
        train(arguments)
    except SystemExit as error:  # how the command line says that it does not like a setting
        raise ValueError(f"{training} is not a configuration of train.py; what is wrong is printed above.") from error
    minutes = round((time.monotonic() - start) / 60, 2)
    row = {"training": str(training), "configuration": configuration, "minutes": minutes, "resumed": resumed}
    save_json(done, row)
    return ckpt_path
