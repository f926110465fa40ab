"""How many steps a pipeline is asked for, how many model calls it makes (nearly twice as many with Heun), at which
timesteps, which step a timestep belongs to, and which is the last of a run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

SPACINGS = ("leading", "linspace", "trailing")
"""Values of `timestep_spacing` that diffusers' schedulers have."""


def with_spacing(scheduler: Any, timestep_spacing: str) -> Any:
    """One like it that spaces its timesteps in another way.

    Raises:
        ValueError: its class knows no `timestep_spacing`.
    """
    if "timestep_spacing" not in scheduler.config:
        raise ValueError(f"timestep_spacing: {type(scheduler).__name__} has no such setting; leave it `own`.")
    return type(scheduler).from_config(scheduler.config, timestep_spacing=timestep_spacing)


def steps_for_calls(scheduler: Any, num_calls: int) -> int | None:
    """The `num_inference_steps` at which a scheduler visits `num_calls` timesteps; None if there is no such number. The
    scheduler is left as it is."""
    other = type(scheduler).from_config(scheduler.config)
    for num_steps in range(num_calls, 0, -1):  # mostly the first one
        try:
            other.set_timesteps(num_steps)
        except ValueError:  # more than it was trained with
            continue
        if len(other.timesteps) == num_calls:
            return num_steps
    return None


def last_step(pipe: Any, first_step: int) -> int:
    """Of the run that begins at a step, as far as the pipeline says. SDXL's with a ControlNet says how many steps there
    are before it leaves out those after `denoising_end`."""
    timesteps = pipe.scheduler.timesteps
    number = pipe.__dict__.get("_num_timesteps", len(timesteps) - first_step)
    end = pipe.__dict__.get("_denoising_end")
    if isinstance(end, float) and 0 < end < 1:
        cutoff = round(pipe.scheduler.config.num_train_timesteps * (1 - end))
        number = min(number, sum(timestep >= cutoff for timestep in timesteps[first_step:].tolist()))
    last: int = first_step + number - 1
    return last


def place_in(timesteps: Tensor, timestep: Any) -> int | None:
    """The index of a timestep that is a view of the scheduler's `timesteps`, read off its place in memory."""
    if not isinstance(timestep, Tensor):
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)


def nearest_in(timesteps: Tensor, timestep: Any) -> int:
    """The same from its value; of a pair of equal ones, a step begins at the latter."""
    distances = [abs(t - float(timestep)) for t in timesteps.tolist()]
    return max(i for i, distance in enumerate(distances) if distance == min(distances))
