"""The same sampler with fewer steps: the baseline that no cache may skip."""

from __future__ import annotations

from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting, scheduler_timesteps


@register(
    "fewer_steps",
    paper="the baseline of HarmoniCa, Huang et al. 2025, arXiv 2410.01723",
    grid=lambda setting: {"num_steps": range(1, setting.sampling.num_inference_steps)},
)
def fewer_steps(setting: Setting, *, num_steps: int = 10) -> Draft:
    """Computes everything, at fewer steps of the same sampler.

    Args:
        num_steps: denoising steps, at most the setting's.
    """
    most = setting.sampling.num_inference_steps
    if not 1 <= num_steps <= most:
        raise ValueError(f"num_steps is {num_steps}; it must be 1 to {most}, the steps of the full run.")
    if setting.pipe is None:
        return Draft({}, timesteps=tuple(999.0 - 1000.0 * i / num_steps for i in range(num_steps)))
    return Draft({}, timesteps=scheduler_timesteps(setting.pipe, num_steps))
