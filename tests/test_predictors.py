"""Predictors: their formulas, and that the runtime fills in what they say."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import NUM_STEPS, TinyPipeline
from torch import Tensor

from hgc_learn.inference import HGCSchedule, ScheduleError, apply_schedule
from hgc_learn.models.graph import build_graph
from hgc_learn.plan import Load, compile_plan
from hgc_learn.predictors import BY_CODE, PREDICTORS
from hgc_learn.predictors.per_channel import CHOICES
from hgc_learn.runtime.cache import Cache
from hgc_learn.schedule_tensors import tensor_path

EPS, TOKENS = "unet:eps", "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2:out"
CHANNELS = {EPS: 4, TOKENS: 8}
ROW = "CCC??C"


def slopes(values: list[Tensor], spacing: int) -> tuple[Tensor, Tensor]:
    return (values[0] - values[1]) / spacing, (values[1] - values[2]) / spacing


def bdf2(values: list[Tensor], k: int, spacing: int) -> Tensor:
    return 4 / 3 * values[0] - 1 / 3 * values[1] + 2 / 3 * k * slopes(values, spacing)[0]


def taylor2(values: list[Tensor], k: int, spacing: int) -> Tensor:
    a = k / spacing
    return (1 + a + a * a / 2) * values[0] - (a + a * a) * values[1] + a * a / 2 * values[2]


def taylor(order: int) -> Callable[[list[Tensor], int, int], Tensor]:
    def formula(values: list[Tensor], k: int, spacing: int) -> Tensor:
        result = torch.zeros_like(values[0])
        for i in range(min(order + 1, len(values))):
            difference = sum((-1) ** j * math.comb(i, j) * values[j] for j in range(i + 1))
            result = result + (k / spacing) ** i / math.factorial(i) * difference
        return result

    return formula


def ab2(values: list[Tensor], k: int, spacing: int) -> Tensor:
    d0, d1 = slopes(values, spacing)
    return values[0] + k * (1.5 * d0 - 0.5 * d1)


def linear(values: list[Tensor], k: int, spacing: int) -> Tensor:
    return values[0] + k * slopes(values, spacing)[0]


def foca(values: list[Tensor], k: int, spacing: int) -> Tensor:
    forecast = bdf2(values, k, spacing)
    return values[0] + k / 2 * (slopes(values, spacing)[0] + (forecast - values[0]) / k)


def hold(values: list[Tensor], k: int, spacing: int) -> Tensor:
    return values[0]


def mean(values: list[Tensor], k: int, spacing: int) -> Tensor:
    unguided, guided = values[0].chunk(2)
    return torch.cat([(unguided + guided) / 2] * 2)


def per_channel(values: list[Tensor], k: int, spacing: int) -> Tensor:
    axis = 1 if values[0].ndim == 4 else 2
    every = [f(values, k, spacing) for f in (hold, linear, taylor2, ab2, bdf2, foca)]
    channels = [every[c % 6].select(axis, c) for c in range(values[0].shape[axis])]
    return torch.stack(channels, dim=axis)


def scale_shift(values: list[Tensor], k: int, spacing: int) -> Tensor:
    scale, shift = (torch.arange(values[0].shape[1 if values[0].ndim == 4 else 2]) + offset for offset in (1, k))
    shape = (-1, 1, 1) if values[0].ndim == 4 else (-1,)
    return values[0] * scale.view(shape) / 8 + shift.view(shape) / 100


def fitted(values: list[Tensor], k: int, spacing: int) -> Tensor:
    return (1 + k / 8) * values[0] + (k - 1) / 4 * k * slopes(values, spacing)[0]


def fitted_per_channel(values: list[Tensor], k: int, spacing: int) -> Tensor:
    channels = torch.arange(values[0].shape[1 if values[0].ndim == 4 else 2])
    shape = (-1, 1, 1) if values[0].ndim == 4 else (-1,)
    scale, reach = (1 + (channels + k) / 8).view(shape), ((channels - k) / 4).view(shape)
    return scale * values[0] + reach * k * slopes(values, spacing)[0]


def zero(values: list[Tensor], k: int, spacing: int) -> Tensor:
    return torch.zeros_like(values[0])


FORMULAS: dict[str, Callable[[list[Tensor], int, int], Tensor]] = {
    "hold": hold,
    "linear": linear,
    "taylor2": taylor2,
    "taylor3": taylor(3),
    "taylor4": taylor(4),
    "ab2": ab2,
    "bdf2": bdf2,
    "foca": foca,
    "zero": zero,
    "mean": mean,
    "per_channel": per_channel,
    "scale_shift": scale_shift,
    "fitted": fitted,
    "fitted_per_channel": fitted_per_channel,
}
"""By name: fill-in from [F0, F1, ...], spaced evenly, k steps after F0. A new predictor is a row here."""

PARAMETERS: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "per_channel": lambda channels: {"predictor": (torch.arange(channels) % 6).to(torch.uint8)},
    "scale_shift": lambda channels: {
        "scale": ((torch.arange(channels) + 1) / 8).expand(NUM_STEPS, -1).contiguous(),
        # At step 2 + k the shift of channel c is (c + k) / 100.
        "shift": (torch.arange(channels) + torch.arange(NUM_STEPS)[:, None] - 2) / 100,
    },
    "fitted": lambda channels: {
        "scale": 1 + (torch.arange(NUM_STEPS) - 2) / 8,  # at step 2 + k
        "reach": (torch.arange(NUM_STEPS) - 3) / 4,
    },
    "fitted_per_channel": lambda channels: {  # two steps of the row are filled in: k is 1 and 2
        "scale": 1 + (torch.arange(channels) + torch.tensor([[1], [2]])) / 8,
        "reach": (torch.arange(channels) - torch.tensor([[1], [2]])) / 4,
    },
}
NAMES = list(PREDICTORS)
FORECASTS = [name for name in NAMES if not PREDICTORS[name].parameters and name not in ("zero", "mean")]


def test_every_predictor_is_tested() -> None:
    assert set(FORMULAS) == set(PREDICTORS)
    assert len(BY_CODE) == len(PREDICTORS)
    assert "C" not in BY_CODE


@pytest.mark.parametrize("name", FORECASTS)
@given(spacing=st.integers(1, 9), k=st.integers(1, 30))
def test_coefficients_are_the_formulas(name: str, spacing: int, k: int) -> None:
    predictor, values = PREDICTORS[name], list(torch.eye(5, dtype=torch.float64))
    ages = [k + j * spacing for j in range(predictor.num_values)]
    coefficients = predictor.fill(ages, 0, {}).coefficients
    expected = FORMULAS[name](values, k, spacing)[: len(coefficients)]
    torch.testing.assert_close(torch.tensor(coefficients, dtype=torch.float64), expected)


@pytest.mark.parametrize("name", FORECASTS)
@given(ages=st.lists(st.integers(1, 99), min_size=1, max_size=5, unique=True).map(sorted))
def test_what_stands_still_is_forecast_to_stand_still(name: str, ages: list[int]) -> None:
    coefficients = PREDICTORS[name].fill(ages[: PREDICTORS[name].num_values], 0, {}).coefficients
    size = sum(map(abs, coefficients))  # that of high orders is large where steps lie far apart
    assert sum(coefficients) == pytest.approx(1, abs=1e-9 * size)
    goes_on = name.startswith("taylor") or name in ("linear", "ab2")
    if goes_on and len(ages) > 1:  # what moves evenly is forecast to go on so
        assert sum(c * -age for c, age in zip(coefficients, ages, strict=False)) == pytest.approx(0, abs=1e-7 * size)


def test_half_precision_is_rounded_once(small: TinyPipeline) -> None:
    """Term by term, an extrapolation of values that are nearly the same would be of their rounding."""
    cache, load = Cache({EPS: ROW}, {}), Load(EPS, PREDICTORS["taylor2"].code, (2, 1, 0), (2, 1, 0))
    start = 3 + torch.rand(4, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = [(start + step / 16).to(torch.bfloat16) for step in range(3)]
    for step, value in enumerate(values):
        cache.keep(EPS, step, value)
    expected = taylor2([value.double() for value in values[::-1]], 1, 1)
    assert torch.equal(cache.load(load, 3), expected.to(torch.bfloat16))


def schedule_with(tiny: TinyPipeline, name: str, site: str, row: str = ROW) -> HGCSchedule:
    parameters = PARAMETERS[name](CHANNELS[site]) if name in PARAMETERS else {}
    tensors = {f"{site}/{key}": value for key, value in parameters.items()}
    return tiny.schedule({site: row.replace("?", PREDICTORS[name].code)}, tensors=tensors)


@pytest.mark.parametrize("site", [EPS, TOKENS])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "zero"])
def test_the_runtime_fills_in_what_the_formula_says(small: TinyPipeline, name: str, site: str) -> None:
    """Against hooks that replace the module's output at the steps that are filled in."""
    row = ROW if PREDICTORS[name].num_values <= 3 else "CCCCC?"
    last = row.index("?") - 1
    module = small.pipe.unet.get_submodule(TOKENS.partition(":")[0].removeprefix("unet.")) if site == TOKENS else None
    module = module or small.pipe.unet.conv_out
    outputs: list[Tensor] = []

    def hook(module: object, args: object, output: Tensor) -> Tensor:
        outputs.append(output)
        step = len(outputs) - 1
        return FORMULAS[name](outputs[last::-1], step - last, 1) if row[step] == "?" else output

    handle = module.register_forward_hook(hook)
    expected = small()
    handle.remove()
    with apply_schedule(small.pipe, schedule_with(small, name, site, row)):
        torch.testing.assert_close(small(), expected, rtol=1e-3, atol=1e-4)
    if name != "hold":
        with apply_schedule(small.pipe, schedule_with(small, "hold", site, row)):
            assert (small() - expected).abs().max() > 1e-3


