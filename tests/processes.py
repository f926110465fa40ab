"""Processes of their own for what is killed, or runs side by side: forked from one that has imported everything, for
imports take longer than these tests."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hgc_learn.training.lightning_cli", "hgc_learn.comparison.run"])


def start(
    function: Callable[..., None],
    *arguments: Any,
    output: Path = Path(os.devnull),
    environment: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Starts a function of a module in the root of the repository; what it prints goes to the file `output`. Its
    `exitcode` is minus the signal's number where one has ended it."""
    process = FORKS.Process(target=_run, args=(function, arguments, output, environment or {}))
    process.start()
    return process


def _run(function: Callable[..., None], arguments: Sequence[Any], output: Path, environment: Mapping[str, str]) -> None:
    torch.set_num_threads(1)
    os.chdir(ROOT)
    os.environ.update(environment)
    with output.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    function(*arguments)


def run_python(arguments: Sequence[str]) -> None:
    """Does what `python ARGUMENTS` does, a file or `-m` and a module."""
    if arguments[0] == "-m":
        sys.argv = [*arguments[1:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*arguments]
        runpy.run_path(arguments[0], run_name="__main__")
