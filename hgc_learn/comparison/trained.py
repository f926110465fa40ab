"""Checkpoints of the policies that are trained: made when they are first needed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml

from hgc_learn.comparison.config import CompareConfig
from hgc_learn.files import read_json, save_json
from hgc_learn.models.fingerprint import SAME_NORM_TOLERANCE, ModelFingerprint


def training_file(config: CompareConfig, sampler: str, policy: str) -> Path:
    """The configuration of train.py by which a policy is trained for a sampler."""
    return Path(config.training_config.format(policy=policy, sampler=sampler))


def training_configuration(config: CompareConfig, sampler: str, policy: str) -> Any:
    """What is in it.

    Raises:
        ValueError: it does not exist, or is not YAML.
    """
    path = training_file(config, sampler, policy)
    if not path.is_file():
        raise ValueError(f"{policy} reads a checkpoint, and {path}, its training for {sampler}, does not exist.")
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())}).") from None


def training_folders(config: CompareConfig, sampler: str, policy: str) -> list[Path]:
    """Of the policy's trainings, by their seeds."""
    folder = Path(config.output) / "trained" / sampler / policy
    return [folder, *(folder / f"seed-{seed}" for seed in range(1, config.num_trainings.get(policy, 1)))]


def checkpoint(config: CompareConfig, sampler: str, policy: str, weights: ModelFingerprint, seed: int = 0) -> Path:
    """The policy's checkpoint for a sampler; trains it if it is missing, or goes on with an interrupted training.

    Args:
        seed: of the training; 0 stands for that of its configuration.
        weights: those that `config.model` holds.

    Raises:
        ValueError: there is no training configuration for them, or it cannot be read, or it or the weights have changed
            since the checkpoint was made.
        KeyboardInterrupt: the training was interrupted; it goes on at the next call.
    """
    from hgc_learn.training.lightning_cli import train
    from hgc_learn.training.saved import read_checkpoint

    folder = training_folders(config, sampler, policy)[seed]
    ckpt_path, record = folder / "last.ckpt", folder / "trained.json"
    training = training_file(config, sampler, policy)
    configuration = training_configuration(config, sampler, policy)
    resumed = ckpt_path.is_file()
    if resumed:
        trained = read_json(record) if record.is_file() else {"configuration": configuration}
        if trained.get("configuration") != configuration:
            raise ValueError(
                f"{ckpt_path} was trained by another configuration than {training} is now. Remove {folder} to train "
                "anew, or undo the change."
            )
        of = read_checkpoint(ckpt_path).get("fingerprint")
        if of and (difference := ModelFingerprint.from_dict(of).difference(weights, SAME_NORM_TOLERANCE)):
            raise ValueError(
                f"{ckpt_path} was trained for other weights than {config.model} holds now ({', '.join(difference)}). "
                f"Remove {folder} to train anew."
            )
        if "minutes" in trained:
            return ckpt_path
    row = {"training": str(training), "configuration": configuration}
    save_json(record, row)
    arguments = ["fit", f"--config={training}", f"--model.model={config.model}", f"--checkpoint.dirpath={folder}"]
    arguments.append(f"--trainer.default_root_dir={folder}")
    if seed:
        arguments.append(f"--seed_everything={seed}")
    if resumed:
        arguments.append(f"--ckpt_path={ckpt_path}")
    start = time.monotonic()
    try:
        train(arguments)
    except SystemExit as error:  # how the command line says that it does not like a setting
        raise ValueError(f"{training} is not a configuration of train.py; what is wrong is printed above.") from error
    minutes = round((time.monotonic() - start) / 60, 2)
    save_json(record, {**row, "minutes": minutes, "resumed": resumed})
    return ckpt_path
