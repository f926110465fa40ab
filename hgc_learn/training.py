"""LightningModule that trains the router on the student's own hard trajectories.

One step: draw a hard schedule from the router at a budget, roll it out with its own cache, compare the final latents
with the teacher's, and ask for every gate how much the loss would change if it alone were flipped. To second order
in the change J*d that the flip makes to the final latents, with error e = student - teacher, that is
2 <e, J d> + |J d|^2. The first term is one backward pass; the second, which a straight-through estimator misses, is
estimated by another one from a random direction v, since E <v, J d>^2 = |J d|^2 for v ~ N(0, I).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from torch import Tensor

from hgc_learn.architectures import Architecture
from hgc_learn.graph import build_graph
from hgc_learn.rollout import GatedForwards, SamplingConfig, generate, load_pipeline
from hgc_learn.router import Router
from hgc_learn.sites import enclosing_module, is_inside, select_sites

DEFAULT_SITES = ("unet.*s.?:out", "unet.*s.?:branch", "*.attn2:out", "*:control", "unet:eps")


class RouterModule(L.LightningModule):
    """Trains a router over a frozen diffusers pipeline.

    Args:
        model: folder or hub id of a diffusers pipeline.
        sampling: the sampler setting that the schedule is for.
        controlnet: folder or hub id of a ControlNet, if `model` holds none.
        sites: glob patterns of the sites to route, as printed by `python -m hgc_learn sites`.
        budgets: fractions of the full MACs to keep; the steps take turns.
        learning_rate: of Adam on the logits.
        final_temperature: of the gates' sampling at the end of training; it falls from 1 geometrically.
        num_warm_start_batches: batches that measure each gate's effect on the uncached trajectory, to start from.
        dtype: of the frozen models: `float32`, `float16` or `bfloat16`.
    """

    def __init__(
        self,
        model: str,
        sampling: SamplingConfig,
        controlnet: str | None = None,
        sites: list[str] | tuple[str, ...] = DEFAULT_SITES,
        budgets: list[float] | tuple[float, ...] = (0.5,),
        learning_rate: float = 0.1,
        final_temperature: float = 0.2,
        num_warm_start_batches: int = 4,
        dtype: str = "float32",
    ):
        super().__init__()
        self.save_hyperparameters(
            {
                "model": model,
                "sampling": asdict(sampling),
                "controlnet": controlnet,
                "sites": list(sites),
                "budgets": list(budgets),
                "learning_rate": learning_rate,
                "final_temperature": final_temperature,
                "num_warm_start_batches": num_warm_start_batches,
                "dtype": dtype,
            }
        )
        self.automatic_optimization = False
        self.sampling = sampling
        self.pipe = load_pipeline(model, sampling, controlnet=controlnet, dtype=dtype)  # no nn.Module: not saved
        net = getattr(self.pipe, "controlnet", None)
        self.graph, self.costs = Architecture.of(self.pipe).measure((sampling.height, sampling.width))
        names = select_sites(self.graph, sites)
        self.pipe.scheduler.set_timesteps(sampling.num_inference_steps)
        self.timesteps = tuple(self.pipe.scheduler.timesteps.tolist())
        self.router = Router(self.graph, self.costs, names, len(self.timesteps))
        for budget in budgets:
            self.router.check_budget(budget)
        expanded = build_graph(self.pipe.unet, net, {enclosing_module(name) for name in names if is_inside(name)})
        self.forwards = GatedForwards(self.pipe, expanded, names, len(self.timesteps))
        self.targets: dict[Any, Tensor] = {}
        self.generator = torch.Generator()
        self.config: str | None = None  # of the run, as YAML; goes into the checkpoint
        self.warm_started: Tensor
        self.register_buffer("warm_started", torch.tensor(False))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.router.parameters(), lr=self.hparams["learning_rate"], betas=(0.9, 0.95))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config

    # Trajectories

    def on_fit_start(self) -> None:
        self.pipe.to(self.device)

    @torch.no_grad()
    def teacher_latents(self, batch: dict[str, Any]) -> Tensor:
        """Final latents of the uncached pipeline, [batch, channels, h, w]; computed once per sample."""
        keys = list(zip(batch["text"], [int(s) for s in batch["seed"]], strict=True))
        if not all(key in self.targets for key in keys):
            latents = generate(self.pipe, self.sampling, batch).cpu()
            self.targets.update(zip(keys, latents, strict=True))
        return torch.stack([self.targets[key] for key in keys]).to(self.device)

    def flip_effects(self, batch: dict[str, Any], compute: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Rolls a hard schedule out on the student's own trajectory.

        Args:
            compute: hard schedule [steps, sites], bool.
            target: the teacher's final latents.

        Returns:
            The squared error per sample [batch], and the change of it [batch, steps, sites] that a gate makes by
            computing instead of reusing (to second order, all other gates as they are).
        """
        gates = compute.to(target.dtype).expand(len(target), *compute.shape).clone().requires_grad_()
        self.forwards.set_schedule(compute, gates)
        self.forwards.install()
        try:
            with torch.enable_grad():
                latents = generate(self.pipe, self.sampling, batch, grad=True)
            error = (latents - target).detach()
            (first,) = torch.autograd.grad((error * latents).sum(), gates, retain_graph=True)
            direction = torch.randn(error.shape, generator=self.generator, device=error.device)
            (probe,) = torch.autograd.grad((direction * latents).sum(), gates)
        finally:
            self.forwards.uninstall()
        dims = error[0].numel()
        effects = (2 * first + (1 - 2 * gates.detach()) * probe.square()) / dims
        return error.square().flatten(1).mean(1), effects

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not self.warm_started:
            loader = self.trainer.train_dataloader
            assert loader is not None
            self.warm_start(loader)
        self.router.temperature = self.hparams["final_temperature"] ** self.progress()
        budgets = self.hparams["budgets"]
        # All chance comes from the step's number, so that a resumed run draws what an unbroken one draws.
        self.generator = torch.Generator(self.device).manual_seed(1 + self.global_step)
        gradient, logs = self.router_gradient(batch, budgets[self.global_step % len(budgets)])
        optimizer = self.optimizers()
        assert isinstance(optimizer, L.pytorch.core.optimizer.LightningOptimizer)
        self.router.logits.grad = gradient
        optimizer.step()
        self.router.logits.data.clamp_(-8, 8)
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=len(batch["text"]))
        self.log("loss_db", -10 * logs["loss"].log10(), prog_bar=True, logger=False)

    def router_gradient(self, batch: dict[str, Any], budget: float) -> tuple[Tensor, dict[str, Any]]:
        """Gradient of the expected log error by the logits [steps, sites] along which the expected MACs stay put."""
        p = self.router.probabilities(self.router.price(budget))
        compute = torch.bernoulli(p.detach(), generator=self.generator).bool()
        errors, effects = self.flip_effects(batch, compute, self.teacher_latents(batch))
        loss_gradient = (effects.mean(0) / errors.mean()) * (p * (1 - p)).detach() / self.router.temperature
        loss_gradient[0] = 0
        expected = self.router.expected_macs(p)
        (macs_gradient,) = torch.autograd.grad(expected, self.router.logits)
        # The multiplier at which moving all logits together gains nothing: the price of compute at this budget.
        multiplier = -loss_gradient.sum() / macs_gradient.sum()
        logs = {
            "loss": errors.mean(),
            "expected_macs": expected.detach(),
            "sampled_macs": self.router.kept(compute),
            "multiplier": multiplier,
            "temperature": self.router.temperature,
        }
        return loss_gradient + multiplier * macs_gradient, logs

    def progress(self) -> float:
        """Share of the training that is done, 0 to 1."""
        total = self.trainer.estimated_stepping_batches
        return min(1.0, self.global_step / total) if total and total != float("inf") else 0.0

    def warm_start(self, batches: Iterable[dict[str, Any]]) -> None:
        """Sets the logits to log(effect / saving) of reusing each gate alone on the uncached trajectory."""
        compute = torch.ones_like(self.router.logits, dtype=torch.bool)
        self.generator = torch.Generator(self.device).manual_seed(0)
        effects = []
        for batch in itertools.islice(batches, self.hparams["num_warm_start_batches"]):
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            effects.append(-self.flip_effects(batch, compute, self.teacher_latents(batch))[1])
        savings = self.router.savings().to(self.device)
        score = torch.cat(effects).mean(0).clamp_min(1e-12).log() - savings.clamp_min(1e-9).log()
        score[1:] = 2 * (score[1:] - score[1:].mean()) / score[1:].std()
        score[:, savings <= 0] = score.max()
        score[0] = 0
        self.router.logits.data.copy_(score)
        self.warm_started.fill_(True)

    # Validation: what would be exported now

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        target = self.teacher_latents(batch)
        for budget in self.hparams["budgets"]:
            hard = self.router.threshold(budget)
            soft = torch.bernoulli(self.router.probabilities(self.router.price(budget))).bool()
            hard_error = self.rollout_errors(batch, hard, target).mean()
            soft_error = self.rollout_errors(batch, soft, target).mean()
            self.log_dict(
                {
                    f"val/{budget:g}/hard_loss": hard_error,
                    f"val/{budget:g}/soft_loss": soft_error,
                    f"val/{budget:g}/soft_hard_gap_db": 10 * (soft_error / hard_error).log10(),
                    f"val/{budget:g}/exported_macs": self.router.kept(hard),
                },
                batch_size=len(target),
            )
        self.log("val_loss", hard_error, prog_bar=True, logger=False, batch_size=len(target))

    @torch.no_grad()
    def rollout_errors(self, batch: dict[str, Any], compute: Tensor, target: Tensor) -> Tensor:
        """Squared error of the final latents per sample [batch] under a hard schedule."""
        latents = self.rollout(batch, compute)
        return (latents - target).square().flatten(1).mean(1)

    @torch.no_grad()
    def rollout(self, batch: dict[str, Any], compute: Tensor, output_type: str = "latent") -> Tensor:
        """What the pipeline makes under a hard schedule [steps, sites]."""
        self.forwards.set_schedule(compute)
        self.forwards.install()
        try:
            return generate(self.pipe, self.sampling, batch, output_type=output_type)
        finally:
            self.forwards.uninstall()
