"""The reconstruction of HGC against module hooks on a loop written out, and its MACs worked out by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from attention_pipelines import (
    NUM_STEPS,
    build,
    denoise,
    distance,
    run,
    run_policy,
    sd15_attention_macs,
)
from tiny_models import IMAGE_SIZE
from torch import Tensor
from torch.utils._pytree import tree_map
from unmeasured import unmeasured_setting

from hgc_learn.policies import POLICIES
from hgc_learn.sampling import SamplingConfig
from hgc_learn.setting import Setting
from hgc_learn.sites import select_sites

TOLERANCE = 1e-5
NUM_LEVELS = 4


def hook_models(
    pipe: Any, *, interval: int, encoder: bool, fresh_decoder_blocks: int, cross_interval: int, gate: int
) -> Any:
    """Makes the models' own modules give their last output where the rule reuses it. Modules that need not run do run,
    for nothing. Returns what `denoise` calls before each step."""
    now = {"step": 0}
    decoder_blocks = NUM_LEVELS - fresh_decoder_blocks  # that are held

    def is_key() -> bool:
        return now["step"] % interval == 0

    def hold(is_computed: Callable[[], bool], fill_in: Callable[[Tensor], Tensor]) -> Any:
        kept: dict[str, Any] = {}

        def hook(module: Any, args: Any, output: Any) -> Any:
            if is_computed():
                kept["output"] = output
                return output
            return tree_map(fill_in, kept["output"])

        return hook

    def guided_half(x: Tensor) -> Tensor:
        return x[2:] if len(x) == 4 and now["step"] >= gate else x  # two pictures, two halves

    def mean_of_halves(x: Tensor) -> Tensor:
        return (x[:2] + x[2:]) / 2 if now["step"] >= gate else x

    def is_needed(path: str) -> bool:
        """Whether anything but held blocks depends on it when it is not the turn of all."""
        level = int(re.findall(r"\d+", path)[0])
        if path.startswith("up_blocks"):
            return level >= decoder_blocks
        if path.startswith("mid_block"):
            return not encoder and decoder_blocks == 0
        return not encoder and level < NUM_LEVELS - decoder_blocks

    def hook_cross_attention(path: str, module: Any) -> None:
        def is_computed() -> bool:
            i = now["step"]
            return i < gate and (i % cross_interval == 0 or i == gate - 1) and (is_key() or is_needed(path))

        module.register_forward_hook(hold(is_computed, mean_of_halves))

    for model in (pipe.unet, pipe.controlnet):
        for path, module in model.named_modules():
            if path.endswith(".attn2"):
                hook_cross_attention(path, module)
    if encoder:
        for module in (pipe.controlnet, pipe.unet.conv_in, *pipe.unet.down_blocks, pipe.unet.mid_block):
            module.register_forward_hook(hold(is_key, guided_half))
    if decoder_blocks:
        pipe.unet.up_blocks[decoder_blocks - 1].register_forward_hook(hold(is_key, guided_half))
    return lambda i: now.update(step=i)


@pytest.mark.parametrize(
    ("interval", "encoder", "fresh_decoder_blocks", "cross_interval", "gate"),
    [
        (4, True, 2, 2, 7),
        (3, True, 4, 1, 5),
        (5, True, 1, 3, 1),
        (2, False, 1, 3, 4),
        (3, False, 3, 2, NUM_STEPS + 5),
        (1, True, 2, 1, 6),  # the gate alone
    ],
)
def test_latents_equal_hooked_modules(
    interval: int, encoder: bool, fresh_decoder_blocks: int, cross_interval: int, gate: int
) -> None:
    tiny = build(controlnet=True, shape="sd15")
    full = run(tiny)
    knobs = {
        "interval": interval,
        "encoder": encoder,
        "fresh_decoder_blocks": fresh_decoder_blocks,
        "cross_interval": cross_interval,
        "gate": gate,
    }
    ours = run_policy(tiny, "hgc", knobs)
    expected = denoise(tiny, gate, hook_models(tiny.pipe, **knobs))
    assert distance(ours, expected) < TOLERANCE
    assert distance(expected, full) > 100 * TOLERANCE


def test_without_guidance_nothing_is_averaged_or_dropped() -> None:
    tiny = build(controlnet=True, shape="sd15")
    setting = Setting.of_pipeline(tiny.pipe, SamplingConfig(NUM_STEPS, 1.0, IMAGE_SIZE, IMAGE_SIZE))
    draft = POLICIES["hgc"].write(setting, gate=3)
    assert setting.graph.guidance not in draft.sites
    assert set("".join(draft.sites.values())) == {"C", "-"}


def test_default_costs_what_the_paper_says() -> None:
    """6.70T, and by hand: interval 3, three of four decoder blocks held, cross-attention every second step, gate 13."""
    setting = unmeasured_setting("sd15-controlnet")
    plan = setting.plan(POLICIES["hgc"].write(setting))
    macs = plan.macs(setting.costs)
    assert macs == pytest.approx(6.70e12, rel=0.01)

    step = sum(cost.macs for cost in setting.costs.values())
    rest = ("unet.time_embedding", "unet.up_blocks.3.", "unet:eps")
    shallow = sum(cost.macs for name, cost in setting.costs.items() if name.startswith(rest))
    cross = sd15_attention_macs(controlnet=True)[1]
    shallow_cross = sum(setting.costs[s].macs for s in select_sites(setting.graph, ["unet.up_blocks.3.*.attn2:out"]))
    # Whole steps: 0, 3, 6, 9, 12, of which 3 and 9 reuse cross-attention, as 1, 5, 7, 11 do of the others.
    before = 5 * step - 2 * cross + 8 * shallow - 4 * shallow_cross
    after = 2 * (step - cross) + 5 * (shallow - shallow_cross)  # whole: 15, 18
    assert macs == 2 * before + after


def test_the_file_says_that_it_is_a_reconstruction() -> None:
    tiny = build(controlnet=True, shape="sd15")
    policy = POLICIES["hgc"]
    schedule = policy.schedule(Setting.of_pipeline(tiny.pipe, unmeasured_setting("sd15-controlnet").sampling))
    assert "reconstruction" in schedule.producer["paper"]
    assert "reconstruction" in policy.summary


def test_the_grid_reaches_every_budget() -> None:
    setting = unmeasured_setting("sd15-controlnet")
    policy = POLICIES["hgc"]
    kept = [setting.kept(policy.write(setting, **knobs)) for knobs in policy.candidates(setting)]
    for budget in (0.60, 0.50, 0.37, 0.25, 0.15):
        assert min(abs(k - budget) for k in kept) < 0.005


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"interval": 0}, "interval is 0; it must be at least 1, and finite"),
        ({"gate": 0}, "gate is 0"),
        ({"fresh_decoder_blocks": 0}, r"fresh_decoder_blocks is 0; this decoder has 1 to 4\."),
    ],
)
def test_wrong_knobs_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        POLICIES["hgc"].write(unmeasured_setting("sd15-controlnet"), **knobs)
