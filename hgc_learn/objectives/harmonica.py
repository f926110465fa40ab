"""HarmoniCa (Huang et al. 2025, arXiv 2410.01723), for UNets with ControlNets.

The student's own trajectory from noise, with its own cache: at every step its layers are blends of their fresh and
their kept value, and a layer's blend is kept only where beta > threshold. The router learns to predict what the
full models predict from the same latents, guided: weight[step] * |full - blended|^2 + penalty * sum(beta). A step's
weight is the error of the final latents that caching at that step alone causes.

What is a reconstruction here: weights have mean 1; they are measured on a few samples, for each step alone, with the
step's present blends (the authors' code measures those of all steps up to each). The threshold is 0.5 unless it is
set; the authors' commands and the comparison's configurations have 0.1. Logits begin alike instead of at random, for
trainings are short. What is kept is what inference would keep, by liveness. One training serves all budgets, for each
of which the threshold is solved: what is exported was not on policy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hgc_learn.objectives.blend import BlendedObjective
from hgc_learn.training.distributed import mean_over_processes
from hgc_learn.training.router import Router

if TYPE_CHECKING:
    from hgc_learn.training.module import RouterModule

INITIAL_LOGIT = 1.0
"""Above the threshold: training begins with everything computed, and every cache fresh."""


class HarmoniCa(BlendedObjective):
    """HarmoniCa: every step but the first routed, learned on the student's own trajectory.

    Args:
        penalty: on the sum of a step's betas.
        threshold: a layer's value is kept where beta is above it.
        learning_rate: of AdamW on the logits.
        weight_interval: epochs after which the steps' weights are measured anew.
        num_weight_batches: training batches that they are measured on.

    Raises:
        ValueError: a number out of range.
    """

    policy: ClassVar[str] = "harmonica"
    weights: Tensor
    weights_epoch: Tensor

    def __init__(
        self,
        penalty: float = 1e-4,
        threshold: float = 0.5,
        learning_rate: float = 1e-2,
        weight_interval: int = 4,
        num_weight_batches: int = 1,
    ):
        super().__init__()
        if not (penalty >= 0 and 0 < threshold < 1 and weight_interval >= 1 and num_weight_batches >= 1):
            raise ValueError(
                f"penalty is {penalty}, threshold {threshold}, weight_interval {weight_interval}, num_weight_batches "
                f"{num_weight_batches}; they must be at least 0, between 0 and 1, at least 1 and at least 1."
            )
        self.penalty = penalty
        self.threshold = threshold
        self.learning_rate = learning_rate
        self.weight_interval = weight_interval
        self.num_weight_batches = num_weight_batches

    def prepare(self, module: RouterModule) -> None:
        super().prepare(module)
        module.router.logits.data.fill_(INITIAL_LOGIT)
        self.register_buffer("weights", torch.ones(module.num_steps))
        self.register_buffer("weights_epoch", torch.tensor(-1))  # in which they were measured

    def step(self, module: RouterModule, batch: dict[str, Any]) -> dict[str, Any]:
        """Rolls one trajectory out. A step's loss depends on its own row of logits alone (what is kept is taken as
        given), so one update of the table after the trajectory is the paper's update at every step."""
        if self.weights_epoch < 0 or module.current_epoch - self.weights_epoch >= self.weight_interval:
            loader = module.trainer.train_dataloader
            assert loader is not None
            self.measure_weights(module, itertools.islice(loader, self.num_weight_batches))
        logits = module.router.logits
        hard = self.hard(module.router)
        errors: list[Tensor] = []

        def visit_step(step: int) -> Tensor:
            if step == 0:
                return self.forwards.full(keep=True)
            prediction = self.forwards.full()
            with torch.enable_grad():
                betas = torch.sigmoid(logits[step])
                blended = self.forwards.blend(betas, compute=hard[step])
                error = (module.guide(blended) - module.guide(prediction)).square().mean()
                (self.weights[step] * error + self.penalty * betas.sum()).backward()
            errors.append(error.detach())
            return blended.detach()

        module.zero_grad()
        latents = self.forwards.follow(module.sampling, batch, visit_step)
        final_error = (latents - module.teacher_latents(batch)).square().mean()  # an interruption here loses no update
        self.update(module)
        return {
            "loss": (torch.stack(errors) * self.weights[1:]).mean(),
            "final_error": final_error,
            "beta": logits.data[1:].sigmoid().mean(),
            "kept": module.router.kept(hard),
        }

    def hard(self, router: Router) -> Tensor:
        """What is computed [steps, sites] by the fixed threshold: what is kept in training follows it."""
        return router.gates(router.logits.detach().sigmoid() > self.threshold).compute

    @torch.no_grad()
    def measure_weights(self, module: RouterModule, batches: Iterable[dict[str, Any]]) -> None:
        """The error of the final latents that blends at each step alone cause, relative to their mean."""
        betas = module.router.logits.sigmoid()
        self.weights.zero_()
        for batch in batches:
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            target = module.teacher_latents(batch)
            for step in range(1, len(betas)):

                def visit_step(i: int, step: int = step) -> Tensor:
                    return self.forwards.blend(betas[step]) if i == step else self.forwards.full(keep=i == step - 1)

                latents = self.forwards.follow(module.sampling, batch, visit_step)
                self.weights[step] += (latents - target).square().flatten(1).mean(1).sum()
        self.weights.copy_(mean_over_processes(self.weights))
        self.weights /= self.weights[1:].mean()
        self.weights_epoch.fill_(module.current_epoch)
