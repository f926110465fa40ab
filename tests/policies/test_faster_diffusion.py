"""Faster-Diffusion: key steps, what runs between them, MACs by hand, and latents against the models' own forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tiny_models import GUIDANCE_SCALE, IMAGE_SIZE, NUM_STEPS, SHAPES, shared_pipeline
from unmeasured import unmeasured_setting

from hgc_learn.inference import apply_schedule
from hgc_learn.policies import POLICIES
from hgc_learn.policies.faster_diffusion import PAPER_KEYS, key_steps
from hgc_learn.sampling import SamplingConfig
from hgc_learn.setting import Setting

FASTER_DIFFUSION = POLICIES["faster_diffusion"]


@pytest.mark.parametrize(
    ("num_steps", "num_keys", "spacing", "expected"),
    [
        (50, None, "paper", list(PAPER_KEYS)),
        (50, 9, "paper", list(PAPER_KEYS)),
        (20, None, "paper", [0, 1, 2, 4, 6, 10, 14]),
        (100, None, "paper", [2 * key for key in PAPER_KEYS]),
        (20, 5, "paper", [0, 1, 2, 4, 10]),  # the curve at 9/5, 18/5, 27/5, 36/5: steps 1.8, 4.2, 12 and 27 of 50
        (20, 5, "uniform", [0, 4, 8, 12, 16]),
        (20, None, "uniform", [0, 2, 5, 8, 11, 14, 17]),
        (1, None, "paper", [0]),
    ],
)
def test_key_steps(num_steps: int, num_keys: int | None, spacing: str, expected: list[int]) -> None:
    assert key_steps(num_steps, num_keys, spacing) == expected


def test_every_number_of_keys_gives_that_many() -> None:
    for num_steps in (1, 2, 7, 20, 50, 64):
        for num_keys in range(1, num_steps + 1):
            for spacing in ("paper", "uniform"):
                steps = key_steps(num_steps, num_keys, spacing)
                assert len(set(steps)) == num_keys
                assert steps == sorted(steps)
                assert steps[0] == 0
                assert steps[-1] < num_steps


def test_the_authors_keys_are_tried(sd15: Setting) -> None:
    """20 steps: `register_faster_forward` has these keys for any number of steps; `mod` is every how many is one."""
    tried = [knobs.get("keys") for knobs in FASTER_DIFFUSION.candidates(sd15)]
    assert (0, 1, 2, 3, 5, 10, 15) in tried
    for mod in (2, 3, 4, 5, 10):
        assert tuple(range(0, 20, mod)) in tried


@pytest.fixture(scope="module")
def sd15() -> Setting:
    return unmeasured_setting("sd15-controlnet")


def macs_by_part(setting: Setting) -> dict[str, int]:
    """MACs of one full step of one picture, with guidance, attention matmuls not counted."""
    parts = {"decoder": 0, "time_embedding": 0, "rest": 0}
    for name, cost in setting.costs.items():
        if name.startswith(("unet.up_blocks.", "unet:eps")):
            parts["decoder"] += 2 * cost.macs
        elif name == "unet.time_embedding":
            parts["time_embedding"] += 2 * cost.macs
        else:
            parts["rest"] += 2 * cost.macs
    return parts


@pytest.mark.parametrize(
    ("knobs", "num_keys"),
    [({"num_keys": 5, "spacing": "uniform"}, 5), ({}, 7), ({"keys": (0, 10)}, 2), ({"num_keys": 20}, 20)],
)
def test_macs_are_the_decoders_at_every_step_and_the_rest_at_keys(
    sd15: Setting, knobs: dict[str, Any], num_keys: int
) -> None:
    draft = FASTER_DIFFUSION.write(sd15, **knobs)
    parts = macs_by_part(sd15)
    expected = 20 * (parts["decoder"] + parts["time_embedding"]) + num_keys * parts["rest"]
    assert sd15.plan(draft).macs(sd15.costs) == expected
    if num_keys == 5:
        assert expected == pytest.approx(11.54e12, rel=1e-3)  # ControlNet and encoder at every fourth step


def test_sites_are_the_skips_the_mid_block_and_their_residuals(sd15: Setting) -> None:
    draft = FASTER_DIFFUSION.write(sd15, keys=(0, 10))
    assert len(draft.sites) == 2 * 13
    assert len([site for site in draft.sites if site.endswith(":control")]) == 13
    assert {"unet.conv_in:out", "unet.mid_block.resnets.1:out"} < set(draft.sites)
    assert set(draft.sites.values()) == {"C---------C---------"}
    plain = unmeasured_setting("sdxl")
    assert len(FASTER_DIFFUSION.write(plain).sites) == 9 + 1


@contextmanager
def encoder_at(pipe: Any, keys: list[int]) -> Iterator[None]:
    """Repeats what ControlNet, encoder and mid block gave at the last key step; the decoder always runs."""
    unet = pipe.unet
    modules = [pipe.controlnet, unet.conv_in, *unet.down_blocks, unet.mid_block]
    step = [-1]

    def repeating(module: Any) -> None:
        forward, kept = module.forward, {}

        def call(*args: Any, **kwargs: Any) -> Any:
            if module is pipe.controlnet:  # the first to be called at a step
                step[0] += 1
            if step[0] in keys:
                kept["result"] = forward(*args, **kwargs)
            return kept["result"]

        module.forward = call

    for module in modules:
        repeating(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@pytest.mark.parametrize("shape", SHAPES)
def test_latents_are_those_of_models_with_a_repeated_encoder(shape: str) -> None:
    tiny = shared_pipeline(shape)
    setting = Setting.of_pipeline(tiny.pipe, SamplingConfig(NUM_STEPS, GUIDANCE_SCALE, IMAGE_SIZE, IMAGE_SIZE))
    with encoder_at(tiny.pipe, [0, 1, 4]):
        reference = tiny()
    with apply_schedule(tiny.pipe, FASTER_DIFFUSION.schedule(setting, keys=(0, 1, 4))):
        latents = tiny()
    assert (latents - reference).norm() < 1e-4 * reference.norm()  # rounding: some 4e-6; other keys: more than 0.4
    assert (tiny() - reference).norm() > 0.1 * reference.norm()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"keys": (1, 2)}, "begin with 0"),
        ({"keys": (0, 20)}, "end at 19"),
        ({"num_keys": 0}, "num_keys is 0"),
        ({"num_keys": 21}, "num_keys is 21"),
    ],
)
def test_refuses(sd15: Setting, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FASTER_DIFFUSION.write(sd15, **knobs)
