from __future__ import annotations

import pytest
import torch
from measured import shared_setting

from hgc_learn.calibration import site_statistics
from hgc_learn.policies import POLICIES
from hgc_learn.policies.smoothcache import layer_type, skip_row, smoothcache


def errors(*, lag_1: list[float], lag_2: list[float], lag_3: list[float]) -> torch.Tensor:
    """[8, 8] from the errors of holding step i's value for 1, 2 and 3 steps."""
    table = torch.full((8, 8), torch.inf, dtype=torch.float64)
    for lag, values in enumerate((lag_1, lag_2, lag_3), start=1):
        for i, value in enumerate(values):
            table[i, i + lag] = value
    return table


TABLE = errors(
    lag_1=[0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
    lag_2=[0.9, 0.2, 0.9, 0.2, 0.2, 0.2],
    lag_3=[0.9, 0.3, 0.9, 0.9, 0.3],
)


@pytest.mark.parametrize(
    ("alpha", "max_skip", "row"),
    [
        (0.05, 3, "CCCCCCCC"),
        (0.1, 3, "CC-C-C-C"),
        (0.2, 3, "CC--C--C"),
        (0.3, 3, "CC---C-C"),  # the last step is forced
        (0.3, 1, "CC-C-C-C"),
        (1.0, 3, "C---C--C"),
    ],
)
def test_rows_follow_the_given_errors(alpha: float, max_skip: int, row: str) -> None:
    assert skip_row(TABLE, alpha, max_skip) == row


def test_a_longer_skip_needs_its_own_error_only() -> None:
    table = errors(lag_1=[0.9] * 7, lag_2=[0.1] * 6, lag_3=[0.9] * 5)
    assert skip_row(table, 0.1, 3) == "C--C--CC"


def test_layers_of_a_type_share_the_row_of_their_mean_error() -> None:
    setting = shared_setting()
    draft = smoothcache(setting, alpha=0.3, grouping="type", controlnet="layers")
    types = {layer_type(site) for site in draft.sites}
    assert types == {
        f"{model} {kind}" for model in ("unet", "controlnet") for kind in ("attn1", "attn2", "ff", "resnet", "sampler")
    }
    for kind in types:
        members = [site for site in draft.sites if layer_type(site) == kind]
        changes = [statistics.change() for statistics in site_statistics(setting, members).values()]
        assert {draft.sites[site] for site in members} == {skip_row(sum(changes) / len(changes), 0.3, 3)}


def test_residuals_are_the_controlnets_layers_where_asked_for() -> None:
    draft = smoothcache(shared_setting(), alpha=0.3, controlnet="residuals")
    assert {layer_type(s) for s in draft.sites if not s.startswith("unet.")} == {"controlnet control"}


@pytest.mark.parametrize("grouping", ["type", "layer"])
@pytest.mark.parametrize("controlnet", ["computed", "layers", "residuals"])
def test_a_higher_threshold_keeps_less(grouping: str, controlnet: str) -> None:
    setting = shared_setting()
    kept = [
        setting.kept(smoothcache(setting, alpha=alpha, max_skip=19, grouping=grouping, controlnet=controlnet))
        for alpha in (0.0, 1e9)
    ]
    assert kept[0] == 1
    assert kept[1] < 0.75


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"max_skip": 0}, "max_skip 0"),
        ({"grouping": "block"}, "grouping is 'block'; it is one of type, layer"),
    ],
)
def test_wrong_knobs_are_refused(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        POLICIES["smoothcache"].schedule(shared_setting(), **knobs)
