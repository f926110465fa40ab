"""The second-order effect of every gate, on the student's own hard trajectories.

One step: draw hard gates from the router at a budget, roll them out with their own cache, compare the outcome,
pictures or final latents, with the teacher's, and ask for every gate how much the loss would change if it alone chose
otherwise. To second order in the change J*d that this makes to the outcome, with error e = student - teacher, that is 2
<e, J d> + |J d|^2. The first term is one backward pass; the second, which a straight-through estimator misses, is
estimated by another one from a random direction v, since E <v, J d>^2 = |J d|^2 for v ~ N(0, I).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hgc_learn.objectives.base import Objective
from hgc_learn.training.distributed import mean_over_processes
from hgc_learn.training.gates import Gates
from hgc_learn.training.grouped import GroupedAdam
from hgc_learn.training.router import Router

if TYPE_CHECKING:
    from hgc_learn.training.module import RouterModule


class Rollout(Objective):
    """Lowers the error of the outcome at the budgets, by the second-order effect of every gate.

    Args:
        learning_rate: of Adam on logits and reaches, at the start; it falls to 0 linearly.
        final_temperature: of the gates' sampling at the end of training; it falls from 1 geometrically.
        num_warm_start_batches: batches that measure each gate's effect on the uncached trajectory, to start from; 0 to
            start with equal gates.
        num_directions: random ones in which second-order effects are measured; 0 leaves these out.

    Raises:
        ValueError: a number out of range.
    """

    policy: ClassVar[str] = "learned"
    is_specialised: ClassVar[bool] = True
    warm_started: Tensor

    def __init__(
        self,
        learning_rate: float = 0.1,
        final_temperature: float = 0.2,
        num_warm_start_batches: int = 4,
        num_directions: int = 1,
    ):
        super().__init__()
        if not (final_temperature > 0 and num_warm_start_batches >= 0 and num_directions >= 0):
            raise ValueError(
                f"final_temperature is {final_temperature}, num_warm_start_batches {num_warm_start_batches} and "
                f"num_directions {num_directions}; the first must be above 0, the others 0 or more."
            )
        self.learning_rate = learning_rate
        self.final_temperature = final_temperature
        self.num_warm_start_batches = num_warm_start_batches
        self.num_directions = num_directions
        self.register_buffer("warm_started", torch.tensor(False))

    def draw(self, router: Router, budget: float, generator: torch.Generator) -> Gates:
        return router.sample(budget, generator)[0]

    def optimizer(self, router: Router) -> torch.optim.Optimizer:
        return GroupedAdam(router, self.learning_rate)

    def step(self, module: RouterModule, batch: dict[str, Any]) -> dict[str, Any]:
        router = module.router
        if not self.warm_started and self.num_warm_start_batches:
            loader = module.trainer.train_dataloader
            assert loader is not None
            self.warm_start(module, loader)
        router.temperature = self.final_temperature ** module.progress()
        budgets = module.hparams["budgets"]
        module.seed(1 + module.global_step, is_own=True)  # gates vary more than samples
        logs = self.gradients(module, batch, budgets[module.global_step % len(budgets)])
        module.update_router(self.learning_rate * (1 - module.progress()))
        router.clamp()
        return logs

    def gradients(self, module: RouterModule, batch: dict[str, Any], budget: float) -> dict[str, Any]:
        """Gives the router's parameters the gradients of the expected log error at a budget: the logits one along which
        the expected MACs stay put. Returns what to log."""
        router = module.router
        gates, price = router.sample(budget, module.generator)
        p_compute = router.probabilities(price)
        effects = module.effects(batch, gates, self.num_directions)
        of_computing = (torch.where(gates.compute, -1, 1) * effects.of_each_flip()).to(p_compute)
        change = (p_compute * of_computing).sum()
        (loss_gradient,) = torch.autograd.grad(change, router.logits, retain_graph=True)
        expected = router.expected_macs(p_compute)
        (macs_gradient,) = torch.autograd.grad(expected, router.logits)
        # The multiplier at which moving all logits together gains nothing: the price of compute at this budget.
        multiplier = -loss_gradient.sum() / macs_gradient.sum()
        router.logits.grad = loss_gradient + multiplier * macs_gradient
        router.reach.grad = effects.of_reach().to(p_compute)
        return {
            "loss": effects.errors.mean(),
            "expected_macs": expected.detach(),
            "sampled_macs": router.kept(gates.compute),
            "multiplier": multiplier,
            "temperature": router.temperature,
        }

    def warm_start(self, module: RouterModule, batches: Iterable[dict[str, Any]]) -> None:
        """Sets the logits to the mean log(effect / saving) of reusing each gate alone on the uncached trajectory.

        Raises:
            ValueError: an effect that is not finite.
        """
        router = module.router
        module.seed(0)
        full = Gates.full(*router.logits.shape)
        effects = []
        for batch in itertools.islice(batches, self.num_warm_start_batches):
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            effects.append(module.effects(batch, full).of_each_flip())
        savings = router.savings().to(module.device)
        score = mean_over_processes(torch.stack(effects).mean(0).to(savings)) - savings.clamp_min(1e-9).log()
        if not score.isfinite().all():
            raise ValueError(
                "The effects that the warm start measures are not finite: the models overflow. Train with "
                "--model.dtype=bfloat16 or float32."
            )
        if score[1:].std(correction=0) > 0:
            score[1:] = 2 * (score[1:] - score[1:].mean()) / score[1:].std()
        score[0] = 0
        router.logits.data.copy_(score)
        self.warm_started.fill_(True)