def test_zero_drops_guidance(small: TinyPipeline) -> None:
    """As if guidance_scale were 1 from step 3 on."""

    def hook(module: object, args: object, output: Tensor) -> Tensor:
        calls.append(len(output))
        return torch.cat([output[1:]] * 2) if len(calls) > 3 else output

    calls: list[int] = []
    handle = small.pipe.unet.conv_out.register_forward_hook(hook)
    expected = small()
    handle.remove()
    counted: list[int] = []
    handle = small.pipe.unet.conv_in.register_forward_hook(lambda module, args, output: counted.append(len(output)))
    with apply_schedule(small.pipe, small.schedule({"unet:guidance": "CCC000"})) as applied:
        torch.testing.assert_close(small(), expected, rtol=1e-3, atol=1e-4)
        stats = applied.stats()
    handle.remove()
    assert counted == [2, 2, 2, 1, 1, 1]
    assert stats["macs_cached"] == 0.75 * stats["macs_full"]


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_tensors_make_the_round_trip(small: TinyPipeline, name: str, tmp_path: object) -> None:
    path = tmp_path / "schedule.json"  # type: ignore[operator]
    schedule = schedule_with(small, name, TOKENS)
    schedule.save(path)
    loaded = HGCSchedule.load(path)
    assert loaded == schedule
    assert loaded.tensors.keys() == schedule.tensors.keys()
    for key, value in loaded.tensors.items():
        assert torch.equal(value, schedule.tensors[key])
    assert load_file(tensor_path(path)).keys() == schedule.tensors.keys()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "'unet:eps/predictor' is missing"),
        ({"predictor": torch.zeros(4, dtype=torch.uint8), "scale": torch.ones(6, 4)}, "'unet:eps/scale' is not used"),
        ({"predictor": torch.zeros(4)}, r"must be torch.uint8 \[channels\], not torch.float32 \[4\]"),
        ({"predictor": torch.zeros(2, 2, dtype=torch.uint8)}, r"not torch.uint8 \[2, 2\]"),
    ],
)
def test_wrong_tensors_are_refused(small: TinyPipeline, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        small.schedule({EPS: "CCCppC"}, tensors={f"{EPS}/{key}": value for key, value in tensors.items()})


def test_scales_must_be_finite_and_of_every_step(small: TinyPipeline) -> None:
    good = torch.ones(NUM_STEPS, 4)
    for scale, message in ((good[:-1], "of 6 steps"), (good / 0, "not finite")):
        with pytest.raises(ScheduleError, match=message):
            small.schedule({EPS: "CCCssC"}, tensors={f"{EPS}/scale": scale, f"{EPS}/shift": good})


def test_tuned_has_numbers_for_every_fill(small: TinyPipeline) -> None:
    good = torch.ones(2, 4)
    small.schedule({EPS: "CtCCtC"}, tensors={f"{EPS}/scale": good, f"{EPS}/reach": good})
    for row in ("CttCtC", "CtCCCC"):
        with pytest.raises(ScheduleError, match=r"must be torch.float32 \[fills, channels\] of \d fills, not"):
            small.schedule({EPS: row}, tensors={f"{EPS}/scale": good, f"{EPS}/reach": good})


@pytest.mark.parametrize("scale", [0.997, 1.003])
def test_half_precision_fills_in_by_exact_coefficients(small: TinyPipeline, scale: float) -> None:
    """bfloat16 has no number between 0.996 and 1, nor between 1 and 1.0078."""
    graph = build_graph(small.pipe.unet, small.pipe.controlnet)
    plan = compile_plan(graph, {EPS: "CtCCCC"}, NUM_STEPS)
    tensors = {f"{EPS}/scale": torch.full((1, 4), scale), f"{EPS}/reach": torch.zeros(1, 4)}
    cache = Cache({EPS: "CtCCCC"}, tensors)
    kept = torch.randn(2, 4, 8, 8).bfloat16()
    cache.keep(EPS, 0, kept)
    (load,) = plan.steps[1].load
    assert torch.equal(cache.load(load, 1), (scale * kept.float()).bfloat16())


def test_tensors_for_other_channels_or_choices_are_refused(small: TinyPipeline) -> None:
    schedule = small.schedule({EPS: "CCCppC"}, tensors={f"{EPS}/predictor": torch.zeros(5, dtype=torch.uint8)})
    apply_schedule(small.pipe, schedule)
    with pytest.raises(ScheduleError, match="those of 'unet:eps' have 5 channels, it has 4"):
        small()
    wrong = torch.full((4,), len(CHOICES), dtype=torch.uint8)
    with pytest.raises(ScheduleError, match="holds 6; choices are 0 to 5"):
        apply_schedule(small.pipe, small.schedule({EPS: "CCCppC"}, tensors={f"{EPS}/predictor": wrong}))


@pytest.mark.parametrize("change", ["exchanged", "missing", "broken"])
def test_a_tensor_file_that_is_not_the_schedules_is_refused(small: TinyPipeline, change: str, tmp_path: object) -> None:
    path = tmp_path / "schedule.json"  # type: ignore[operator]
    schedule_with(small, "per_channel", EPS).save(path)
    file = tensor_path(path)
    if change == "missing":
        file.unlink()
    elif change == "broken":
        file.write_bytes(file.read_bytes()[:-2])
    else:
        schedule_with(small, "scale_shift", EPS).save(path.with_name("other.json"))
        tensor_path(path.with_name("other.json")).rename(file)
    message = "is not beside it" if change == "missing" else "is not the file that belongs to this schedule"
    with pytest.raises(ScheduleError, match=message):
        HGCSchedule.load(path)


def test_guidance_needs_guidance(small: TinyPipeline) -> None:
    for rows in ({"unet:guidance": "C-----"}, {EPS: "CmCCCC"}):
        with pytest.raises(ScheduleError, match=r"guidance_scale 1\.0 there is only one"):
            small.schedule(rows, guidance_scale=1.0)
