"""The cells of a sampler and budget in order, and which of them the test set can tell apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hgc_learn.comparison.cells import Selection, cell_files, check_weights, read_cell
from hgc_learn.comparison.config import CompareConfig
from hgc_learn.comparison.statistics import Interval, paired_difference
from hgc_learn.files import read_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Ranking:
    """The cells of one sampler and budget, best PSNR first.

    Attributes:
        cells: with figures.
        gaps: mean paired difference in PSNR to the first and its interval, per cell.
        others: cells without figures: `reason` or `error`.
    """

    sampler: str
    budget: float
    cells: list[Row]
    gaps: list[tuple[float, Interval]]
    others: list[Row]

    @classmethod
    def of(cls, sampler: str, budget: float, cells: list[Row]) -> Ranking:
        ranked = sorted((cell for cell in cells if "psnr_db" in cell), key=lambda cell: -cell["psnr_db"])
        gaps = [paired_difference(_psnr(cell), _psnr(ranked[0])) for cell in ranked]
        return cls(sampler, budget, ranked, gaps, [cell for cell in cells if "psnr_db" not in cell])

    @property
    def winners(self) -> list[str]:
        """The best policy and all that the test set does not tell from it."""
        return [
            cell["policy"]
            for index, (cell, (_, (low, high))) in enumerate(zip(self.cells, self.gaps, strict=True))
            if index == 0 or low <= 0 <= high
        ]

    @property
    def same_pictures(self) -> list[list[str]]:
        """Policies whose tuned schedules do the same, best first: they agree on every sample."""
        policies: dict[tuple[float, ...], list[str]] = {}
        for cell in self.cells:
            policies.setdefault(tuple(_psnr(cell)), []).append(cell["policy"])
        return [names for names in policies.values() if len(names) > 1]

    def lead(self, policy: str) -> tuple[str, float, Interval] | None:
        """The best other policy, and the mean paired difference in PSNR of `policy` to it, with its interval."""
        own = next((cell for cell in self.cells if cell["policy"] == policy), None)
        other = next((cell for cell in self.cells if cell["policy"] != policy), None)
        if own is None or other is None:
            return None
        return other["policy"], *paired_difference(_psnr(own), _psnr(other))


def collect(config: CompareConfig) -> tuple[list[Ranking], int]:
    """All cells of the configuration by sampler and budget, and the number of those that have not been run.

    Raises:
        ValueError: some were made with other settings than those asked for, or with other weights than others.
    """
    rankings, num_missing = [], 0
    for sampler in config.samplers:
        check_weights(config, sampler)
        for budget in config.budgets:
            cells = [read_cell(config, *cell) for cell in Selection([sampler], config.policy_names, [budget]).cells()]
            num_missing += cells.count(None)
            rankings.append(Ranking.of(sampler, budget, [cell for cell in cells if cell is not None]))
    return rankings, num_missing


NOT_PUBLIC = ("samples", "protocol", "training")


def public_rows(config: CompareConfig, ranking: Ranking) -> list[Row]:
    """What the JSON file says of each cell: all but the figures of single samples, and the settings."""
    rows = []
    for cell, (gap, interval) in zip(ranking.cells, ranking.gaps, strict=True):
        row = {name: value for name, value in cell.items() if name not in NOT_PUBLIC}
        row |= {"gap_to_best_db": round(gap, 4), "gap_to_best_ci": [round(bound, 4) for bound in interval]}
        files = cell_files(config, ranking.sampler, cell["policy"], ranking.budget)
        row["architecture"] = weights.architecture if (weights := files.weights) else {}
        rows.append(row | (read_json(files.timing) if files.timing.is_file() else {}))
    for cell in ranking.others:
        row = {name: value for name, value in cell.items() if name not in NOT_PUBLIC}
        rows.append(row | ({"error": cell["error"].strip().splitlines()[-1]} if "error" in cell else {}))
    return rows


def _psnr(cell: Row) -> list[float]:
    values: list[float] = cell["samples"]["psnr_db"]
    return values
