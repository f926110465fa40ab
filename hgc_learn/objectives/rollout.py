"""The second-order effect of every gate, on the student's own hard trajectories.

One step: draw a hard schedule from the router at a budget, roll it out with its own cache, compare the final latents
with the teacher's, and ask for every gate how much the loss would change if it alone chose otherwise. To second
order in the change J*d that this makes to the final latents, with error e = student - teacher, that is
2 <e, J d> + |J d|^2. The first term is one backward pass; the second, which a straight-through estimator misses, is
estimated by another one from a random direction v, since E <v, J d>^2 = |J d|^2 for v ~ N(0, I).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hgc_learn.objectives.base import Objective
from hgc_learn.router import Router

if TYPE_CHECKING:
    from hgc_learn.training import RouterModule


class Rollout(Objective):
    """Lowers the error of the final latents at the budgets, by the second-order effect of every gate.

    Args:
        learning_rate: of Adam on the logits.
        final_temperature: of the gates' sampling at the end of training; it falls from 1 geometrically.
        num_warm_start_batches: batches that measure each gate's effect on the uncached trajectory, to start from.
    """

    policy: ClassVar[str] = "learned"
    default_predictors: ClassVar[tuple[str, ...]] = ("hold", "linear")
    is_refined: ClassVar[bool] = True
    warm_started: Tensor

    def __init__(self, learning_rate: float = 0.1, final_temperature: float = 0.2, num_warm_start_batches: int = 4):
        super().__init__()
        self.learning_rate = learning_rate
        self.final_temperature = final_temperature
        self.num_warm_start_batches = num_warm_start_batches
        self.register_buffer("warm_started", torch.tensor(False))

    def optimizer(self, router: Router) -> torch.optim.Optimizer:
        return torch.optim.Adam(router.parameters(), lr=self.learning_rate, betas=(0.9, 0.95))

    def step(self, module: RouterModule, batch: dict[str, Any]) -> dict[str, Any]:
        router = module.router
        if not self.warm_started:
            loader = module.trainer.train_dataloader
            assert loader is not None
            self.warm_start(module, loader)
        router.temperature = self.final_temperature ** module.progress()
        budgets = module.hparams["budgets"]
        module.seed(1 + module.global_step)
        gradients, logs = self.gradients(module, batch, budgets[module.global_step % len(budgets)])
        router.logits.grad, router.predictor_logits.grad = gradients
        module.update_router()
        router.logits.data.clamp_(-8, 8)
        return logs

    def gradients(
        self, module: RouterModule, batch: dict[str, Any], budget: float
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Gradients of the expected log error by the logits [steps, sites], along which the expected MACs stay put,
        and by the predictors' logits [predictors, steps, sites]."""
        router = module.router
        p_compute = router.probabilities(router.price(budget))
        choices = router.sample(p_compute.detach(), module.generator)
        errors, effects = module.effects(batch, choices)
        change = (router.choice_probabilities(p_compute) * effects).sum()
        loss_gradient, predictor_gradient = torch.autograd.grad(
            change, [router.logits, router.predictor_logits], retain_graph=True
        )
        expected = router.expected_macs(p_compute)
        (macs_gradient,) = torch.autograd.grad(expected, router.logits)
        # The multiplier at which moving all logits together gains nothing: the price of compute at this budget.
        multiplier = -loss_gradient.sum() / macs_gradient.sum()
        logs = {
            "loss": errors.mean(),
            "expected_macs": expected.detach(),
            "sampled_macs": router.kept(choices),
            "multiplier": multiplier,
            "temperature": router.temperature,
        }
        return (loss_gradient + multiplier * macs_gradient, predictor_gradient), logs

    def warm_start(self, module: RouterModule, batches: Iterable[dict[str, Any]]) -> None:
        """Sets the logits to log(effect / saving) of reusing each gate alone on the uncached trajectory, by the
        predictor that is best there, and has nearly all gates begin with the first one: over longer gaps than that
        trajectory has, forecasts made by chance diverge."""
        router = module.router
        module.seed(0)
        effects = []
        for batch in itertools.islice(batches, self.num_warm_start_batches):
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            effects.append(module.effects(batch, torch.zeros_like(router.logits, dtype=torch.long))[1][1:])
        log_effects = torch.stack(effects).mean(0).clamp_min(1e-12).log()
        savings = router.savings().to(module.device)
        score = log_effects.min(0).values - savings.clamp_min(1e-9).log()
        score[1:] = 2 * (score[1:] - score[1:].mean()) / score[1:].std()
        score[:, savings <= 0] = score.max()
        score[0] = 0
        router.logits.data.copy_(score)
        router.predictor_logits.data[0] = 2.0
        self.warm_started.fill_(True)
