"""T-GATE: cross-attention and guidance until the gate, neither after it; self-attention reused between intervals."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

from hgc_learn.plan import COMPUTE, row_of
from hgc_learn.policies.registry import Grid, register
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import attention_sites


def _grid(setting: Setting) -> Grid:
    return {
        "gate": range(1, setting.num_steps),
        "warm_up": (0, 2),
        "self_attention_interval": (1, 2, 3, 5),
        "late_self_attention_interval": (1, 2, 5, setting.num_steps),
    }


@register("tgate", paper="T-GATE, Liu et al. 2024, arXiv 2404.02747", grid=_grid)
def tgate(
    setting: Setting,
    *,
    gate: int = 10,
    warm_up: int = 2,
    self_attention_interval: int = 5,
    late_self_attention_interval: int = 1,
    controlnet: Literal["computed", "layers"] = "layers",
) -> Draft:
    """From the gate on no cross-attention and no guidance; self-attention only at intervals before it.

    Before the step `gate - 1` cross-attention is computed, self-attention at the steps up to `warm_up` and at multiples
    of `self_attention_interval`. Step `gate - 1` computes all. From `gate` on every cross-attention gives the mean of
    the guided and the unguided output of step `gate - 1`, only the guided half runs and its prediction is taken as it
    is; self-attention is computed at multiples of `late_self_attention_interval` (1 in the paper; more in the authors'
    package, tgate 1.0). A gate that the run does not reach drops nothing.

    T-GATE was made without a ControlNet. Here one runs at every step, guided half only from the gate on. On SDXL the
    authors' package feeds the unguided half's pooled prompt from the gate on, this policy the guided half's; SD1.5 and
    SD2 have no such input.

    Cannot keep less than about 0.47 of the MACs: half of the batch is left.

    Args:
        gate: step from which on there is neither cross-attention nor guidance.
        warm_up: last step at which self-attention is computed whatever the interval.
        self_attention_interval: steps from one self-attention to the next before the gate.
        late_self_attention_interval: the same from the gate on.
        controlnet: `computed`, or `layers`: the ControlNets' own attention follows the rule too.
    """
    steps = range(setting.num_steps)
    rows = gated_rows(
        setting,
        gate=gate,
        warm_up=warm_up,
        self_attention_interval=self_attention_interval,
        late_self_attention_interval=late_self_attention_interval,
        controlnet=controlnet,
        runs=lambda site: steps,
    )
    return Draft(rows)


def gated_rows(
    setting: Setting,
    *,
    gate: int,
    warm_up: int,
    self_attention_interval: int,
    late_self_attention_interval: int,
    controlnet: Literal["computed", "layers"],
    runs: Callable[[str], Collection[int]],
) -> dict[str, str]:
    """T-GATE's rows, of attention and guidance.

    Args:
        runs: of an attention, given by its site, the steps at which it or its substitute is read; `gate - 1` is one. A
            self-attention is reused only if it was due at such a step since `warm_up`.

    Raises:
        ValueError: a gate or an interval below 1, or a UNet without attention that could be reused.
    """
    for name, value in (
        ("gate", gate),
        ("self_attention_interval", self_attention_interval),
        ("late_self_attention_interval", late_self_attention_interval),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    held = "m" if setting.is_guided else "-"  # without guidance there is one half only
    steps = range(setting.num_steps)

    first_kept = min(warm_up, gate - 1)

    def self_attention(runs: Collection[int]) -> str:
        row, fill = "", COMPUTE
        for i in steps:
            if i == gate:
                fill = held
            interval = self_attention_interval if i < gate else late_self_attention_interval
            is_due = i <= first_kept or i == gate - 1 or i % interval == 0
            row += COMPUTE if is_due else fill
            if is_due and i >= first_kept and i in runs:
                fill = "-"
        return row

    cross_attention = row_of((i < gate for i in steps), held)
    rows = {
        **{site: self_attention(runs(site)) for site in attention_sites(setting.graph, "attn1", controlnet)},
        **dict.fromkeys(attention_sites(setting.graph, "attn2", controlnet), cross_attention),
    }
    if setting.is_guided:
        rows[setting.graph.guidance] = row_of((i < gate for i in steps), "0")
    return rows
