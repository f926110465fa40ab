"""The LightningModule that trains a router over a frozen pipeline, by any of `hgc_learn.objectives`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from torch import Tensor

from hgc_learn.evaluation import decodes_upcast, unclamped_pictures
from hgc_learn.models.fingerprint import ModelFingerprint
from hgc_learn.models.graph import build_graph
from hgc_learn.objectives import Objective, Rollout
from hgc_learn.sampling import SamplingConfig, check_batch, generate, load_pipeline, scheduled
from hgc_learn.scheduler_config import other_setting, scheduler_config
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import select_sites, to_lay_open
from hgc_learn.training.distributed import mean_over_processes, num_processes, rank
from hgc_learn.training.effects import Effects, measure_effects
from hgc_learn.training.gates import Gates
from hgc_learn.training.probe import ProbedForwards
from hgc_learn.training.router import Router


class RouterModule(L.LightningModule):
    """Trains a router over a frozen diffusers pipeline.

    Args:
        model: folder or hub id of a diffusers pipeline.
        sampling: the sampler setting that the schedule is for.
        controlnet: folder or hub id of a ControlNet, if `model` holds none.
        variant: of the files with the weights, such as `fp16`; see `load_pipeline`.
        objective: how the router learns; `Rollout` if not given.
        sites: glob patterns of the sites to route, as printed by `python -m hgc_learn sites`; the objective's own if
            not given.
        errors_of: what errors are measured on: the final `pictures`, as PSNR is, or the final `latents`, which spares a
            backward pass through the VAE.
        budgets: fractions of the full MACs to keep: those that validation looks at; an objective that trains at a
            budget takes turns.
        dtype: of the frozen models: `float32`, `float16` or `bfloat16`.
        gradient_checkpointing: run the models' layers again in the backward passes instead of keeping what they need:
            for models of real size.
    """

    def __init__(
        self,
        model: str,
        sampling: SamplingConfig,
        controlnet: str | None = None,
        variant: str | None = None,
        objective: Objective | None = None,
        sites: list[str] | tuple[str, ...] | None = None,
        errors_of: Literal["pictures", "latents"] = "pictures",
        budgets: list[float] | tuple[float, ...] = (0.5,),
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.objective = objective = objective or Rollout()
        sites = objective.default_sites if sites is None else sites
        if not sites or not budgets:
            raise ValueError(f"sites are {list(sites)} and budgets {list(budgets)}; at least one of each is needed.")
        self.save_hyperparameters(
            {
                "model": model,
                "sampling": asdict(sampling),
                "controlnet": controlnet,
                "variant": variant,
                "objective": objective.settings(),
                "sites": list(sites),
                "errors_of": errors_of,
                "budgets": list(budgets),
                "dtype": dtype,
                "gradient_checkpointing": gradient_checkpointing,
            }
        )
        self.automatic_optimization = False
        self.sampling = sampling
        # Where it runs is Lightning's to say; it is moved there when a run begins.
        device = torch.device("cpu")
        pipe = load_pipeline(model, sampling, controlnet=controlnet, variant=variant, dtype=dtype, device=device)
        if errors_of == "pictures" and decodes_upcast(pipe):
            raise ValueError(
                "errors_of is pictures, and this pipeline's VAE overflows in float16. Set errors_of: latents, or "
                "dtype: bfloat16."
            )
        self.setting = Setting.of_pipeline(pipe, sampling)
        self.graph, self.costs, self.timesteps = self.setting.graph, self.setting.costs, self.setting.timesteps
        if self.num_steps < 2:
            raise ValueError("num_inference_steps gives one model call, and the first computes everything: raise it.")
        names = select_sites(self.graph, sites)
        if self.graph.guidance in names and not self.setting.is_guided:
            raise ValueError(
                f"sites: {self.graph.guidance} is the difference that guidance makes, and there is none at a "
                f"guidance_scale of {sampling.guidance_scale:g}. Leave it out."
            )
        self.router = Router(self.graph, self.costs, names, self.num_steps)
        self.use_pipeline(pipe)
        self.kept_latents: dict[tuple[str, int, int], Tensor] = {}
        self.generator = torch.Generator()
        self.config: str | None = None  # of the run, as YAML; goes into the checkpoint
        objective.prepare(self)
        for budget in budgets:
            self.gates(budget)  # refuses what cannot be met

    def use_pipeline(self, pipe: Any) -> None:
        """Runs trajectories on this pipeline, of the same models, from now on."""
        self.pipe = self.setting.pipe = pipe  # no nn.Module: not saved
        graph = build_graph(pipe.unet, getattr(pipe, "controlnet", None), to_lay_open(self.router.sites))
        self.forwards = ProbedForwards(
            pipe,
            graph,
            self.router.sites,
            self.num_steps,
            gradient_checkpointing=self.hparams["gradient_checkpointing"],
        )
        self.objective.use_pipeline(self)

    @property
    def num_steps(self) -> int:
        """Model calls of a run."""
        return len(self.timesteps)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.objective.optimizer(self.router)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config
        checkpoint["fingerprint"] = self.setting.fingerprint.to_dict()
        checkpoint["temperature"] = self.router.temperature
        checkpoint["scheduler"] = type(self.pipe.scheduler).__name__
        checkpoint["scheduler_config"] = scheduler_config(self.pipe.scheduler)
        checkpoint["timesteps"] = list(self.timesteps)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where the router was trained for something else than it would be trained on for."""
        self.check_training(checkpoint, "ckpt_path")
        self.router.temperature = checkpoint.get("temperature", self.router.temperature)  # that draws had

    def check_training(self, checkpoint: dict[str, Any], name: str) -> None:
        """Raises ValueError where the router was trained in another way, or as in `check_model`."""
        trained = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "sampling" in trained:  # earlier ones lack settings that have come since
            trained["sampling"] = {**asdict(SamplingConfig()), **trained["sampling"]}
        for setting in ("sampling", "sites", "objective"):
            if setting in trained and trained[setting] != self.hparams[setting]:
                raise ValueError(
                    f"{name}: the router was trained with {setting} {trained[setting]}; asked for now is "
                    f"{self.hparams[setting]}. Give the same, or train anew."
                )
        self.check_model(checkpoint, name)

    def check_model(self, checkpoint: dict[str, Any], name: str) -> None:
        """Raises ValueError where the router is of an earlier version, or was trained for other models than these;
        earlier checkpoints do not say which."""
        if "router.reach" not in checkpoint["state_dict"]:
            raise ValueError(f"{name}: its router is one of an earlier version of hgc_learn. Use that, or train anew.")
        scheduler = type(self.pipe.scheduler).__name__
        if checkpoint.get("scheduler", scheduler) != scheduler:
            raise ValueError(
                f"{name}: the router was trained with the model's own scheduler when that was "
                f"{checkpoint['scheduler']}; now it is {scheduler}. Set sampling.scheduler, or train anew."
            )
        if otherwise := other_setting(checkpoint.get("scheduler_config", {}), self.pipe.scheduler):
            setting, before, now = otherwise
            raise ValueError(
                f"{name}: the router was trained with {setting}={before!r} of {scheduler}; the model has {now!r} now. "
                "Set sampling.scheduler_config, or train anew."
            )
        if checkpoint.get("timesteps", [*self.timesteps]) != [*self.timesteps]:
            raise ValueError(
                f"{name}: the router was trained at other timesteps than {scheduler} has now. Give its config what it "
                "had (timestep_spacing, steps_offset), or train anew."
            )
        if (trained := checkpoint.get("fingerprint")) is None:
            return
        if difference := ModelFingerprint.from_dict(trained).difference(self.setting.fingerprint):
            raise ValueError(
                f"{name}: the router was trained for another model ({', '.join(difference)}). Give that one, or train "
                "anew."
            )

    def on_fit_start(self) -> None:
        self._check_precision()
        trainer: Any = self.trainer
        for callback, name in ((Timer, "max_time"), (EarlyStopping, "callbacks: EarlyStopping")):
            if any(isinstance(one, callback) for one in trainer.callbacks):
                raise ValueError(
                    f"trainer.{name} would stop before learning rate and temperature have fallen to their end. Set "
                    "max_epochs or max_steps; a training that is interrupted goes on with --ckpt_path."
                )
        if trainer.overfit_batches:
            raise ValueError(
                "trainer.overfit_batches takes the sampler of the training's data away. Set limit_train_batches, or "
                "data.num_train."
            )
        if self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            raise ValueError("trainer.max_epochs is -1: learning rate and temperature fall to an end. Set one of both.")
        self.pipe.to(self.device)

    def on_train_start(self) -> None:
        if not math.isfinite(self.trainer.num_training_batches):
            raise ValueError(
                "data: the training's data do not say how many samples they have; learning rate and temperature fall "
                "to an end. Give a dataset with a length."
            )
        self._check_num_updates()

    def _check_num_updates(self) -> None:
        """Lightning takes `limit_train_batches` for a limit, and cuts it down without a word."""
        trainer = self.trainer
        limit, num_batches = trainer.limit_train_batches, int(trainer.num_training_batches)
        if not isinstance(limit, int) or trainer.max_epochs is None or trainer.max_epochs < 0:
            return
        asked = limit * trainer.max_epochs
        asked = min(asked, trainer.max_steps) if trainer.max_steps > 0 else asked
        if num_batches * trainer.max_epochs < asked:
            raise ValueError(
                f"trainer.limit_train_batches is {limit}, but the training's data make {num_batches} batches on each "
                f"process: {num_batches * trainer.max_epochs} updates instead of {asked}. Set limit_train_batches to "
                f"{num_batches} or fewer and trainer.max_epochs to more, or raise data.num_train."
            )

    def _check_precision(self) -> None:
        if self.trainer.precision != "32-true":
            raise ValueError(
                f"trainer.precision is {self.trainer.precision}; the router learns in 32-true. The precision of the "
                "frozen models is model.dtype."
            )

    def gates(self, budget: float) -> Gates:
        """The router's gates at a budget, rounded.

        Raises:
            BudgetError: it cannot be met.
        """
        return self.objective.gates(self.router, budget)

    def draft(self, gates: Gates) -> Draft:
        """The schedule that gates make, as policies write it."""
        return gates.draft(self.router.sites)

    # Trajectories

    def on_validation_start(self) -> None:  # `train.py validate`
        self._check_precision()
        self.pipe.to(self.device)

    @torch.no_grad()
    def teacher_latents(self, batch: dict[str, Any]) -> Tensor:
        """Final latents of the uncached pipeline, [batch, channels, h, w]; computed once per sample, and kept on the
        CPU: 64 KiB each for SD1.5 at 512 px."""
        images = [hash(image.tobytes()) for image in batch["conditioning_image"].float().cpu().numpy()]
        samples = zip(batch["text"], batch["seed"], images, strict=True)
        keys = [(text, int(seed), image) for text, seed, image in samples]
        if not all(key in self.kept_latents for key in keys):
            self.kept_latents.update(zip(keys, generate(self.pipe, self.sampling, batch).cpu(), strict=True))
        return torch.stack([self.kept_latents[key] for key in keys]).to(self.device)

    @torch.no_grad()
    def target(self, batch: dict[str, Any]) -> Tensor:
        """The outcome of the uncached pipeline. Pictures are decoded each time, which is little beside the run they
        are compared with: kept, they would take 48 times the memory."""
        return self.outcome(self.teacher_latents(batch))

    def outcome(self, latents: Tensor) -> Tensor:
        """What errors are measured on, of final latents [batch, channels, h, w]: pictures [batch, 3, height, width],
        not cut off at 0 and 1, where no gradient would be left; or the latents themselves. Differentiable, and float32
        whatever the models compute in: errors are small differences, and their sums are large."""
        outcome = unclamped_pictures(self.pipe, latents) if self.hparams["errors_of"] == "pictures" else latents
        return outcome.float()

    def effects(self, batch: dict[str, Any], gates: Gates, num_directions: int = 1) -> Effects:
        """Rolls gates out on the student's own trajectory, and measures what changes of them would do to the
        outcome, along the error and in some random directions."""
        self.forwards.set_gates(gates)
        return measure_effects(
            self.forwards,
            lambda: self.outcome(generate(self.pipe, self.sampling, batch, grad=True)),
            self.target(batch),
            self.generator,
            num_directions,
        )

    def guide(self, prediction: Tensor) -> Tensor:
        """The guided prediction [B, ...] of what the UNet makes of a batch, [unguided, guided] or guided alone."""
        if not self.setting.is_guided:
            return prediction
        unguided, guided = prediction.chunk(2)
        return unguided + self.sampling.guidance_scale * (guided - unguided)

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        check_batch(batch)
        logs = self.objective.step(self, batch)
        logs = {f"train/{name}": value for name, value in logs.items()}
        self.log_dict(logs, batch_size=len(batch["text"]), sync_dist=True)
        self.log("loss_db", -10 * logs["train/loss"].log10(), prog_bar=True, logger=False)

    def seed(self, number: int, *, is_own: bool = False) -> None:
        """All chance comes from the step's number and the run's seed (Lightning's `seed_everything`), so that a resumed
        run draws what an unbroken one draws: the same in all processes, or this one's own."""
        if is_own:
            number = number * num_processes() + rank()
        self.generator = torch.Generator(self.device).manual_seed(torch.initial_seed() % 2**31 * 1_000_003 + number)

    def update_router(self, learning_rate: float | None = None) -> None:
        """Moves the router along its gradient (the mean over all processes), at another learning rate if one is given;
        Lightning counts it as a step of the training."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, L.pytorch.core.optimizer.LightningOptimizer)
        for parameter in self.router.parameters():
            if parameter.grad is not None:
                parameter.grad = mean_over_processes(parameter.grad)
        self.router.check_gradients()
        if learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        optimizer.step()

    def progress(self) -> float:
        """Share of the training that is done, 0 to 1: of its epochs, whose length may have changed on resuming, or of
        its steps, whichever ends it first."""
        trainer, done = self.trainer, 0.0
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            num_batches = trainer.num_training_batches
            batch_idx = trainer.fit_loop.epoch_loop.batch_idx
            done = (self.current_epoch * num_batches + batch_idx) / (trainer.max_epochs * num_batches)
        if trainer.max_steps > 0:
            done = max(done, self.global_step / trainer.max_steps)
        return min(1.0, done)

    # Validation: what would be exported now

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        check_batch(batch)
        hard_errors = []
        for budget in self.hparams["budgets"]:
            gates = self.gates(budget)
            hard_errors.append(hard_error := self.rollout_errors(batch, gates).mean())
            logs: dict[str, Any] = {"hard_loss": hard_error, "exported_macs": self.router.kept(gates.compute)}
            generator = torch.Generator(self.device).manual_seed(batch_idx)
            if (soft := self.objective.draw(self.router, budget, generator)) is not None:
                soft_error = self.rollout_errors(batch, soft).mean()
                logs |= {"soft_loss": soft_error, "soft_hard_gap_db": 10 * (soft_error / hard_error).log10()}
            logs = {f"val/{budget:g}/{name}": value for name, value in logs.items()}
            self.log_dict(logs, batch_size=len(batch["text"]), sync_dist=True)
        loss = torch.stack(hard_errors).mean()
        for name, value in (("val_loss", loss), ("val_db", -10 * loss.log10())):  # to monitor by, and to read
            is_shown = name == "val_db"
            self.log(name, value, prog_bar=is_shown, logger=False, batch_size=len(batch["text"]), sync_dist=True)

    @torch.no_grad()
    def rollout_errors(self, batch: dict[str, Any], gates: Gates | Draft) -> Tensor:
        """Squared error of the outcome per sample [batch] under a schedule."""
        latents = self.rollout(batch, gates if isinstance(gates, Draft) else self.draft(gates))
        return (self.outcome(latents) - self.target(batch)).square().flatten(1).mean(1)

    def log_error(self, batches: Iterable[dict[str, Any]], gates: Gates | Draft) -> float:
        """Mean over samples of the logarithm of the outcome's squared error under a schedule: as PSNR is judged,
        and not ruled by the few samples with the largest errors. Infinite if a trajectory is lost."""
        errors = torch.cat([self.rollout_errors(batch, gates) for batch in batches])
        error = float(errors.clamp_min(1e-30).log().mean())
        return error if math.isfinite(error) else math.inf

    @torch.no_grad()
    def rollout(self, batch: dict[str, Any], draft: Draft | None, output_type: str = "latent") -> Tensor:
        """What the pipeline makes under a draft of a schedule, as at inference; without one, uncached."""
        file = self.setting.schedule(draft, policy=self.objective.policy, settings={}) if draft else None
        with scheduled(self.pipe, self.sampling, file) as sampling:
            return generate(self.pipe, sampling, batch, output_type=output_type)
