"""Runs the cells that are missing, one policy with one sampler at a time; any number of processes may share them."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hgc_learn.comparison.cells import Bench, PolicyBench, cell_files, protocol
from hgc_learn.comparison.config import CompareConfig
from hgc_learn.comparison.samples import claim
from hgc_learn.comparison.trained import training_configuration, training_file
from hgc_learn.comparison.tune import plain
from hgc_learn.files import read_json, save_json
from hgc_learn.policies import POLICIES

T = TypeVar("T", str, float)
JUDGED = ("num_calibration", "tolerance")
"""What a cell's figures depend on of the settings for tuning, besides how hard it is tuned."""


@dataclass(frozen=True)
class Selection:
    """The cells that a process is to run."""

    samplers: Sequence[str]
    policies: Sequence[str]
    budgets: Sequence[float]

    @classmethod
    def of(
        cls,
        config: CompareConfig,
        samplers: Sequence[str] | None = None,
        policies: Sequence[str] | None = None,
        budgets: Sequence[float] | None = None,
    ) -> Selection:
        """All cells of the configuration, or those that are named.

        Raises:
            ValueError: a name that the configuration does not have.
        """
        return cls(
            _known("sampler", samplers, list(config.samplers)),
            _known("policy", policies, config.policy_names),
            _known("budget", budgets, config.budgets),
        )

    def cells(self) -> Iterator[tuple[str, str, float]]:
        for sampler in self.samplers:
            for policy in self.policies:
                for budget in self.budgets:
                    yield sampler, policy, budget


def _known(what: str, asked: Sequence[T] | None, known: Sequence[T]) -> Sequence[T]:
    for name in asked or ():
        if name not in known:
            raise ValueError(f"The configuration has no {what} {name}; it has {', '.join(map(str, known))}.")
    return asked or known


def read_cell(config: CompareConfig, sampler: str, policy: str, budget: float) -> dict[str, Any] | None:
    """What is known of a cell: figures, `reason` or `error`; None if it has not been run.

    Raises:
        ValueError: it was run with other settings than now, but for those of `tuned_otherwise`.
    """
    path = cell_files(config, sampler, policy, budget).figures
    if not path.is_file():
        return None
    cell = read_json(path)
    fixed = plain(config.fixed.get(policy, {}))
    if "fixed" in cell or "settings" not in cell:
        other_knobs = cell.get("fixed", fixed) != fixed
    else:  # earlier cells say what was chosen alone
        other_knobs = any(cell["settings"].get(name) != value for name, value in fixed.items())
    if _what_is_judged(cell["protocol"]) != _what_is_judged(protocol(config, sampler)) or other_knobs:
        raise ValueError(
            f"{path} was made with other settings than those asked for now. Set another output (-- --output=DIR), or "
            "run all cells of the comparison again (--redo)."
        )
    return cell


def _what_is_judged(protocol: dict[str, Any]) -> dict[str, Any]:
    """A protocol without how hard knobs were tuned: another effort gives other knobs, not figures of another kind."""
    tuning = {name: protocol["tuning"].get(name) for name in JUDGED}
    return protocol | {"tuning": tuning}


def tuned_otherwise(config: CompareConfig, cell: dict[str, Any]) -> str:
    """How a cell was tuned or its policy trained where that is not what is asked for now, as in `max_candidates 24
    instead of 96`; empty if it is, and where tuning made no difference: at most one candidate was within the budget."""
    if "training" in cell:
        which = config, cell["sampler"], cell["policy"]
        if not (path := training_file(*which)).is_file() or cell["training"] != training_configuration(*which):
            return f"a training by another {path} than is there now"
    record = cell.get("tuning", {"num_tried": 0, "num_candidates": 0})
    then, now = cell["protocol"]["tuning"], protocol(config, cell["sampler"])["tuning"]
    if not record["num_tried"] and not then.get("max_candidates") == 1 < record["num_candidates"]:
        return ""
    names = [name for name in {**now, **then} if name not in JUDGED and then.get(name) != now.get(name)]
    return ", ".join(f"{name} {then.get(name, 'none')} instead of {now.get(name, 'none')}" for name in names)


def run_comparison(config: CompareConfig, selection: Selection) -> None:
    """Runs every selected cell that has no figures and no reason yet. An exception in a cell is kept in its file, told,
    and tried again by the next run. Cells that were tuned with other settings are told and kept."""
    torch.set_flush_denormal(True)  # arithmetic with denormal numbers is many times slower on CPUs
    cells = list(selection.cells())
    total = len(cells)

    def num_done() -> int:
        return sum(_is_done(read_cell(config, *cell)) for cell in cells)

    with _Display(total, num_done()) as display:
        for line in _other_tunings(config, cells):
            display.log(line)
        for sampler in selection.samplers:
            bench: Bench | None = None
            for policy in selection.policies:
                lock = Path(config.output) / "cells" / sampler / policy / "lock"
                with claim(lock) as mine:
                    missing = [b for b in selection.budgets if not _is_done(read_cell(config, sampler, policy, b))]
                    if not mine or not missing:
                        continue
                    if bench is None:
                        display.say(f"{sampler}: drawing scenes")
                        bench = Bench(config, sampler)
                    _run_policy(bench, policy, missing, display, num_done)


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
    bench: Bench, policy: str, budgets: Sequence[float], display: _Display, num_done: Callable[[], int]
) -> None:
    where = f"{bench.sampler} {policy}"
    policy_bench = PolicyBench(bench, POLICIES[policy], lambda words: display.say(f"{where}: {words}"))
    training: dict[str, Any] = {}
    if policy_bench.needs_checkpoint:
        with display.paused():  # training has a display of its own
            training = _attempt(lambda: {"ckpt_path": policy_bench.ckpt_path})
    for budget in budgets:
        where = f"{bench.sampler} {policy} {budget:g}"
        start = time.monotonic()
        row = training if "error" in training else _attempt(partial(policy_bench.run, budget))
        if "error" in row:
            row = {"policy": policy, "sampler": bench.sampler, "budget": budget, **row}
            row["protocol"] = protocol(bench.config, bench.sampler)
        save_json(cell_files(bench.config, bench.sampler, policy, budget).figures, row)
        display.advance(num_done())
        display.log(f"{where}: {_outcome(row)} ({time.monotonic() - start:.0f} s; {display.count()})")


def _attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `action` returns, or its traceback as `error`. Ctrl-C passes."""
    try:
        return action()
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
