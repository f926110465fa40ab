"""Lightning modules of the teacher's training stages: text encoder, autoencoder, UNet with ControlNet."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTextModel, CLIPTokenizer

from hgc_learn.demo.metrics import scene_metrics
from hgc_learn.demo.scenes import COLORS, IMAGE_SIZE, KINDS, label_map_to_conditioning
from hgc_learn.evaluation import picture_psnr
from hgc_learn.sampling import SamplingConfig, generate
from hgc_learn.teachers.pipeline import GUIDANCE_SCALE, SCHEDULER_CONFIG, build_pipeline, tokenize


def warmup_stable_decay(step: int, *, num_steps: int, num_warmup_steps: int, decay_share: float) -> float:
    """Learning rate factor in [0, 1]: linear warm-up, constant, then linear to 0 over the last share of the steps."""
    warmup = (step + 1) / max(1, num_warmup_steps)
    decay = (num_steps - step) / max(1.0, decay_share * num_steps)
    return max(0.0, min(1.0, warmup, decay))


class _Stage(L.LightningModule):
    """AdamW with a warm-up, a constant phase and a decay to zero at the trainer's `max_steps`."""

    learning_rate = 1e-3
    num_warmup_steps = 100
    decay_share = 0.3
    weight_decay = 0.01

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)

        def factor(step: int) -> float:
            return warmup_stable_decay(
                step,
                num_steps=self.trainer.max_steps,
                num_warmup_steps=self.num_warmup_steps,
                decay_share=self.decay_share,
            )

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


class CaptionModule(_Stage):
    """Pretrains the text encoder: at each noun it must tell kind and colour, linearly.

    With the colour bound to its noun beforehand, cross-attention only has to look the noun up.

    Args:
        text_encoder: trained in place.
        noun_ids: token id of every kind, in the order of KINDS.
        color_ids: token id of every colour, in the order of COLORS.
    """

    learning_rate = 2e-3
    decay_share = 0.5
    noun_ids: Tensor
    color_ids: Tensor

    def __init__(self, text_encoder: CLIPTextModel, noun_ids: list[int], color_ids: list[int]) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        hidden_size = text_encoder.config.hidden_size
        self.kind_head = nn.Linear(hidden_size, len(KINDS))
        self.color_head = nn.Linear(hidden_size, len(COLORS))
        self.register_buffer("noun_ids", torch.tensor(noun_ids), persistent=False)
        self.register_buffer("color_ids", torch.tensor(color_ids), persistent=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """`batch`: token ids, int64 [B, MAX_TOKENS]. Every noun directly follows its colour."""
        hidden = self.text_encoder(batch).last_hidden_state
        rows, columns = torch.isin(batch, self.noun_ids).nonzero(as_tuple=True)
        kinds = (batch[rows, columns, None] == self.noun_ids).long().argmax(-1)
        colors = (batch[rows, columns - 1, None] == self.color_ids).long().argmax(-1)
        kind_logits, color_logits = self.kind_head(hidden[rows, columns]), self.color_head(hidden[rows, columns])
        loss = F.cross_entropy(kind_logits, kinds) + F.cross_entropy(color_logits, colors)
        self.log("loss", loss, prog_bar=True)
        self.log("color_accuracy", (color_logits.argmax(-1) == colors).float().mean(), prog_bar=True)
        return loss


class WordsModule(_Stage):
    """Pretrains the text encoder on captions of any kind: at their end it must tell, linearly, which tokens they have.

    Args:
        text_encoder: trained in place.
    """

    learning_rate = 2e-3
    decay_share = 0.5

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.head = nn.Linear(text_encoder.config.hidden_size, text_encoder.config.vocab_size)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """`batch`: token ids, int64 [B, max_tokens]."""
        logits = self.head(self.text_encoder(batch).pooler_output)
        loss = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits).scatter(1, batch, 1.0))
        self.log("loss", loss, prog_bar=True)
        return loss


