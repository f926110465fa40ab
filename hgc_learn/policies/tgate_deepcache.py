"""T-GATE on DeepCache: its rule for attention and guidance, on a UNet that runs whole at intervals only."""

from __future__ import annotations

from typing import Literal

from hgc_learn.plan import live_step
from hgc_learn.policies.deepcache import shell_between
from hgc_learn.policies.registry import Grid, register
from hgc_learn.policies.tgate import gated_rows
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import decoder_inputs
from hgc_learn.spacing import full_steps, intervals


def _grid(setting: Setting) -> Grid:
    """Few values of each, for only some of the candidates are tried; of the branches those that reuse most."""
    num_steps = setting.num_steps  # a gate there is never reached
    gates = {max(1, round(tenths / 10 * num_steps)) for tenths in range(1, 11)}
    return {
        "gate": sorted({*gates, max(1, num_steps - 1)}),
        "self_attention_interval": (1, 5),
        "late_self_attention_interval": (1, 5),
        "interval": [*intervals(num_steps, 10), num_steps],
        "branch": range(min(4, len(decoder_inputs(setting.graph)))),
        "control": ("held", "fresh") if setting.graph.residuals else ("held",),
    }


@register(
    "tgate_deepcache",
    paper="T-GATE with DeepCache, Liu et al. 2024, arXiv 2404.02747; Ma et al. 2023, arXiv 2312.00858",
    grid=_grid,
)
def tgate_deepcache(
    setting: Setting,
    *,
    gate: int = 10,
    warm_up: int = 0,
    self_attention_interval: int = 1,
    late_self_attention_interval: int = 1,
    interval: float = 3,
    branch: int = 0,
    control: Literal["held", "fresh"] = "held",
    controlnet: Literal["computed", "layers"] = "layers",
) -> Draft:
    """T-GATE's gate for attention and guidance; between full steps only the UNet's outermost layers run.

    As in the authors' package, tgate 1.0, whose defaults these are. Full steps are at intervals from the first step on
    and, counted anew, from the gate on; step `gate - 1` is full, too, so that every attention has an output to reuse.
    Wherever attention is read it follows `tgate`, but for one thing: inside the shell no self-attention is reused
    before a full step, at `warm_up` or later, at which it is due; until then it is computed at every full step.

    Deviations: the package's attentions keep their outputs from one picture to the next, so that its second picture may
    be given some of the first's, or stop at their shape; here every picture starts with nothing, as the package's first
    does. On SDXL and with a ControlNet, which the package does not know: as in `tgate` and `deepcache`. A ControlNet's
    own attention follows the rule at the steps at which it is read.

    Args:
        gate: step from which on there is neither cross-attention nor guidance.
        warm_up: last step at which self-attention is due whatever the interval.
        self_attention_interval: steps from one self-attention to the next before the gate.
        late_self_attention_interval: the same from the gate on.
        interval: steps per full step, before the gate and from it on; 2.5 for the steps 0, 2, 5, 7, ...
        branch: decoder layer, counted from the end, whose input from below is reused; 0 reuses most.
        control: between full steps the ControlNet's residuals are `held`, or `fresh`: what the shell reads of them is
            computed.
        controlnet: `computed`, or `layers`: the ControlNets' own attention follows T-GATE's rule too.
    """
    num_late = max(0, setting.num_steps - gate)
    full = {*full_steps(gate - 1, interval), gate - 1, *(gate + i for i in full_steps(num_late, interval))}
    rows = shell_between(setting, full, branch=branch, control=control)
    shell = set(live_step(setting.graph, rows).run)
    steps = range(setting.num_steps)
    gated = gated_rows(
        setting,
        gate=gate,
        warm_up=warm_up,
        self_attention_interval=self_attention_interval,
        late_self_attention_interval=late_self_attention_interval,
        controlnet=controlnet,
        runs=lambda site: steps if site in shell else full,
    )
    return Draft({**rows, **gated})
