"""Pyramid Attention Broadcast against diffusers' own, and its MACs worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_pipelines import build, distance, run, run_policy, sd15_attention_macs
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from torch import nn
from unmeasured import unmeasured_setting

from hgc_learn.policies import POLICIES


def broadcast(model: nn.Module, cross_interval: int, self_interval: int, timesteps: tuple[float, float]) -> None:
    """diffusers' own. Its hooks count from here on, so it is good for one run."""
    now: dict[str, Any] = {}
    model.register_forward_pre_hook(lambda module, args: now.update(timestep=args[1]))
    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=cross_interval,
        spatial_attention_block_skip_range=self_interval,
        cross_attention_timestep_skip_range=timesteps,
        spatial_attention_timestep_skip_range=timesteps,
        cross_attention_block_identifiers=("transformer_blocks",),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: now["timestep"],
    )
    apply_pyramid_attention_broadcast(model, config)


@pytest.mark.parametrize(
    ("models", "cross_interval", "self_interval", "timesteps"),
    [
        ("unet", 2, 1, (100, 800)),  # cross-attention alone
        ("unet", 1, 3, (100, 800)),  # self-attention alone
        ("unet", 5, 3, (84, 748)),  # timesteps that the run visits: the bounds are not in the range
        ("unet beside a controlnet", 3, 2, (100, 800)),
        ("unet and controlnet", 6, 2, (100, 800)),
        ("unet and controlnet", 5, 4, (-1, 1001)),  # the whole run
    ],
)
def test_latents_equal_diffusers(
    models: str, cross_interval: int, self_interval: int, timesteps: tuple[int, int]
) -> None:
    tiny = build(controlnet="controlnet" in models)
    both = models == "unet and controlnet"
    full = run(tiny)
    knobs = {
        "cross_interval": cross_interval,
        "self_interval": self_interval,
        "min_timestep": timesteps[0],
        "max_timestep": timesteps[1],
        "controlnet": "layers" if both else "computed",
    }
    ours = run_policy(tiny, "pab", knobs)
    broadcast(tiny.pipe.unet, cross_interval, self_interval, timesteps)
    if both:
        broadcast(tiny.pipe.controlnet, cross_interval, self_interval, timesteps)
    assert torch.equal(ours, run(tiny))
    assert distance(ours, full) > 1e-3


@pytest.mark.parametrize("controlnet", ["computed", "layers"])
@pytest.mark.parametrize(
    ("cross_interval", "self_interval", "num_cross_reused", "num_self_reused"),
    [
        (1, 1, 0, 0),
        # Of the timesteps 999, 949, ..., 49 steps 4 to 17 (799 to 149) lie in the range.
        (6, 1, 12, 0),  # 6 and 12 compute
        (6, 2, 12, 7),  # 4, 6, ..., 16 compute
        (20, 5, 14, 11),  # 5, 10, 15 compute
    ],
)
def test_macs_by_hand(
    cross_interval: int, self_interval: int, num_cross_reused: int, num_self_reused: int, controlnet: str
) -> None:
    """SD1.5 with a ControlNet, 20 steps, guidance."""
    setting = unmeasured_setting("sd15-controlnet")
    draft = POLICIES["pab"].write(
        setting, cross_interval=cross_interval, self_interval=self_interval, controlnet=controlnet
    )
    step = sum(cost.macs for cost in setting.costs.values())
    self_attention, cross_attention = sd15_attention_macs(controlnet=controlnet == "layers")
    macs = 2 * (20 * step - num_cross_reused * cross_attention - num_self_reused * self_attention)
    assert setting.plan(draft).macs(setting.costs) == macs


def test_no_setting_comes_below_what_is_not_attention() -> None:
    setting = unmeasured_setting("sd15-controlnet")
    policy = POLICIES["pab"]
    kept = [setting.kept(policy.write(setting, **knobs)) for knobs in policy.candidates(setting)]
    assert 0.88 < min(kept) < 0.89


def test_wrong_knobs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cross_interval is 0; it must be at least 1\."):
        POLICIES["pab"].write(unmeasured_setting("sd15-controlnet"), cross_interval=0)
