"""Learning-to-Cache (Ma et al. 2024, arXiv 2406.01733), image-free and for UNets with ControlNets.

Every `interval`-th step is computed in full. At the others the layers are blends of their fresh value and that of
the full step before; the router learns to predict what the full models predict there, at a price per layer:
|full - blended|^2 + penalty * sum(beta).

What is a reconstruction here: the samples that noise is added to are the teacher's own final latents (no photographs
needed); a full step and a routed one are linked by one DDIM step at the guidance in use; intervals above 2 (the
paper's), of which several may share one table; logits begin at 0 instead of at random, for trainings are short; the
threshold is solved for the budget, where the paper sets it by hand. The squared error is the mean over the elements
of the models' own prediction (both guidance halves). With 20 steps it is much larger than where the paper's penalties
(1e-6 to 5e-6) come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hgc_learn.models.macs import BudgetError
from hgc_learn.objectives.blend import MAX_LOGIT, BlendedObjective
from hgc_learn.training.distributed import own_noise
from hgc_learn.training.gates import Gates
from hgc_learn.training.router import Router

if TYPE_CHECKING:
    from hgc_learn.training.module import RouterModule


class L2C(BlendedObjective):
    """Learning-to-Cache: routed steps between full ones, learned from a clean cache.

    Args:
        intervals: every so many steps are full; [2] in the paper. Larger ones reach lower budgets; with several,
            training steps take turns.
        penalty: lambda, on the sum of a step's betas.
        learning_rate: of AdamW on the logits; 1e-2 to 1e-3 in the paper, whose trainings are longer.
    """

    policy: ClassVar[str] = "l2c"

    def __init__(
        self, intervals: list[int] | tuple[int, ...] = (2,), penalty: float = 1e-4, learning_rate: float = 1e-2
    ):
        super().__init__()
        if min(intervals, default=0) < 2:
            raise ValueError(f"intervals are {list(intervals)}; there are steps to route from 2 on.")
        if penalty < 0:
            raise ValueError(f"penalty is {penalty}; it must be at least 0.")
        self.intervals = sorted(intervals)
        self.penalty = penalty
        self.learning_rate = learning_rate

    def gates(self, router: Router, budget: float, *, interval: int | None = None) -> Gates:
        """As the base class's; every `interval`-th step is full. By default it is the shortest that the budget allows.

        Raises:
            ValueError: an interval that was not trained.
            BudgetError: it cannot be met.
        """
        if interval is not None and interval not in self.intervals:
            raise ValueError(f"interval is {interval}; this router was trained for {self.intervals}.")
        least = {k: router.kept(self._full_steps(router, k)) for k in self.intervals}
        interval = interval or next((k for k in self.intervals if least[k] <= budget), self.intervals[-1])
        if least[interval] > budget:
            raise BudgetError(
                f"A budget of {budget} cannot be met: with every step in {interval} full, L2C keeps at least "
                f"{least[interval]:.3f} of the MACs. A larger interval reaches lower budgets."
            )
        logits = torch.where(self._full_steps(router, interval), 2 * MAX_LOGIT, router.logits.detach())
        return router.round(budget, logits)

    @staticmethod
    def _full_steps(router: Router, interval: int) -> Tensor:
        """Whether a gate is of a full step [steps, sites]."""
        full = torch.zeros_like(router.logits, dtype=torch.bool)
        full[::interval] = True
        return full

    def step(self, module: RouterModule, batch: dict[str, Any]) -> dict[str, Any]:
        """Visits all steps of a run. A routed step's loss depends on its own row of logits alone, so one update of
        the table is the paper's update of one row, for every row."""
        module.seed(1 + module.global_step)
        interval = self.intervals[module.global_step % len(self.intervals)]
        clean = module.teacher_latents(batch)
        logits, scheduler, forwards = module.router.logits, module.pipe.scheduler, self.forwards
        errors: list[Tensor] = []
        start: dict[str, Any] = {}  # the full step before

        def visit_step(step: int) -> Tensor:
            time = forwards.timestep
            if step % interval == 0:
                noise = own_noise(clean.shape, clean, module.generator)
                start.update(time=time, latents=add_noise(scheduler, clean, noise, time))
                prediction = forwards.full(start["latents"], keep=True)
                start.update(prediction=module.guide(prediction))
                return prediction
            latents = ddim_step(scheduler, start["latents"], start["prediction"], start["time"], time)
            prediction = forwards.full(latents)
            with torch.enable_grad():
                betas = torch.sigmoid(logits[step])
                error = (forwards.blend(betas, latents) - prediction).square().mean()
                (error + self.penalty * betas.sum()).backward()
            errors.append(error.detach())
            return prediction

        module.zero_grad()
        forwards.follow(module.sampling, batch, visit_step)
        self.update(module)
        return {"loss": torch.stack(errors).mean(), "beta": logits.data.sigmoid().mean()}


def add_noise(scheduler: Any, clean: Tensor, noise: Tensor, time: int) -> Tensor:
    """Clean latents with the noise of one timestep, in variance-preserving form."""
    signal, sigma = _levels(scheduler, clean, time)
    return signal * clean + sigma * noise


def ddim_step(scheduler: Any, latents: Tensor, prediction: Tensor, start: int, end: int) -> Tensor:
    """A deterministic DDIM step (Song et al. 2020, arXiv 2010.02502, eq. 12) between any two timesteps.

    Raises:
        ValueError: a model that predicts neither noise, velocity nor the sample.
    """
    signal, sigma = _levels(scheduler, latents, start)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        clean, noise = (latents - sigma * prediction) / signal, prediction
    elif kind == "v_prediction":
        clean, noise = signal * latents - sigma * prediction, signal * prediction + sigma * latents
    elif kind == "sample":
        clean, noise = prediction, (latents - signal * prediction) / sigma
    else:
        raise ValueError(f"prediction_type {kind!r} is not one of epsilon, v_prediction, sample.")
    return add_noise(scheduler, clean, noise, end)


def _levels(scheduler: Any, latents: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """Of signal and noise at a timestep, for these latents; half precision cannot tell 1 - alpha from 0."""
    alpha = scheduler.alphas_cumprod[time]
    return alpha.sqrt().to(latents), (1 - alpha).sqrt().to(latents)
