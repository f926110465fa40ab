from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from measured import measured_setting, shared_setting
from torch import Tensor

from hgc_learn.calibration import SiteStatistics, site_statistics
from hgc_learn.policies import POLICIES
from hgc_learn.policies.hyca import choose_solvers, cluster_channels, descriptors, hyca, solver_errors
from hgc_learn.predictors.per_channel import CHOICES
from hgc_learn.rollouts import mean_psnr
from hgc_learn.setting import Draft
from hgc_learn.spacing import full_steps

NUM_STEPS = 16
EVERY_OTHER = range(0, NUM_STEPS, 2)


def synthetic_history(*, per_kind: int = 4) -> Tensor:
    """Float64 [steps, channels, values]: channels that are constant, straight lines and parabolas over the steps, with
    other coefficients at every position; a little noise, for no feature is exactly so."""
    generator = torch.Generator().manual_seed(0)

    def rand() -> Tensor:
        return 1 + torch.rand(1, per_kind, 64, generator=generator, dtype=torch.float64)

    t = torch.arange(NUM_STEPS, dtype=torch.float64)[:, None, None] - NUM_STEPS / 2
    kinds = [rand() + 0 * t, rand() + rand() * t, rand() + rand() * t + rand() * t**2]
    history = torch.cat(kinds, dim=1)
    return history + 1e-3 * torch.randn(history.shape, generator=generator, dtype=torch.float64)


def test_every_kind_of_channel_gets_its_solver() -> None:
    statistics = SiteStatistics.of(synthetic_history())
    clusters = cluster_channels(descriptors(statistics), 3)
    assert [len(set(part.tolist())) for part in clusters.split(4)] == [1, 1, 1]
    assert len(set(clusters.tolist())) == 3
    chosen = choose_solvers(solver_errors(statistics, EVERY_OTHER), clusters)
    assert chosen.dtype == torch.uint8
    # With half a spacing to go, AB2 misses a parabola by c k^2, Taylor with backward differences by 2 c k^2.
    assert [CHOICES[i].name for i in chosen[::4]] == ["hold", "linear", "ab2"]


def test_one_cluster_gets_the_solver_with_the_least_error_of_all() -> None:
    errors = torch.tensor([[1.0, 1.0, 9.0], [2.0, 2.0, 2.0], [5.0, 0.0, 5.0]])
    assert choose_solvers(errors, torch.tensor([0, 0, 0])).tolist() == [1, 1, 1]
    assert choose_solvers(errors, torch.tensor([0, 0, 1])).tolist() == [0, 0, 1]
    assert choose_solvers(errors, torch.tensor([0, 1, 2])).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    "full", [EVERY_OTHER, range(0, NUM_STEPS, 5), [0, 1, 4, 6, 7], full_steps(NUM_STEPS, 3, 5), range(NUM_STEPS)]
)
def test_errors_are_those_of_the_forecasts(full: Sequence[int]) -> None:
    history = synthetic_history()
    errors = solver_errors(SiteStatistics.of(history), full)
    expected = torch.zeros_like(errors)
    for step in range(NUM_STEPS):
        computed = [i for i in range(step, -1, -1) if i in full]
        for index, solver in enumerate(CHOICES):
            if step in computed:
                continue
            ages = [step - i for i in computed[: solver.num_values]]
            coefficients = solver.fill(ages, step, {}).coefficients
            forecast = sum(float(c) * history[i] for c, i in zip(coefficients, computed, strict=False))
            expected[index] += (history[step] - forecast).square().sum(1)
    torch.testing.assert_close(errors, expected, rtol=1e-4, atol=1e-6)


