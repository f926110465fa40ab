"""Intervals, metrics and tuning decisions on values that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import skew
from torch import Tensor
from torch.utils.data import default_collate

from hgc_learn.comparison.config import TuningConfig
from hgc_learn.comparison.metrics import Obedience, SceneFID, closeness_figures, optional_metric
from hgc_learn.comparison.statistics import mean_interval, paired_difference
from hgc_learn.comparison.tune import Candidate, best, shortlist
from hgc_learn.demo.metrics import ColorAccuracy, ControlMeanIoU
from hgc_learn.demo.scenes import SceneDataset
from hgc_learn.evaluation import Samples, closeness
from hgc_learn.setting import Draft


def test_interval_of_a_mean_is_about_1_96_standard_errors() -> None:
    values = np.random.default_rng(1).normal(30, 4, size=400)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1)
    assert high == pytest.approx(values.mean() + half, abs=0.1)


def test_intervals_cover_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(5)
    intervals = [mean_interval(rng.normal(0, 1, size=64)) for _ in range(400)]
    assert 0.92 <= np.mean([low <= 0 <= high for low, high in intervals]) <= 0.98


def test_interval_ends_vary_by_less_than_the_last_printed_digit() -> None:
    """Around those of infinitely many resamples, by the expansion of Cornish and Fisher; dB, with about as many samples
    and as much between them as in the comparison."""
    rng = np.random.default_rng(6)
    errors = []
    for _ in range(40):
        values = rng.normal(35, 4, size=256)
        error, skewness = values.std() / 16, skew(values) / 16
        for end, z in zip(mean_interval(values), (-1.96, 1.96), strict=True):
            errors.append(end - values.mean() - error * (z + (z**2 - 1) * skewness / 6))
    assert np.sqrt(np.mean(np.square(errors))) < 0.01


def test_equal_values_have_an_interval_of_one_point() -> None:
    assert mean_interval([120.0] * 5) == (120.0, 120.0)


def test_pairing_tells_apart_what_unpaired_intervals_do_not() -> None:
    rng = np.random.default_rng(2)
    difficulty = rng.normal(30, 5, size=100)
    better = difficulty + 0.5 + rng.normal(0, 0.2, size=100)
    difference, (low, high) = paired_difference(better, difficulty)
    assert difference == pytest.approx(0.5, abs=0.1)
    assert 0 < low < difference < high
    assert mean_interval(better)[0] < mean_interval(difficulty)[1]


def noisy_scenes(num_scenes: int = 12) -> tuple[dict, Tensor]:
    dataset = SceneDataset("validation", num_scenes)
    batch = default_collate([dataset[index] for index in range(num_scenes)])
    noise = 0.15 * torch.randn(batch["image"].shape, generator=torch.Generator().manual_seed(0))
    return batch, (batch["image"] / 2 + 0.5 + noise).clamp(0, 1)


def test_obedience_is_what_the_metrics_say_of_the_whole_set() -> None:
    batch, pictures = noisy_scenes()
    obedience = Obedience.of(pictures, [batch])
    figures = obedience.figures(obedience)
    for name, metric in (("control_miou", ControlMeanIoU()), ("color_accuracy", ColorAccuracy())):
        expected = float(metric(pictures, batch["label_map"], batch["object_colors"]))
        assert figures[name] == pytest.approx(expected)
        low, high = figures[f"{name}_ci"]
        assert low <= expected <= high
        assert figures[f"{name}_relative_loss"] == 0
        assert figures[f"{name}_relative_loss_ci"] == (0, 0)
    assert figures["control_miou_ci"][0] < figures["control_miou_ci"][1]


def test_relative_loss_is_paired() -> None:
    batch, pictures = noisy_scenes()
    clean = Obedience.of(batch["image"] / 2 + 0.5, [batch])
    figures = Obedience.of(pictures, [batch]).figures(clean)
    low, high = figures["control_miou_relative_loss_ci"]
    assert 0 < low < figures["control_miou_relative_loss"] < high < 1


def test_closeness_to_itself_and_to_a_shifted_picture() -> None:
    full = Samples(torch.ones(3, 4, 2, 2), torch.full((3, 3, 64, 64), 0.5))
    same = closeness_figures(closeness(full, full))
    assert (same["psnr_db"], same["ssim"], same["latent_rel_l2"]) == (120.0, 1.0, 0.0)
    shifted = closeness(Samples(1.5 * full.latents, full.pictures + 0.1), full)
    assert shifted["psnr_db"].tolist() == pytest.approx([20.0] * 3, abs=1e-3)
    assert shifted["latent_rel_l2"].tolist() == pytest.approx([0.5] * 3)


def test_fid_of_the_same_pictures_is_zero_and_grows_with_noise() -> None:
    _, noisy = noisy_scenes(96)
    dataset = SceneDataset("validation", 96)
    pictures = torch.stack([dataset[index]["image"] for index in range(96)]) / 2 + 0.5
    fid = SceneFID(pictures)
    same, slightly, much = fid(pictures), fid(0.9 * pictures + 0.1 * noisy), fid(noisy)
    assert same == pytest.approx(0, abs=1e-3)
    assert same < slightly < much
    assert fid(pictures) == same  # nothing is left over from the calls before


def test_metrics_without_weights_say_what_is_needed() -> None:
    with pytest.raises(ValueError, match="Hugging Face cache"):
        optional_metric("clip")
    with pytest.raises(ValueError, match="torchvision"):
        optional_metric("lpips")
    with pytest.raises(ValueError, match="not one of lpips, clip"):
        optional_metric("beauty")


def candidate(kept: float, **knobs: object) -> Candidate:
    return Candidate(knobs, Draft({}), kept)


def test_shortlist_is_within_the_budget_and_spread() -> None:
    tuning = TuningConfig(max_candidates=4, tolerance=0.002)
    offered = [
        candidate(0.49, interval=2, predictor="hold"),
        candidate(0.48, interval=3, predictor="hold"),
        candidate(0.47, interval=4, predictor="hold"),
        candidate(0.502, interval=2, predictor="linear"),
        candidate(0.503, interval=1, predictor="linear"),
        candidate(0.2, interval=9, predictor="linear"),
    ]
    # After the closest of each variant, of those about as close the one whose knobs differ most.
    assert [c.kept for c in shortlist(offered, 0.5, tuning)] == [0.502, 0.49, 0.2, 0.47]


DEFAULT = TuningConfig(max_candidates=96, num_screening_scenes=2, num_scenes=32)


@pytest.mark.parametrize(
    ("tuning", "num_candidates", "rounds"),
    [
        (DEFAULT, 96, [(96, range(2)), (48, range(2, 4)), (24, range(4, 8)), (12, range(8, 16)), (6, range(16, 32))]),
        (DEFAULT, 10, [(10, range(19)), (5, range(19, 32))]),
        (DEFAULT, 7, [(7, range(27)), (4, range(27, 32))]),
        (DEFAULT, 6, [(6, range(32))]),
        (DEFAULT, 2, [(2, range(32))]),
        (DEFAULT, 1, []),
        (TuningConfig(4, 1, 3), 4, [(4, range(1)), (2, range(1, 2))]),  # one is left before it has seen all
        (TuningConfig(3, 2, 2), 3, [(3, range(2))]),
        (TuningConfig(5, 1, 4), 5, [(5, range(1)), (2, range(1, 2))]),  # 5 pictures are no more for 3 than for 5
    ],
)
def test_rounds_share_the_same_number_of_pictures(
    tuning: TuningConfig, num_candidates: int, rounds: list[tuple[int, range]]
) -> None:
    calls: list[tuple[int, range]] = []

    def judge(c: Candidate, scenes: range) -> list[float]:
        calls.append((c.knobs["n"], scenes))
        return [float(c.knobs["n"])] * len(scenes)

    chosen, num_tried = best([candidate(0.5, n=n) for n in range(num_candidates)], tuning, judge)
    assert chosen.knobs == {"n": num_candidates - 1}
    assert num_tried == (num_candidates if num_candidates > 1 else 0)
    assert [scenes for _, scenes in calls] == [scenes for number, scenes in rounds for _ in range(number)]
    if len(rounds) > 1:  # the better half goes on
        assert {n for n, scenes in calls if scenes == rounds[1][1]} == set(range(num_candidates)[-rounds[1][0] :])
    assert sum(len(scenes) for _, scenes in calls) <= len(rounds) * tuning.max_candidates * tuning.num_screening_scenes


def test_candidates_are_judged_by_the_mean_of_all_scenes_that_they_have_seen() -> None:
    psnr = {
        "late": [30.0, 33.0, 33.0, 33.0],  # better on the last scenes, not on all
        "even": [40.0, 36.0, 30.0, 30.0],
        "lost": [50.0, 50.0, float("nan"), 50.0],
        "soon lost": [math.inf, 50.0, 50.0, 50.0],
        "poor": [20.0, 20.0, 20.0, 20.0],
    }
    offered = [candidate(0.5, name=name) for name in psnr]

    def judge(c: Candidate, scenes: range) -> list[float]:
        assert c.knobs["name"] in ("late", "even", "lost") or scenes.start == 0
        return psnr[c.knobs["name"]][scenes.start : scenes.stop]

    tuning = TuningConfig(max_candidates=5, num_screening_scenes=2, num_scenes=4)
    assert best(offered, tuning, judge)[0].knobs == {"name": "even"}


def test_where_all_are_lost_one_is_chosen_nevertheless() -> None:
    offered = [candidate(0.5, n=n) for n in range(3)]
    chosen, num_tried = best(offered, DEFAULT, lambda c, scenes: [math.nan] * len(scenes))
    assert chosen is offered[0]
    assert num_tried == 3
