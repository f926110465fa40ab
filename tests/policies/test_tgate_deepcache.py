"""T-GATE on DeepCache against the authors' package, and its MACs worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import tgate
from attention_pipelines import (
    NUM_STEPS,
    arguments,
    build,
    controlnet_at,
    denoise,
    distance,
    run,
    run_policy,
    sd15_attention_macs,
)
from DeepCache import DeepCacheSDHelper
from tgate.tgate_utils import register_forward, tgate_scheduler
from unmeasured import unmeasured_setting

from hgc_learn.plan import live_step
from hgc_learn.policies import POLICIES

TOLERANCE = 1e-5
POLICY = POLICIES["tgate_deepcache"]


@pytest.mark.parametrize(
    ("gate", "warm_up", "intervals", "interval", "branch"),
    [
        (10, 0, (1, 1), 3, 0),  # the package's defaults
        (1, 2, (5, 1), 2, 7),  # closed from the second step on
        (2, 0, (1, 5), 3, 8),  # the mean of the halves at step 2, inside until step 5
        (5, 2, (5, 1), 2, 1),
        (6, 2, (5, 2), 4, 0),  # self-attention at the gate itself
        (7, 2, (5, 4), 3, 5),  # not at the gate: the mean of the halves; inside to the end, for full are 7 and 10
        (7, 1, (4, NUM_STEPS), 2, 1),
        (8, 2, (7, 3), 4, 1),  # inside no self-attention is due at any full step since the warm-up: none is reused
        (9, 3, (4, 1), 2, 0),  # inside the first that is reused is that of step 4
        (11, 1, (2, 1), 5, 3),  # inside it is due at step 5, which is no multiple of 2, because nothing is kept
        (NUM_STEPS, 1, (4, 1), 3, 1),  # guidance to the end
        (NUM_STEPS + 5, 1, (4, 1), 5, 10),
        (5, 9, (4, 6), 3, 0),  # a warm-up beyond the gate
        (6, 2, (5, 2), NUM_STEPS, 1),
        (6, 2, (5, 2), 1, 0),  # T-GATE alone
    ],
)
def test_latents_equal_the_authors_package(
    gate: int, warm_up: int, intervals: tuple[int, int], interval: int, branch: int
) -> None:
    tiny = build(controlnet=False, shape="small" if branch < 2 else "sd15")
    full = run(tiny)
    early, late = intervals
    knobs = {"gate": gate, "warm_up": warm_up, "interval": interval, "branch": branch}
    knobs |= {"self_attention_interval": early, "late_self_attention_interval": late}
    ours = run_policy(tiny, "tgate_deepcache", knobs)
    tgate.TgateSDDeepCacheLoader(tiny.pipe, cache_interval=interval, cache_branch_id=branch)
    theirs = tiny.pipe.tgate(
        **arguments(tiny), gate_step=gate, warm_up=warm_up, sp_interval=early, fi_interval=late
    ).images
    assert distance(ours, theirs) < TOLERANCE
    assert distance(theirs, full) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("gate", "intervals", "branch", "control", "controlnet"),
    [
        (4, (3, 1), 0, "held", "layers"),
        (4, (3, 1), 0, "held", "computed"),
        (4, (3, 1), 0, "fresh", "computed"),
        (8, (2, 3), 1, "held", "layers"),
        (7, (5, 4), 4, "held", "layers"),
        (8, (2, 3), 11, "fresh", "computed"),
    ],
)
def test_latents_with_a_controlnet(
    gate: int, intervals: tuple[int, int], branch: int, control: str, controlnet: str
) -> None:
    """The packages have no ControlNet pipeline: their rules on the models of a loop written out."""
    tiny = build(controlnet=True, shape="small" if branch < 2 else "sd15")
    early, late = intervals
    knobs: dict[str, Any] = {"gate": gate, "branch": branch, "control": control}
    knobs |= {"self_attention_interval": early, "late_self_attention_interval": late}
    with_controlnet = controlnet == "layers"
    ours = run_policy(tiny, "tgate_deepcache", {**knobs, "controlnet": controlnet})
    other = run_policy(tiny, "tgate_deepcache", {**knobs, "controlnet": "computed" if with_controlnet else "layers"})
    models = [tiny.pipe.unet, tiny.pipe.controlnet] if with_controlnet else [tiny.pipe.unet]
    helper = DeepCacheSDHelper(pipe=tiny.pipe)
    helper.set_params(cache_interval=3, cache_branch_id=branch)
    helper.enable()

    def begin_step(i: int) -> None:
        if i in (gate - 1, gate):
            helper.disable()
            helper.enable()
        cross, self_, keep_shape = tgate_scheduler(i, gate, early, late, warm_up=0)
        for model in models:
            register_forward(model, "Attention", ca_kward=cross, sa_kward=self_, keep_shape=keep_shape)

    full = {*range(0, gate - 1, 3), gate - 1, *range(gate, NUM_STEPS, 3)}
    with controlnet_at(tiny.pipe.controlnet, full if control == "held" else range(NUM_STEPS)):
        theirs = denoise(tiny, gate, begin_step)
    assert distance(ours, theirs) < TOLERANCE
    assert distance(other, theirs) > 10 * TOLERANCE


SD15 = unmeasured_setting("sd15-controlnet")


def rows(policy: str, **knobs: Any) -> dict[str, str]:
    sites = POLICIES[policy].write(SD15, **knobs).sites
    return {site: row for site, row in sites.items() if set(row) != {"C"}}


def test_each_half_of_it_is_that_policy() -> None:
    knobs = {"warm_up": 1, "self_attention_interval": 4, "late_self_attention_interval": 3}
    assert rows("tgate_deepcache", interval=1, gate=7, **knobs) == rows("tgate", gate=7, **knobs)
    for control in ("held", "fresh"):
        for interval, branch in ((3, 0), (2.5, 5)):
            knobs = {"interval": interval, "branch": branch, "control": control}
            assert rows("tgate_deepcache", gate=30, **knobs) == rows("deepcache", **knobs)


def test_rows() -> None:
    found = rows("tgate_deepcache", gate=9, warm_up=1, self_attention_interval=4, late_self_attention_interval=2)
    assert found["unet.up_blocks.3.attentions.1:out"] == "C--C--C-CC--C--C--C-"
    assert found["unet.mid_block.attentions.0.transformer_blocks.0.attn2:out"] == "CCCCCCCCC" + "m" * 11
    assert found["unet:guidance"] == "CCCCCCCCC" + "0" * 11
    inside = found["unet.mid_block.attentions.0.transformer_blocks.0.attn1:out"]
    outside = found["unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1:out"]
    assert inside == "CCCCCCCCC" + "mCmC-C-C-C-"
    assert outside == "CC--C---C" + "mC-C-C-C-C-"


@pytest.mark.parametrize("control", ["held", "fresh"])
def test_macs_by_hand(control: str) -> None:
    """SD1.5 with a ControlNet, 20 steps, the package's defaults: full are the steps 0, 3, 6 and 9 with guidance and 10,
    13, 16 and 19 without; the shell has one cross-attention."""
    deepcache = POLICIES["deepcache"].write(SD15, control=control)
    shell = sum(SD15.costs[name].macs for name in live_step(SD15.graph, deepcache.sites).run)
    step = sum(cost.macs for cost in SD15.costs.values())
    _, cross_attention = sd15_attention_macs(controlnet=True)
    of_the_shell = 2 * (64 * 64 * 320**2 + 77 * 768 * 320)
    macs = 2 * (4 * step + 6 * shell) + 4 * (step - cross_attention) + 6 * (shell - of_the_shell)
    assert SD15.plan(POLICY.write(SD15, control=control)).macs(SD15.costs) == macs


def test_the_grid_holds_the_packages_defaults_and_keeps_little() -> None:
    candidates = list(POLICY.candidates(SD15))
    defaults = {name: POLICY.knobs[name] for name in candidates[0]}
    assert defaults in candidates
    shallow = [knobs for knobs in candidates if knobs["branch"] == 0 and knobs["control"] == "held"]
    assert 0.13 < min(SD15.kept(POLICY.write(SD15, **knobs)) for knobs in shallow) < 0.14


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"gate": 0}, r"gate is 0; it must be at least 1\."),
        ({"interval": 0.5}, r"interval is 0\.5"),
        ({"branch": 12}, "branches 0 to 11"),
        ({"late_self_attention_interval": 0}, "late_self_attention_interval is 0"),
    ],
)
def test_wrong_knobs_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        POLICY.write(SD15, **knobs)
