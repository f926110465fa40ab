"""T-GATE against its authors' package, and its MACs worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import tgate
from attention_pipelines import (
    NUM_STEPS,
    arguments,
    build,
    denoise,
    distance,
    run,
    run_policy,
    sd15_attention_macs,
)
from tgate.tgate_utils import register_forward, tgate_scheduler
from unmeasured import unmeasured_setting

from hgc_learn.policies import POLICIES

TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("gate", "warm_up", "interval", "late_interval"),
    [
        (1, 2, 5, 1),  # closed from the second step on
        (3, 0, 2, 1),
        (5, 2, 5, 1),  # the paper's intervals
        (8, 2, 3, 1),
        (NUM_STEPS, 1, 4, 1),  # guidance to the end
        (NUM_STEPS + 5, 1, 4, 1),
        (6, 2, 5, 2),  # self-attention at the gate itself
        (7, 2, 5, 4),  # between gate - 1 and the next multiple: the mean of the halves
        (7, 2, 5, NUM_STEPS),
    ],
)
def test_latents_equal_the_authors_package(gate: int, warm_up: int, interval: int, late_interval: int) -> None:
    tiny = build(controlnet=False)
    full = run(tiny)
    knobs = {
        "gate": gate,
        "warm_up": warm_up,
        "self_attention_interval": interval,
        "late_self_attention_interval": late_interval,
    }
    ours = run_policy(tiny, "tgate", knobs)
    tgate.TgateSDLoader(tiny.pipe)
    theirs = tiny.pipe.tgate(
        **arguments(tiny), gate_step=gate, warm_up=warm_up, sp_interval=interval, fi_interval=late_interval
    ).images
    assert distance(ours, theirs) < TOLERANCE
    assert distance(theirs, full) > 100 * TOLERANCE


@pytest.mark.parametrize("controlnet", ["computed", "layers"])
@pytest.mark.parametrize(("gate", "interval", "late_interval"), [(4, 3, 1), (7, 5, 4)])
def test_latents_with_a_controlnet(gate: int, interval: int, late_interval: int, controlnet: str) -> None:
    """The package has no ControlNet pipeline: its attention rule on the models of a loop written out."""
    tiny = build(controlnet=True)
    knobs = {"gate": gate, "self_attention_interval": interval, "late_self_attention_interval": late_interval}
    with_controlnet = controlnet == "layers"
    ours = run_policy(tiny, "tgate", {**knobs, "controlnet": controlnet})
    other = run_policy(tiny, "tgate", {**knobs, "controlnet": "computed" if with_controlnet else "layers"})
    models = [tiny.pipe.unet, tiny.pipe.controlnet] if with_controlnet else [tiny.pipe.unet]

    def set_attention(i: int) -> None:
        cross, self_, keep_shape = tgate_scheduler(i, gate, interval, late_interval, warm_up=2)
        for model in models:
            register_forward(model, "Attention", ca_kward=cross, sa_kward=self_, keep_shape=keep_shape)

    theirs = denoise(tiny, gate, set_attention)
    assert distance(ours, theirs) < TOLERANCE
    assert distance(other, theirs) > 10 * TOLERANCE


def test_the_loop_written_out_is_the_pipeline() -> None:
    tiny = build(controlnet=True)
    assert distance(denoise(tiny, NUM_STEPS, lambda i: None), run(tiny)) < TOLERANCE


def test_without_guidance_attention_is_held_and_nothing_is_dropped() -> None:
    tiny = build(controlnet=False)
    ours = run_policy(tiny, "tgate", {"gate": 4, "self_attention_interval": 1}, guidance_scale=1.0)
    held: dict[Any, Any] = {}

    def hook(module: Any, args: Any, output: Any) -> Any:
        calls, kept = held.get(module, (0, None))
        kept = output if calls < 4 else kept
        held[module] = (calls + 1, kept)
        return kept

    for name, module in tiny.pipe.unet.named_modules():
        if name.endswith(".attn2"):
            module.register_forward_hook(hook)
    assert distance(ours, run(tiny, guidance_scale=1.0)) < TOLERANCE


@pytest.mark.parametrize("controlnet", ["computed", "layers"])
@pytest.mark.parametrize(
    ("gate", "interval", "late_interval", "num_reused", "num_reused_late"),
    [
        (10, 1, 1, 0, 0),
        (10, 5, 1, 5, 0),  # steps 3, 4, 6, 7, 8
        (4, 5, 1, 0, 0),  # steps 0, 1, 2 and gate - 1 compute
        (10, 5, 4, 5, 8),  # steps 12 and 16 compute
    ],
)
def test_macs_by_hand(
    gate: int, interval: int, late_interval: int, num_reused: int, num_reused_late: int, controlnet: str
) -> None:
    """SD1.5 with a ControlNet, 20 steps, guidance: two samples per step before the gate, one after it."""
    setting = unmeasured_setting("sd15-controlnet")
    draft = POLICIES["tgate"].write(
        setting,
        gate=gate,
        self_attention_interval=interval,
        late_self_attention_interval=late_interval,
        controlnet=controlnet,
    )
    step = sum(cost.macs for cost in setting.costs.values())
    self_attention, cross_attention = sd15_attention_macs(controlnet=controlnet == "layers")
    macs = 2 * gate * step - 2 * num_reused * self_attention
    macs += (20 - gate) * (step - cross_attention) - num_reused_late * self_attention
    assert setting.plan(draft).macs(setting.costs) == macs


def test_the_grid_reaches_half_the_macs_and_not_much_less() -> None:
    setting = unmeasured_setting("sd15-controlnet")
    policy = POLICIES["tgate"]
    kept = [setting.kept(policy.write(setting, **knobs)) for knobs in policy.candidates(setting)]
    assert min(abs(k - 0.5) for k in kept) < 0.005
    assert 0.45 < min(kept) < 0.48


def test_wrong_knobs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gate is 0; it must be at least 1\."):
        POLICIES["tgate"].write(unmeasured_setting("sd15-controlnet"), gate=0)
    with pytest.raises(ValueError, match="self_attention_interval is 0"):
        POLICIES["tgate"].write(unmeasured_setting("sd15-controlnet"), self_attention_interval=0)
