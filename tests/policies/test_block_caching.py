from __future__ import annotations

import pytest
import torch
from measured import measured_setting, shared_setting

from hgc_learn.calibration import SiteStatistics, site_statistics
from hgc_learn.inference import apply_schedule
from hgc_learn.policies import POLICIES
from hgc_learn.policies.block_caching import (
    accumulation_row,
    block_caching,
    block_caching_scale_shift,
    least_squares,
)
from hgc_learn.rollouts import mean_psnr


def table_of(steps: list[float]) -> torch.Tensor:
    """Changes [steps, steps] of which only those from one step to the next may be looked at."""
    table = torch.full((len(steps) + 1,) * 2, torch.nan, dtype=torch.float64)
    for i, change in enumerate(steps):
        table[i, i + 1] = change
    return table


@pytest.mark.parametrize(
    ("delta", "row"),
    [
        (0.0, "CCCCCCC"),
        (0.25, "CC-C-CC"),  # 0.5 > 0.25; 0.25 is not; 0.375 is; 0.125 is not; 0.375 is; 0.5 is
        (0.5, "C-C---C"),  # 0.5 is reached twice, which does not exceed it
        (0.875, "C---C--"),
        (9.0, "C------"),
    ],
)
def test_rows_follow_the_given_changes(delta: float, row: str) -> None:
    assert accumulation_row(table_of([0.5, 0.25, 0.125, 0.125, 0.25, 0.5]), delta, "-") == row


def test_least_squares_finds_scale_and_shift_of_each_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(3, 400, generator=generator, dtype=torch.float64)
    source[2] = 2.0  # does not vary
    target = torch.stack([1.5 * source[0] - 3, -0.5 * source[1] + 1, source[2] + 0.25])
    scale, shift = least_squares(SiteStatistics.of(torch.stack([source, target])), source=0, target=1)
    torch.testing.assert_close(scale, torch.tensor([1.5, -0.5, 1.0]))
    torch.testing.assert_close(shift, torch.tensor([-3.0, 1.0, 0.25]))


@pytest.mark.parametrize("controlnet", ["computed", "layers", "residuals"])
def test_the_fit_beats_holding_on_the_calibration_data(controlnet: str) -> None:
    setting = shared_setting()
    held = POLICIES["block_caching"].write(setting, delta=0.3, controlnet=controlnet)
    fitted = POLICIES["block_caching_scale_shift"].write(setting, delta=0.3, controlnet=controlnet)
    assert fitted.sites == {site: row.replace("-", "s") for site, row in held.sites.items() if "-" in row}
    assert fitted.sites
    statistics = site_statistics(setting, list(fitted.sites))
    for site, row in fitted.sites.items():
        measured, scales, shifts = statistics[site], fitted.tensors[f"{site}/scale"], fitted.tensors[f"{site}/shift"]
        for step, code in enumerate(row):
            source = row.rindex("C", 0, step + 1)
            if code == "C":
                assert torch.equal(scales[step], torch.ones_like(scales[step]))
                continue
            error = affine_error(measured, source, step, scales[step].double(), shifts[step].double())
            hold = measured.squared_error(step, {source: 1.0})
            assert (error <= hold * (1 + 1e-4) + 1e-6 * measured.gram[:, step, step]).all(), (site, step)
            assert float(error.sum()) < float(hold.sum()), (site, step)


def affine_error(
    statistics: SiteStatistics, source: int, target: int, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """Per channel, sum of (F_target - scale F_source - shift)^2."""
    linear = (
        statistics.gram[:, target, target]
        - 2 * scale * statistics.gram[:, source, target]
        + scale**2 * statistics.gram[:, source, source]
    )
    return (
        linear
        - 2 * shift * (statistics.total[:, target] - scale * statistics.total[:, source])
        + (statistics.count * shift**2)
    )


def test_a_single_reused_block_is_filled_in_by_the_fit_in_real_runs() -> None:
    """Up to the step of reuse the run is the uncached one, so the fit must show in the result."""
    setting = measured_setting()
    schedule = POLICIES["block_caching_scale_shift"].schedule(setting, delta=0.3)
    with apply_schedule(setting.pipe, schedule) as handle:
        assert handle.stats()["macs_reduction"] == pytest.approx(1 - setting.kept(block_caching(setting, delta=0.3)))
    fitted = mean_psnr(setting, block_caching_scale_shift(setting, delta=0.3))
    held = mean_psnr(setting, block_caching(setting, delta=0.3))
    assert held < fitted < 120


def test_thresholds_span_everything_from_all_to_almost_nothing() -> None:
    setting = shared_setting()
    assert setting.kept(block_caching(setting, delta=0.0)) == 1
    residuals = block_caching(setting, delta=1e9, controlnet="residuals")
    assert setting.kept(residuals) < 0.5 * setting.kept(block_caching(setting, delta=1e9, controlnet="computed"))


def test_transformers_may_be_all_that_is_reused() -> None:
    draft = block_caching(shared_setting(), delta=1e9, controlnet="computed", blocks="transformers")
    assert draft.sites
    assert all(".attentions." in site for site in draft.sites)


def test_a_negative_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="delta is -1"):
        block_caching(shared_setting(), delta=-1)