def test_descriptors_are_those_of_the_trajectories() -> None:
    history = synthetic_history()
    energy, first, second, ratio, flatness = descriptors(SiteStatistics.of(history)).unbind(1)

    def power(values: Tensor) -> Tensor:
        return values.square().sum(2).mean(0)

    d1, d2, d3 = (power(history.diff(n=n, dim=0)) for n in (1, 2, 3))
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(energy, power(history).log(), **tolerance)
    torch.testing.assert_close(first, (d1 / power(history)).log(), **tolerance)
    torch.testing.assert_close(second, (d2 / power(history)).log(), **tolerance)
    torch.testing.assert_close(ratio, (d3 / d2).log(), **tolerance)
    spectrum = torch.fft.fft(history, dim=0)[1 : NUM_STEPS // 2 + 1].abs().square().sum(2)
    torch.testing.assert_close(flatness, spectrum.log().mean(0) - spectrum.mean(0).log(), **tolerance)
    assert (flatness[:4] > flatness[4:8].max()).all()  # noise about a constant is flat


@pytest.mark.parametrize(
    ("site", "name"), [("last_block", "unet.up_blocks.3.attentions.2:out"), ("prediction", "unet:eps")]
)
def test_the_draft_forecasts_its_site_between_full_steps(site: str, name: str) -> None:
    setting = measured_setting()
    draft = hyca(setting, interval=2, site=site)
    assert draft.sites == {name: "CpCpC"}
    predictor = draft.tensors[f"{name}/predictor"]
    assert predictor.shape == (site_statistics(setting, [name])[name].gram.shape[0],)
    assert 120 > mean_psnr(setting, draft) > mean_psnr(setting, Draft({"unet:eps": "C----"}))
    assert POLICIES["hyca"].schedule(setting, interval=2, site=site).sites == draft.sites


def test_channels_chosen_apart_forecast_no_worse_than_any_solver_for_all() -> None:
    setting = shared_setting()
    name = "unet.up_blocks.3.attentions.2:out"
    statistics = site_statistics(setting, [name])[name]
    errors = solver_errors(statistics, range(0, setting.num_steps, 2))
    chosen = hyca(setting, interval=2, num_clusters=4).tensors[f"{name}/predictor"].long()
    assert float(errors.gather(0, chosen[None]).sum()) <= float(errors.sum(1).min())


@pytest.mark.parametrize("solvers", ["hold", "hold linear", "linear taylor2", "all"])
def test_only_the_solvers_asked_for_are_chosen_from(solvers: str) -> None:
    setting = shared_setting()
    name = "unet.up_blocks.3.attentions.2:out"
    errors = solver_errors(site_statistics(setting, [name])[name], range(0, setting.num_steps, 2)).sum(1).tolist()
    pool = [i for i, choice in enumerate(CHOICES) if solvers == "all" or choice.name in solvers.split()]
    chosen = hyca(setting, interval=2, num_clusters=1, solvers=solvers).tensors[f"{name}/predictor"]
    assert set(chosen.tolist()) == {min(pool, key=errors.__getitem__)}


@pytest.mark.parametrize("first_full", [1, 2, 3])
def test_the_steps_at_the_start_are_full_and_errors_are_of_those_skipped(first_full: int) -> None:
    setting = shared_setting()
    statistics = site_statistics(setting, ["unet:eps"])["unet:eps"]
    draft = hyca(setting, interval=2, first_full=first_full, site="prediction", num_clusters=1)
    assert draft.sites == {"unet:eps": {1: "CpCpC", 2: "CCpCp", 3: "CCCpC"}[first_full]}
    errors = solver_errors(statistics, full_steps(setting.num_steps, 2, first_full)).sum(1)
    assert set(draft.tensors["unet:eps/predictor"].tolist()) == {int(errors.argmin())}


def test_what_candidates_share_does_not_depend_on_their_order() -> None:
    alone, shared = [], measured_setting()
    candidates = [
        {"interval": i, "solvers": s, "num_clusters": n} for n in (1, 4) for s in ("hold", "all") for i in (2, 3)
    ]
    for knobs in candidates:
        setting = measured_setting()
        setting.memo["site_statistics"] = shared.memo.setdefault("site_statistics", {})
        alone.append(hyca(setting, **knobs))
    for knobs, expected in reversed(list(zip(candidates, alone, strict=True))):
        draft = hyca(shared, **knobs)
        assert draft.sites == expected.sites
        assert all(torch.equal(draft.tensors[name], value) for name, value in expected.tensors.items())


def test_no_more_clusters_than_channels() -> None:
    assert len(hyca(shared_setting(), site="prediction", num_clusters=8).tensors["unet:eps/predictor"]) == 4


def test_nothing_is_forecast_at_interval_one() -> None:
    assert hyca(shared_setting(), interval=1) == Draft({})


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"interval": 0}, "interval is 0"),
        ({"first_full": 6}, "first_full is 6; it must be 1 to 5, the steps of the run"),
        ({"num_clusters": 0}, "num_clusters is 0"),
        ({"solvers": ""}, "solvers is ''; it is all or some of hold linear"),
        ({"solvers": "hold cubic"}, "solvers is 'hold cubic'"),
        ({"site": "middle"}, "site is 'middle'; it is one of last_block, prediction"),
    ],
)
def test_wrong_knobs_are_refused(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        POLICIES["hyca"].schedule(shared_setting(), **knobs)
