"""Whether it is the pipeline with the schedule that calls its models, with the batches that it makes: only then is it
known whether there is guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Caller:
    """A pipeline, from when a schedule is applied to it on. Every call of it sets `_num_timesteps` anew: what stands
    there for a second run is of the first, and the second that of another caller."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.applied_at = getattr(pipe.scheduler, "timesteps", None)  # of a run that has ended, or is under way
        self._mark()

    def check(self, *, is_first: bool) -> None:
        """At the beginning of a run, or where one is first seen; `is_first`: at the first of all its steps.

        Raises:
            ValueError: another than the pipeline calls.
        """
        if not hasattr(type(self.pipe), "num_timesteps"):
            return
        number = self.pipe.__dict__.get("_num_timesteps")
        is_under_way = self.pipe.scheduler.timesteps is self.applied_at and not is_first
        if number is None or (isinstance(number, _Seen) and not is_under_way):
            raise ValueError(foreign("The UNet or a ControlNet"))
        self._mark()

    def _mark(self) -> None:
        if (number := self.pipe.__dict__.get("_num_timesteps")) is not None:
            self.pipe._num_timesteps = _Seen(number)


class _Seen(int):
    """A pipeline's `_num_timesteps`, once a run has begun with it."""


def foreign(what: str) -> str:
    return (
        f"{what} was called by other code than the pipeline that the schedule was applied to: by another pipeline that "
        "shares it, or directly; or the pipeline calls it more than once at a step, which schedules do not support. "
        "Apply the schedule to the pipeline that calls, or remove_schedule(pipe) first."
    )


def check_parts(pipe: Any, sample: Tensor, is_guided: bool) -> None:
    """Looked at once per run, in its first step.

    Raises:
        ValueError: a batch of other parts than the two of guidance.
    """
    half = len(sample) // 2
    is_right = not getattr(pipe, "do_perturbed_attention_guidance", False)  # alike, where pictures are from one noise
    if is_right and is_guided:
        is_right = len(sample) % 2 == 0 and torch.allclose(sample[:half], sample[half:], rtol=0, atol=0, equal_nan=True)
    if not is_right:
        raise ValueError(
            "The batch has other parts than an unguided and a guided half of the same latents: PAG, InstructPix2Pix "
            "and the like have a third. Schedules do not support that; remove_schedule(pipe) first."
        )
