"""A whole tiny pipeline folder, prompts and all: what training starts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from tiny_models import UNET_CONFIGS, build_models
from transformers import CLIPTextModelWithProjection

from hgc_learn.sampling import SamplingConfig
from hgc_learn.teachers.pipeline import HIDDEN_SIZE, build_text_encoder, build_tokenizer
from hgc_learn.training.gates import Gates

if TYPE_CHECKING:
    from hgc_learn.setting import Draft
    from hgc_learn.training.module import RouterModule

BUDGET = 0.5
SAMPLING = SamplingConfig(num_inference_steps=5, guidance_scale=3.0, height=64, width=64)


def build_tiny_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """For control images of eight times the UNet's size, with random weights."""
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 8))
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return controlnet


def build_tiny_vae() -> AutoencoderKL:
    """Of factor 8."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def save_tiny_teacher(folder: Path, shape: str = "small") -> None:
    """Saves a pipeline for 64x64 pictures with random weights. `shape` is `small` or `sd15`, which has more sites."""
    unet, _ = build_models(UNET_CONFIGS[shape] | {"cross_attention_dim": HIDDEN_SIZE, "sample_size": 8})
    controlnet = build_tiny_controlnet(unet)
    vae = build_tiny_vae()
    tokenizer = build_tokenizer()
    StableDiffusionControlNetPipeline(
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        controlnet=controlnet,
        scheduler=UniPCMultistepScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def save_tiny_models(folder: Path, shape: str) -> None:
    """Saves a pipeline for 64x64 pictures and, as on the hub, a ControlNet of its own: `folder/model` and
    `folder/controlnet`. `shape` is `small` (of SD1.5) or `small_sdxl`."""
    is_sdxl = "sdxl" in shape
    hidden_size = 2 * HIDDEN_SIZE if is_sdxl else HIDDEN_SIZE  # SDXL's prompts are those of two encoders side by side
    sizes = {"projection_class_embeddings_input_dim": 6 * 4 + HIDDEN_SIZE} if is_sdxl else {}
    unet, _ = build_models(UNET_CONFIGS[shape] | {"cross_attention_dim": hidden_size, "sample_size": 8} | sizes)
    build_tiny_controlnet(unet).save_pretrained(folder / "controlnet")
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(tokenizer)
    parts: dict[str, Any] = {
        "vae": build_tiny_vae(),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": UniPCMultistepScheduler(steps_offset=1),
        "feature_extractor": None,
    }
    pipe: Any
    if is_sdxl:
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(encoder.config), "tokenizer_2": tokenizer}
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    pipe.save_pretrained(folder / "model")


def random_gates(module: RouterModule, share: float, seed: int) -> Gates:
    """Computes a share of the gates and fills in the rest with any reach, those of `hold` and `linear` among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = module.router.logits.shape
    compute = torch.rand(shape, generator=generator) < share
    if share < 1:
        compute[2, module.router.sites.index("unet:guidance")] = False  # a step of half a batch among the full ones
    compute[0] = True
    reach = torch.rand(shape, generator=generator)
    plain = torch.rand(shape, generator=generator) < 0.5
    return Gates(compute, torch.where(plain, reach.round(), reach))


def changed(gates: Gates, step: int, column: int, *, is_flip: bool = True) -> Gates:
    """One gate flipped, or 1 added to its reach."""
    compute, reach = gates.compute.clone(), gates.reach.clone()
    if is_flip:
        compute[step, column] ^= True
    else:
        reach[step, column] += 1
    return Gates(compute, reach)


def fit_arguments(teacher: Path, folder: Path, max_steps: int, *more: str) -> list[str]:
    """The command line of a training, `more` being arguments of it. Unless they ask for it there is no validation, for
    drawing what TensorBoard shows takes longer than these trainings, and, unless they name an objective, no warm
    start."""
    arguments = {
        "trainer.default_root_dir": folder,
        "trainer.max_steps": max_steps,
        "trainer.accelerator": "cpu",
        "trainer.enable_model_summary": "false",
        "trainer.limit_val_batches": 0,
        "model.model": teacher,
        "data": "SceneDataModule",
        "data.num_train": 4,
        "data.num_val": 2,
        "data.batch_size": 2,
        "checkpoint.dirpath": folder / "checkpoints",
        **{f"model.sampling.{name}": getattr(SAMPLING, name) for name in ("num_inference_steps", "guidance_scale")},
        "model.sampling.height": 64,
        "model.sampling.width": 64,
    }
    if not any(argument.startswith("--model.objective") for argument in more):
        arguments["model.objective.num_warm_start_batches"] = 0
    return ["fit", *(f"--{name}={value}" for name, value in arguments.items()), *more]


def fit(teacher: Path, folder: Path, max_steps: int, *more: str) -> Path:
    """Trains through the command line's own code; returns the last checkpoint."""
    from hgc_learn.training.lightning_cli import train

    train(fit_arguments(teacher, folder, max_steps, *more))
    return folder / "checkpoints" / "last.ckpt"


def learn(module: RouterModule, batch: dict[str, Any]) -> Draft:
    """One of everything that a training by `Rollout` and its export do, where module and batch are."""
    from hgc_learn.export.fills import learn_fills
    from hgc_learn.export.patterns import cap
    from hgc_learn.export.specialise import specialise
    from hgc_learn.objectives import Rollout

    objective = module.objective
    assert isinstance(objective, Rollout)
    optimizer = objective.optimizer(module.router)
    objective.warm_start(module, [batch])
    module.seed(1, is_own=True)
    objective.gradients(module, batch, BUDGET)
    module.router.check_gradients()
    optimizer.step()
    module.router.clamp()
    gates = specialise(module, BUDGET, [batch], 1)
    cap(module.router, gates, BUDGET, 2)
    draft = learn_fills(module, gates, [batch], 1)
    assert module.log_error([batch], draft) < float("inf")
    return draft
