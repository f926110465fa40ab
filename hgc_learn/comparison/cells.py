"""Cells: a policy with a sampler at a budget. Where each is kept, what its figures depend on, which are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from hgc_learn.comparison.config import CompareConfig
from hgc_learn.comparison.trained import training_configuration, training_file
from hgc_learn.comparison.tune import combinations
from hgc_learn.files import plain, read_json
from hgc_learn.models.fingerprint import SAME_NORM_TOLERANCE, ModelFingerprint
from hgc_learn.policies import POLICIES
from hgc_learn.sampling import SamplingConfig, load_pipeline
from hgc_learn.schedule_tensors import tensor_path
from hgc_learn.setting import Setting

T = TypeVar("T", str, float)
JUDGED = ("num_calibration", "tolerance")
"""What a cell's figures depend on of the settings for tuning, besides how hard it is tuned."""


@dataclass(frozen=True)
class CellFiles:
    """Where a cell is kept: its figures, its schedule, its wall-clock time."""

    folder: Path
    budget: float

    @property
    def figures(self) -> Path:
        return self.folder / f"{self.budget:g}.json"

    @property
    def schedule(self) -> Path:
        return self.folder / f"{self.budget:g}.schedule.json"

    @property
    def kept(self) -> Path:
        """What an interrupted search had measured."""
        return self.folder / f"{self.budget:g}.kept"

    @property
    def timing(self) -> Path:
        return self.folder / f"{self.budget:g}.timing.json"

    @property
    def weights(self) -> ModelFingerprint | None:
        """Those that its figures are of, if it has any."""
        if not (self.figures.is_file() and self.schedule.is_file()):
            return None
        return ModelFingerprint.from_dict(read_json(self.schedule)["model"])

    def remove(self) -> None:
        for path in (self.figures, self.timing, self.schedule, tensor_path(self.schedule)):
            path.unlink(missing_ok=True)


def cell_files(config: CompareConfig, sampler: str, policy: str, budget: float) -> CellFiles:
    return CellFiles(Path(config.output) / "cells" / sampler / policy, budget)


def protocol(config: CompareConfig, sampler: str) -> dict[str, Any]:
    """What the figures of a cell depend on, besides the policy."""
    return plain(
        {
            "model": config.model,
            **({"data": asdict(config.data)} if config.data else {}),
            "sampling": asdict(config.sampling(sampler)),
            "num_test": config.samplers[sampler].num_test,
            "test_offset": config.test_offset,
            "tuning": asdict(config.tuning),
            "optional_metrics": config.optional_metrics,
        }
    )


def check_weights(
    config: CompareConfig,
    sampler: str,
    held: ModelFingerprint | None = None,
    redone: Collection[tuple[str, str, float]] = (),
) -> None:
    """
    Args:
        held: the weights that `config.model` holds; where they are not given, cells are compared with each other.
        redone: cells that do not matter, for they are run again.

    Raises:
        ValueError: a cell was made with other weights.
    """
    whose = f"{config.model} holds now"
    for policy in config.policy_names:
        for budget in config.budgets:
            files = cell_files(config, sampler, policy, budget)
            if (sampler, policy, budget) in redone or (weights := files.weights) is None:
                continue
            if held is None:
                held, whose = weights, f"{files.figures} was made with"
            elif difference := weights.difference(held, SAME_NORM_TOLERANCE):
                raise ValueError(
                    f"{files.figures} was made with other weights than {whose}: {difference[1]}. Set another output "
                    "(-- --output=DIR), or run all cells of the comparison again (--redo)."
                )


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
    if _what_is_judged(cell["protocol"]) != _what_is_judged(protocol(config, sampler)):
        raise ValueError(
            f"{path} was made with other settings than those asked for now. Set another output (-- --output=DIR), or "
            "run all cells of the comparison again (--redo)."
        )
    return cell


