"""Runs the cells that are missing, one policy with one sampler at a time; any number of processes may share them."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hgc_learn.comparison.cells import Selection, cell_files, protocol, read_cell, tuned_otherwise
from hgc_learn.comparison.config import CompareConfig
from hgc_learn.comparison.judge import Judge, PolicyCells
from hgc_learn.comparison.samples import claim
from hgc_learn.files import save_json
from hgc_learn.policies import POLICIES


def run_comparison(config: CompareConfig, selection: Selection, *, redo: bool = False) -> None:
    """Runs every selected cell that has no figures and no reason yet. An exception in a cell is kept in its file, told,
    and tried again by the next run. Cells that were tuned with other settings are told and kept.

    Args:
        redo: removes the selected cells first, when all that they need has been found.
    """
    torch.set_flush_denormal(True)  # arithmetic with denormal numbers is many times slower on CPUs
    cells = list(selection.cells())
    if redo:
        for sampler in selection.samplers:
            Judge(config, sampler, redone=cells)  # raises what would stop the run
        for cell in cells:
            cell_files(config, *cell).remove()
    total = len(cells)

    def num_done() -> int:
        return sum(_is_done(read_cell(config, *cell)) for cell in cells)

    with _Display(total, num_done()) as display:
        for line in _other_tunings(config, cells):
            display.log(line)
        for sampler in selection.samplers:
            judge: Judge | None = None
            for policy in selection.policies:
                lock = Path(config.output) / "cells" / sampler / policy / "lock"
                with claim(lock) as mine:
                    missing = [b for b in selection.budgets if not _is_done(read_cell(config, sampler, policy, b))]
                    if not mine or not missing:
                        continue
                    if judge is None:
                        display.say(f"{sampler}: drawing scenes")
                        judge = Judge(config, sampler)
                    _run_policy(judge, policy, missing, display, num_done)


def _other_tunings(config: CompareConfig, cells: Sequence[tuple[str, str, float]]) -> list[str]:
    """A line per sampler, policy and other way of tuning."""
    found: Counter[tuple[str, str, str]] = Counter()
    for sampler, policy, budget in cells:
        cell = read_cell(config, sampler, policy, budget)
        if cell is not None and _is_done(cell) and (how := tuned_otherwise(config, cell)):
            found[sampler, policy, how] += 1
    return [
        f"{sampler} {policy}: {number} {'cells were' if number > 1 else 'cell was'} tuned with {how}; --redo runs "
        f"{'them' if number > 1 else 'it'} again"
        for (sampler, policy, how), number in found.items()
    ]


def _run_policy(
    judge: Judge, policy: str, budgets: Sequence[float], display: _Display, num_done: Callable[[], int]
) -> None:
    where = f"{judge.sampler} {policy}"
    policy_cells = PolicyCells(judge, POLICIES[policy], lambda words: display.say(f"{where}: {words}"))
    training: dict[str, Any] = {}
    if policy_cells.needs_checkpoint:
        with display.paused():  # training has a display of its own
            training = _attempt(lambda: {"ckpt_paths": policy_cells.ckpt_paths})
    for budget in budgets:
        where = f"{judge.sampler} {policy} {budget:g}"
        start = time.monotonic()
        row = training if "error" in training else _attempt(partial(policy_cells.run, budget))
        if "error" in row:
            row = {"policy": policy, "sampler": judge.sampler, "budget": budget, **row}
            row["protocol"] = protocol(judge.config, judge.sampler)
        save_json(cell_files(judge.config, judge.sampler, policy, budget).figures, row)
        display.advance(num_done())
        display.log(f"{where}: {_outcome(row)} ({time.monotonic() - start:.0f} s; {display.count()})")


def _attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `action` returns, or its traceback as `error`. Ctrl-C passes, and that a package is not installed."""
    try:
        return action()
    except ModuleNotFoundError:
        raise
    except Exception:
        return {"error": traceback.format_exc()}


def _is_done(cell: dict[str, Any] | None) -> bool:
    return cell is not None and "error" not in cell


def _outcome(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"[bold red]FAILED[/]: {escape(row['error'].strip().splitlines()[-1])}"
    if "reason" in row:
        return f"none: {escape(row['reason'])}"
    low, high = row["psnr_ci"]
    return f"{row['psnr_db']:.2f} dB ({low:.2f} to {high:.2f}), {row['kept_macs']:.4f} of the MACs"


class _Display:
    """Which cell, how many are done, how long it will take; a line for every cell that is done."""

    def __init__(self, total: int, done: int):
        self.console = Console()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("cells"), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(
            TextColumn("{task.description}"), *columns, console=self.console, speed_estimate_period=24 * 3600
        )
        self.task = self.progress.add_task("starting", total=total, completed=done)

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.progress.stop()
        try:
            yield
        finally:
            self.progress.start()

    def say(self, words: str) -> None:
        self.progress.update(self.task, description=words)

    def advance(self, done: int) -> None:
        self.progress.update(self.task, completed=done)

    def log(self, words: str) -> None:
        self.console.print(words, highlight=False, soft_wrap=True)

    def count(self) -> str:
        """Cells done and minutes left at the pace since the start, other processes' cells included."""
        (task,) = self.progress.tasks
        text = f"{task.completed:.0f} of {task.total:.0f} cells"
        return text if task.time_remaining is None else f"{text}, about {task.time_remaining / 60:.0f} min left"
