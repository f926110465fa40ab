"""Faster-Diffusion: the decoder runs at every step, encoder and ControlNet at key steps only."""

from __future__ import annotations

from typing import Literal

from hgc_learn.plan import row_of
from hgc_learn.policies.registry import Grid, register
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import encoder_outputs

# Key steps of a run of 50 (arXiv 2312.09608).
PAPER_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)
PAPER_STEPS = 50


def _grid(setting: Setting) -> list[Grid]:
    """Any number of keys; the paper's own, stretched and, as in the authors' code, not; whole intervals, as there."""
    steps = setting.num_steps
    as_they_are = tuple(key for key in PAPER_KEYS if key < steps)
    at_intervals = [tuple(range(0, steps, interval)) for interval in range(2, steps)]
    return [
        {"num_keys": (*range(1, steps), None), "spacing": ("paper", "uniform")},
        {"keys": [as_they_are, *at_intervals]},
    ]


@register("faster_diffusion", paper="Faster Diffusion, Li et al. 2023, arXiv 2312.09608", grid=_grid)
def faster_diffusion(
    setting: Setting,
    *,
    num_keys: int | None = None,
    spacing: Literal["paper", "uniform"] = "paper",
    keys: tuple[int, ...] = (),
) -> Draft:
    """ControlNet, encoder and mid block run at key steps only; the decoder runs at every step.

    Without the noise that the authors' pipeline adds to the latents at late steps: it changes what is aimed at.

    Args:
        num_keys: number of key steps; the paper's own if not given.
        spacing: the paper's pattern, dense at the noisy end, stretched to the run, or `uniform`.
        keys: the key steps themselves, from 0 on; then `num_keys` and `spacing` have no say.
    """
    steps = setting.num_steps
    chosen = sorted(set(keys)) if keys else key_steps(steps, num_keys, spacing)
    if chosen[0] != 0 or chosen[-1] >= steps:
        raise ValueError(f"keys are {', '.join(map(str, chosen))}; they begin with 0 and end at {steps - 1} at most.")
    row = row_of(i in chosen for i in range(steps))
    return Draft(dict.fromkeys(encoder_outputs(setting.graph), row))


def key_steps(num_steps: int, num_keys: int | None, spacing: str) -> list[int]:
    """Key steps of a run.

    The paper's are stretched from 50 steps to the run's; those that fall on one step are one. To get another number of
    them, the curve through the paper's nine is read at that many places, and what falls on one step moves up.

    Raises:
        ValueError: more keys than steps, or none.
    """
    stretched = sorted({key * num_steps // PAPER_STEPS for key in PAPER_KEYS})
    if num_keys is None and spacing == "paper":
        return stretched
    num_keys = len(stretched) if num_keys is None else num_keys
    if not 1 <= num_keys <= num_steps:
        raise ValueError(f"num_keys is {num_keys}; it must be 1 to {num_steps}, the steps of the run.")
    if spacing == "uniform":
        return [j * num_steps // num_keys for j in range(num_keys)]
    curve = (*PAPER_KEYS, PAPER_STEPS)
    steps = [0]
    for j in range(1, num_keys):
        left, rest = divmod(len(PAPER_KEYS) * j, num_keys)
        place = curve[left] * num_keys + (curve[left + 1] - curve[left]) * rest  # in 1 / num_keys of a step of 50
        steps.append(max(place * num_steps // (PAPER_STEPS * num_keys), steps[-1] + 1))
    return steps