def _what_is_judged(protocol: dict[str, Any]) -> dict[str, Any]:
    """A protocol without how hard knobs were tuned: another effort gives other knobs, not figures of another kind."""
    tuning = {name: protocol["tuning"].get(name) for name in JUDGED}
    return _given(protocol | {"tuning": tuning})


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what is not set: a cell that was made before there was such a setting is as one made without it."""
    given = {name: value for name, value in settings.items() if value is not None}
    return {name: _given(value) if isinstance(value, dict) else value for name, value in given.items()}


def tuned_otherwise(config: CompareConfig, cell: dict[str, Any]) -> str:
    """How a cell was tuned or its policy trained where that is not what is asked for now, as in `max_candidates 24
    instead of 96`; empty if it is, and where tuning made no difference: at most one candidate was within the budget."""
    policy, sampler = POLICIES[cell["policy"]], cell["sampler"]
    if "training" in cell:
        path = training_file(config, sampler, policy.name)
        if not path.is_file() or cell["training"] != training_configuration(config, sampler, policy.name):
            return f"a training by another {path} than is there now"
        trainings = cell.get("num_trainings", 1), config.num_trainings.get(policy.name, 1)
        if trainings[0] != trainings[1]:
            return "{} instead of {} trainings".format(*trainings)
    fixed = [cell.get("fixed", {}), plain(config.fixed.get(policy.name, {}))]
    had = cell.get("settings", {})  # none where nothing was within the budget
    ways = []
    for name, value in _untuned(config, sampler, policy.name).items() if had else ():
        if name not in fixed[0] and had.get(name, "none") != value:
            ways.append(f"{name} {had.get(name, 'none')} instead of {value}")
    if fixed[0] != fixed[1]:
        before, today = (", ".join(f"{name}={value}" for name, value in knobs.items()) or "nothing" for knobs in fixed)
        ways.append(f"{before} fixed instead of {today}")
    num_tried, grid = cell.get("tuning", {}).get("num_tried", 0), _num_combinations(cell)
    if grid and fixed[0] == fixed[1] and grid != (size := _grid_size(config, sampler, policy.name, cell["budget"])):
        ways.append(f"a grid of {grid} instead of {size}")
    then, now = cell["protocol"]["tuning"], protocol(config, sampler)["tuning"]
    compared = {*then, *now} - {*JUDGED, "num_search"}
    if not num_tried and not then.get("max_candidates") == 1 < grid:
        compared = set()
    if policy.searches:
        compared.add("num_search")
    names = [name for name in {**now, **then} if name in compared and then.get(name) != now.get(name)]
    ways += [f"{name} {then.get(name, 'none')} instead of {now.get(name, 'none')}" for name in names]
    return ", ".join(ways)


def _untuned(config: CompareConfig, sampler: str, name: str) -> dict[str, Any]:
    """Knobs of a policy that neither tuning nor the configuration sets, as all its cells have them today."""
    policy = POLICIES[name]
    tuned = set[str]().union(*policy.candidates(_unmeasured(config.model, config.sampling(sampler))))
    given = {*tuned, *config.fixed.get(name, {}), "budget", "ckpt_path", "other_ckpt_paths"}
    return {knob: value for knob, value in policy.knobs.items() if knob not in given}


def _num_combinations(cell: dict[str, Any]) -> int:
    """Of knobs, that there were; 0 if it is not known."""
    number: int = cell.get("tuning", cell).get("num_candidates", 0)
    return number


def _grid_size(config: CompareConfig, sampler: str, policy: str, budget: float) -> int:
    fixed = dict(config.fixed.get(policy, {}))
    if "budget" in POLICIES[policy].knobs:
        fixed["budget"] = budget
    return len(combinations(POLICIES[policy], _unmeasured(config.model, config.sampling(sampler)), fixed))


@cache
def _unmeasured(model: str, sampling: SamplingConfig) -> Setting:
    """What grids may depend on; without weights, for it is kept."""
    return Setting.of_pipeline(load_pipeline(model, sampling, device=torch.device("meta")), sampling)