def _gradient_difference(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference between the image gradients: blurred edges are what an L1 loss forgives."""
    error = prediction - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


class AutoencoderModule(_Stage):
    """Trains the VAE with L1, MSE, image gradients and a little KL."""

    learning_rate = 2e-3
    decay_share = 0.6
    kl_weight = 1e-4

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """`batch`: pictures, float32 [B, 3, H, W] in [-1, 1]."""
        posterior = self.vae.encode(batch).latent_dist
        reconstruction = self.vae.decode(posterior.sample()).sample
        error = reconstruction - batch
        loss = error.abs().mean() + error.pow(2).mean() + 0.5 * _gradient_difference(reconstruction, batch)
        kl = 0.5 * (posterior.mean.pow(2) + posterior.var - 1 - posterior.logvar).mean()
        self.log_dict({"loss": loss, "psnr": -10 * torch.log10(error.pow(2).mean() / 4)}, prog_bar=True)
        return loss + self.kl_weight * kl

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """`batch`: `image`, pictures as in training."""
        reconstruction = self.vae.decode(self.vae.encode(batch["image"]).latent_dist.mean).sample
        pictures, originals = ((values / 2 + 0.5).clamp(0, 1) for values in (reconstruction, batch["image"]))
        self.log("val_psnr", picture_psnr(pictures, originals).mean(), batch_size=len(pictures), prog_bar=True)


def _average(
    averaged: tuple[Tensor, ...] | list[Tensor],
    current: tuple[Tensor, ...] | list[Tensor],
    num_averaged: Tensor | int,
) -> None:
    """Exponential moving average whose decay warms up to 0.999; a fixed one would lag in so short a run."""
    count = int(num_averaged)
    torch._foreach_lerp_(averaged, current, 1 - min(0.999, (1 + count) / (10 + count)))


class Denoiser(nn.Module):
    """UNet and ControlNet as one module, trained together."""

    def __init__(self, unet: UNet2DConditionModel, controlnet: ControlNetModel) -> None:
        super().__init__()
        self.unet = unet
        self.controlnet = controlnet

    def forward(self, sample: Tensor, timesteps: Tensor, text: Tensor, conditioning: Tensor) -> Tensor:
        """[B, 4, 16, 16], [B], [B, MAX_TOKENS, HIDDEN_SIZE], [B, 3, 64, 64] -> prediction [B, 4, 16, 16]."""
        down, mid = self.controlnet(sample, timesteps, text, conditioning, return_dict=False)
        return self.unet(
            sample, timesteps, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample


class DenoiserModule(_Stage):
    """Trains UNet and ControlNet together, from nothing, to predict the velocity.

    Velocity, because at the noisy end it asks for the picture itself, so control and caption matter from the first
    step on; the noise, at that end, is nearly given by the input.

    Args:
        unet: trained.
        controlnet: trained.
        tokenizer: for the empty caption and for the pictures of the validation.
        text_encoder: frozen.
        vae: frozen; decodes the pictures of the validation.
    """

    learning_rate = 1e-3
    num_warmup_steps = 200
    decay_share = 0.28
    # Timesteps are 1000 u^power, u uniform. A power below 1 favours the noisy end, where layout is decided.
    timestep_power = 0.85
    caption_dropout = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
    validation_timesteps = (100, 300, 500, 700, 900)

    empty_ids: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel,
        *,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
    ) -> None:
        super().__init__()
        self.denoiser = Denoiser(unet, controlnet)
        self.averaged = AveragedModel(self.denoiser, multi_avg_fn=_average).requires_grad_(False)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.noise_scheduler = DDPMScheduler(**SCHEDULER_CONFIG)
        self.register_buffer("empty_ids", tokenize(tokenizer, [""])[0], persistent=False)

    def on_train_epoch_start(self) -> None:
        """Keep the frozen text encoder free of dropout."""
        self.text_encoder.eval()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """`batch`: items of :class:`~hgc_learn.teachers.data.LatentDataset`."""
        latents, controls, token_ids = batch
        dropped = torch.rand(len(latents), 1, device=self.device) < self.caption_dropout
        with torch.no_grad():
            text = self.text_encoder(torch.where(dropped, self.empty_ids, token_ids)).last_hidden_state
        num_timesteps = self.noise_scheduler.config["num_train_timesteps"]
        timesteps = (num_timesteps * torch.rand(len(latents), device=self.device) ** self.timestep_power).long()
        timesteps = timesteps.clamp(max=num_timesteps - 1)
        noise = torch.randn_like(latents)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        target = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        prediction = self.denoiser(noisy, timesteps, text, self.conditioning(controls))
        errors = (prediction - target).pow(2).mean(1)
        self.log("loss", errors.mean(), prog_bar=True)
        return self.weigh(errors, controls)

    def conditioning(self, controls: Tensor) -> Tensor:
        """Control pictures, uint8 [B, 64, 64, 3], as the ControlNet reads them: float32 [B, 3, 64, 64] in [0, 1]."""
        return controls.permute(0, 3, 1, 2).float() / 255

    def weigh(self, errors: Tensor, controls: Tensor) -> Tensor:
        """The loss, from squared errors [B, 16, 16]: their mean."""
        return errors.mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then update the average. Here, because checkpoints are written before `on_train_batch_end`."""
        super().optimizer_step(*args, **kwargs)
        self.averaged.update_parameters(self.denoiser)

    def pipeline(self) -> StableDiffusionControlNetPipeline:
        """The teacher with the averaged weights."""
        denoiser = self.averaged.module
        assert isinstance(denoiser, Denoiser)
        return build_pipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            vae=self.vae,
            unet=denoiser.unet,
            controlnet=denoiser.controlnet,
        )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The averaged weights' loss with the control of the picture and with that control mirrored: the more the
        second is above the first, the more the control says where things are.

        `batch`: `image` [B, 3, 64, 64] in [-1, 1], `conditioning_image` [B, 3, 64, 64] in [0, 1], `text`, `seed`.
        """
        latents = self.vae.encode(batch["image"]).latent_dist.mean * self.vae.config.scaling_factor
        text = self.text_encoder(tokenize(self.tokenizer, batch["text"]).to(self.device)).last_hidden_state
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seed"].tolist()]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        noise, given = noise.to(latents), batch["conditioning_image"]
        for name, control in (("val_loss", given), ("val_loss_mirrored_control", given.flip(3))):
            losses = []
            for step in self.validation_timesteps:
                timesteps = torch.full((len(latents),), step, device=self.device)
                noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
                target = self.noise_scheduler.get_velocity(latents, noise, timesteps)
                losses.append(F.mse_loss(self.averaged(noisy, timesteps, text, control), target))
            self.log(name, torch.stack(losses).mean(), batch_size=len(latents), prog_bar=True)


class SceneDenoiserModule(DenoiserModule):
    """On drawn scenes: controls are label maps, objects weigh more, and pictures are made and judged."""

    num_validation_steps = 20
    # Objects cover a fifth of the picture but hold nearly all that can be controlled. Where a known map weights the
    # error only the speed of learning changes; the best prediction at each place stays the same.
    object_weight = 2.0

    def __init__(self, unet: UNet2DConditionModel, controlnet: ControlNetModel, **options: Any) -> None:
        super().__init__(unet, controlnet, **options)
        self.metrics = scene_metrics()

    def conditioning(self, controls: Tensor) -> Tensor:
        """Label maps, uint8 [B, 64, 64] -> float32 [B, 3, 64, 64] in [0, 1]."""
        return label_map_to_conditioning(controls)

    def weigh(self, errors: Tensor, controls: Tensor) -> Tensor:
        """The mean in which objects weigh more."""
        objects = F.adaptive_avg_pool2d((controls > 0).float(), errors.shape[-1])
        weights = 1 + self.object_weight * objects
        self.log("loss_objects", (objects * errors).sum() / objects.sum(), prog_bar=True)
        return (weights * errors).sum() / weights.sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """`batch`: items of :class:`~hgc_learn.demo.scenes.SceneDataset`."""
        sampling = SamplingConfig(self.num_validation_steps, GUIDANCE_SCALE, IMAGE_SIZE, IMAGE_SIZE)
        pictures = generate(self.pipeline(), sampling, batch, output_type="pt")
        self.metrics.update(pictures, batch["label_map"], batch["object_colors"])
        self.log_dict(self.metrics, prog_bar=True)
