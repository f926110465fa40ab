"""A comparison's settings, and who has won by its cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hgc_learn.comparison.cells import Selection
from hgc_learn.comparison.config import read_config
from hgc_learn.comparison.ranking import Ranking
from hgc_learn.policies import POLICIES

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    "key",
    [
        *("budgets=[1.5]", "policies=[magic]", "grid.budget=0.9", "samplers.DDIM-50.num_test=1"),
        *("tuning.max_candidates=0", "tuning.num_screening_scenes=0", "tuning.num_scenes=1"),
        *("fixed={deepcache: {spacing: quadratc}}", "fixed={deepcache: {space: 1}}", "fixed={magic: {}}"),
    ],
)
def test_wrong_settings_are_named(key: str) -> None:
    with pytest.raises(ValueError, match=key.partition("=")[0].partition(".")[0]):
        read_config(ROOT / "configs/compare/demo.yaml", [f"--{key}"])


def test_the_demonstration_compares_all_policies() -> None:
    config = read_config(ROOT / "configs/compare/demo.yaml")
    assert config.policy_names == sorted(POLICIES)
    assert config.budgets == [0.50, 0.37, 0.25, 0.15]
    assert {name: sampler.num_test for name, sampler in config.samplers.items()} == {"UniPC-20": 256, "DDIM-50": 128}
    with pytest.raises(ValueError, match="no sampler Euler"):
        Selection.of(config, samplers=["Euler"])


def cell(policy: str, psnr: list[float]) -> dict[str, Any]:
    return {"policy": policy, "psnr_db": sum(psnr) / len(psnr), "samples": {"psnr_db": psnr}}


def test_ranking_names_ties_and_the_lead() -> None:
    base = [30.0, 31, 25, 40, 33, 28, 36, 31]
    noisy = [x + d for x, d in zip(base, [1, -1, 2, -2, 1, -1, 1, -1], strict=True)]
    ranking = Ranking.of("s", 0.5, [cell("learned", [x - 1 for x in base]), cell("a", base), cell("b", noisy)])
    assert set(ranking.winners) == {"a", "b"}
    assert ranking.cells[-1]["policy"] == "learned"
    lead = ranking.lead("learned")
    assert lead is not None
    name, gap, (low, high) = lead
    assert name in ("a", "b")
    assert gap == pytest.approx(-1)
    assert low <= gap <= high


def test_policies_that_were_tuned_to_the_same_pictures_are_named() -> None:
    base = [30.0, 31, 25]
    cells = [cell("a", base), cell("b", [30.5, 31, 25]), cell("c", base), cell("d", [31.0, 30, 25])]
    assert Ranking.of("s", 0.5, cells).same_pictures == [["a", "c"]]
