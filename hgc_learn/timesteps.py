"""How many steps a pipeline is asked for, and how many model calls it makes: nearly twice as many with Heun."""

from __future__ import annotations

from typing import Any


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
