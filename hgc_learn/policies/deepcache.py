"""DeepCache: only the shallow shell of the UNet runs at every step.

The decoder's layers are counted from its end: branch b is the b-th. Its input from below is reused; the encoder layer
whose skip it reads, and all shallower ones, run anew.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np

from hgc_learn.models.graph import Graph
from hgc_learn.plan import live_step, row_of
from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import decoder_inputs
from hgc_learn.spacing import full_steps, intervals


@register(
    "deepcache",
    paper="DeepCache, Ma et al. 2023, arXiv 2312.00858",
    grid=lambda setting: {
        "interval": intervals(setting.num_steps, 20),
        "branch": range(len(decoder_inputs(setting.graph))),
        "control": ("held", "fresh") if setting.graph.residuals else ("held",),
        # Of the authors' 1.4. Powers of 1.2 to 1.5 move full steps by one at most in 20 steps, by three in 50.
        "spacing": ("uniform", "quadratic"),
        "center": sorted({setting.num_steps * tenths // 10 for tenths in range(4)}),  # the default, None, is the last
    },
)
def deepcache(
    setting: Setting,
    *,
    interval: float = 3,
    branch: int = 0,
    control: Literal["held", "fresh"] = "held",
    spacing: Literal["uniform", "quadratic"] = "uniform",
    center: int | None = None,
    power: float = 1.4,
) -> Draft:
    """Full steps at intervals; between them only the UNet's outermost layers run.

    Args:
        interval: steps per full step; 2.5 for the steps 0, 2, 5, 7, ...
        branch: decoder layer, counted from the end, whose input from below is reused; 0 reuses most.
        control: between full steps the ControlNet's residuals are `held`, or `fresh`: what the shell reads of them is
            computed. (The authors' code knows no ControlNet and so runs all of it at every step, to the same effect.)
        spacing: full steps are evenly spaced (`uniform`) or denser around `center` (`quadratic`).
        center: of the quadratic spacing, a step; 3/10 of the run if not given.
        power: of the quadratic spacing, above 1; the higher, the denser around the centre.
    """
    full = full_steps(setting.num_steps, interval)
    if spacing == "quadratic" and interval > 1:
        center = setting.num_steps * 3 // 10 if center is None else center
        full = quadratic_steps(setting.num_steps, len(full), center=center, power=power)
    return Draft(shell_between(setting, full, branch=branch, control=control))


def shell_between(
    setting: Setting, full: Collection[int], *, branch: int, control: Literal["held", "fresh"]
) -> dict[str, str]:
    """The rows with which all runs at the steps `full`, of which the first must be one, and at the others only the
    layers outside of `branch`; `branch` and `control` are those of `deepcache`.

    Raises:
        ValueError: a branch that the UNet does not have.
    """
    reused = sites_below(setting.graph, branch)
    row = row_of(i in full for i in range(setting.num_steps))
    if control == "held" and "-" in row:
        reused += residuals_read(setting.graph, reused)
    return dict.fromkeys(reused, row)


def sites_below(graph: Graph, branch: int) -> list[str]:
    """What the decoder layer reads from below that is the `branch`-th from the end, ControlNets' residuals aside.

    Raises:
        ValueError: a branch that the UNet does not have.
    """
    inputs = decoder_inputs(graph)
    if not 0 <= branch < len(inputs):
        raise ValueError(f"branch is {branch}; this UNet has branches 0 to {len(inputs) - 1}.")
    return [site for site in inputs[-1 - branch] if not site.endswith(":control")]


def residuals_read(graph: Graph, reused: Collection[str]) -> list[str]:
    """Of the ControlNets, by what a step still runs that reuses some sites."""
    return [site for site in live_step(graph, reused).run if site.endswith(":control")]


def quadratic_steps(num_steps: int, num_full: int, *, center: int, power: float) -> list[int]:
    """`num_full` steps that are dense around `center`: whole parts of l^power + center for evenly spaced l from
    (-center)^(1/power) to (num_steps - center)^(1/power) (arXiv 2312.00858).

    As in the authors' code, roots of negative numbers are the complex principal ones, of which the real part is taken
    in the end, and `power` is lowered until the steps are distinct.

    Raises:
        ValueError: a centre outside of the run, or no power above 1 gives distinct steps.
    """
    if not 0 <= center < num_steps:
        raise ValueError(f"center is {center}; it must be a step of the run, 0 to {num_steps - 1}.")
    exponent = power
    while exponent > 1:
        first, last = complex(-center) ** (1 / exponent), complex(num_steps - center) ** (1 / exponent)
        offsets = (np.linspace(first, last, num_full + 1) ** exponent).real.astype(int)
        steps = [0, *(int(offset) + center for offset in np.unique(offsets)[1:-1])]
        if len(steps) == num_full:
            return steps
        exponent -= 0.02
    raise ValueError(
        f"power is {power:g}: no power from it down to 1 puts {num_full} distinct full steps around step {center} of "
        f"{num_steps}; change center, power or interval."
    )
