"""The same sampler with fewer steps: the baseline that no cache may skip."""

from __future__ import annotations

from typing import Literal

from hgc_learn.policies.registry import Grid, register
from hgc_learn.setting import Draft, Setting, scheduler_timesteps
from hgc_learn.timesteps import SPACINGS, with_spacing


def _grid(setting: Setting) -> Grid:
    knows = setting.pipe is not None and "timestep_spacing" in setting.pipe.scheduler.config
    return {
        "num_steps": range(1, setting.sampling.num_inference_steps),
        "timestep_spacing": ("own", *SPACINGS) if knows else ("own",),
    }


@register("fewer_steps", paper="the baseline of HarmoniCa, Huang et al. 2025, arXiv 2410.01723", grid=_grid)
def fewer_steps(
    setting: Setting,
    *,
    num_steps: int = 10,
    timestep_spacing: Literal["own", "leading", "linspace", "trailing"] = "own",
) -> Draft:
    """Computes everything, at fewer steps of the same sampler.

    How the steps are spaced matters more the fewer there are. diffusers' DDIM steps by a fixed number of timesteps
    whatever the spacing (0.42, its issues 11347 and 12633): with `linspace` and few steps the models are given latents
    of another noise level than they are told.

    Args:
        num_steps: denoising steps, at most the setting's.
        timestep_spacing: as diffusers' schedulers have it; `own` for that of the pipeline's.

    Raises:
        ValueError: a number of steps that is out of range, or a spacing that the scheduler does not know.
    """
    most = setting.sampling.num_inference_steps
    if not 1 <= num_steps <= most:
        raise ValueError(f"num_steps is {num_steps}; it must be 1 to {most}, the steps of the full run.")
    if setting.pipe is None:
        return Draft({}, timesteps=tuple(999.0 - 1000.0 * i / num_steps for i in range(num_steps)))
    scheduler = setting.pipe.scheduler
    if timestep_spacing != "own":
        scheduler = with_spacing(scheduler, timestep_spacing)
    return Draft({}, timesteps=scheduler_timesteps(scheduler, num_steps))
