"""What pipelines of real size have and the demonstration's has not: SDXL's pictures and prompts, LCM's guidance, half
precision."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from training_fixtures import BUDGET, SAMPLING, save_tiny_models

from hgc_learn.evaluation import decode, unclamped_pictures
from hgc_learn.inference import apply_schedule
from hgc_learn.objectives import Rollout
from hgc_learn.sampling import SamplingConfig, generate, load_pipeline
from hgc_learn.setting import Draft
from hgc_learn.training.gates import Gates
from hgc_learn.training.module import RouterModule


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    save_tiny_models(folder, "small_sdxl")
    return folder


def load(folder: Path, **kwargs: Any) -> RouterModule:
    kwargs = {"errors_of": "latents", **kwargs}
    return RouterModule(str(folder / "model"), SAMPLING, controlnet=str(folder / "controlnet"), **kwargs)


def test_controlnets_that_do_not_fit_are_refused(sdxl: Path, teacher: Path) -> None:
    for folder, message in (
        (teacher / "controlnet", "for another kind of model"),
        (sdxl / "model" / "unet", "is a UNet"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pipeline(str(sdxl / "model"), SAMPLING, controlnet=str(folder))


def test_weights_that_come_in_a_variant_only(sdxl: Path, tmp_path: Path) -> None:
    plain = load(sdxl).pipe
    StableDiffusionXLPipeline.from_pretrained(sdxl / "model").save_pretrained(tmp_path / "model", variant="fp16")
    plain.controlnet.save_pretrained(tmp_path / "controlnet", variant="fp16")
    model, own = str(tmp_path / "model"), str(tmp_path / "controlnet")
    like_the_hub = shutil.copytree(sdxl / "controlnet", tmp_path / "looks as if")
    (like_the_hub / "notes.fp16.txt").touch()  # not seen to be without it before it is asked for
    for controlnet in (own, str(sdxl / "controlnet"), str(like_the_hub)):  # the first comes in it, the others do not
        pipe = load_pipeline(model, SAMPLING, controlnet=controlnet, variant="fp16")
        for name in ("unet", "controlnet", "vae", "text_encoder", "text_encoder_2"):
            ours, theirs = (getattr(each, name).state_dict() for each in (pipe, plain))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with pytest.raises(ValueError, match=r"model: .* cannot be loaded as a diffusers pipeline"):
        load_pipeline(model, SAMPLING, controlnet=str(sdxl / "controlnet"), variant="ema")
    with pytest.raises(ValueError, match=r"controlnet: .* cannot be loaded as a ControlNet"):
        load_pipeline(model, SAMPLING, controlnet=own)


def test_latents_with_a_mean_are_decoded_as_the_pipeline_does(sdxl: Path, batch: dict[str, Any]) -> None:
    module = load(sdxl)
    latents, plain = generate(module.pipe, SAMPLING, batch), generate(module.pipe, SAMPLING, batch, output_type="pt")
    numbers = {"latents_mean": [0.5, -0.3, 0.2, 0.1], "latents_std": [2.0, 1.5, 1.2, 0.9]}
    module.pipe.vae.register_to_config(**numbers)
    pictures = generate(module.pipe, SAMPLING, batch, output_type="pt")
    assert not torch.equal(pictures, plain)
    torch.testing.assert_close(decode(module.pipe, latents), pictures)
    torch.testing.assert_close(unclamped_pictures(module.pipe, latents).clamp(0, 1), pictures)


def test_a_vae_that_overflows_is_decoded_in_float32(sdxl: Path, batch: dict[str, Any]) -> None:
    module = load(sdxl, dtype="float16")
    vae = module.pipe.vae
    vae.register_to_config(force_upcast=True)
    for parameter in (vae.decoder.conv_in.weight, vae.decoder.conv_in.bias):
        parameter.data.mul_(3e3)
    latents = generate(module.pipe, SAMPLING, batch)
    with pytest.warns(FutureWarning, match="upcast_vae"):  # diffusers' own pipeline uses what it warns of
        pictures = generate(module.pipe, SAMPLING, batch, output_type="pt")
    assert pictures.isfinite().all()
    torch.testing.assert_close(decode(module.pipe, latents), pictures)
    assert vae.dtype == torch.float16
    with pytest.raises(ValueError, match="this pipeline's VAE overflows in float16"):
        load(sdxl, dtype="float16", errors_of="pictures")


def test_no_negative_prompt_is_what_the_pipeline_takes_for_none(sdxl: Path, batch: dict[str, Any]) -> None:
    pipe = load_pipeline(str(sdxl / "model"), SAMPLING, controlnet=str(sdxl / "controlnet"))
    generators = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
    call = {"num_inference_steps": SAMPLING.num_inference_steps, "guidance_scale": SAMPLING.guidance_scale}
    expected = pipe(
        list(batch["text"]), image=batch["conditioning_image"], generator=generators, output_type="latent", **call
    ).images
    assert torch.equal(generate(pipe, SAMPLING, batch), expected)
    assert not torch.equal(generate(pipe, replace(SAMPLING, negative_prompt="red"), batch), expected)


def test_a_unet_that_takes_the_guidance_scale_has_no_halves(
    teacher: Path, tmp_path: Path, batch: dict[str, Any]
) -> None:
    pipe = load_pipeline(str(teacher), SAMPLING)
    config = {**pipe.unet.config, "time_cond_proj_dim": 8}
    pipe.unet = UNet2DConditionModel.from_config(config)
    pipe.save_pretrained(tmp_path)
    sampling = replace(SAMPLING, scheduler="LCMScheduler")
    module = RouterModule(str(tmp_path), sampling, errors_of="latents")
    assert not module.setting.is_guided
    draft = module.draft(Gates.full(*module.router.logits.shape))
    macs = module.setting.schedule(draft, policy="none", settings={}).macs
    assert macs["full"] == module.num_steps * sum(cost.macs for cost in module.costs.values())
    schedule = module.setting.schedule(Draft({"unet:eps": "C-C-C"}), policy="none", settings={})
    with apply_schedule(module.pipe, schedule) as handle:
        generate(module.pipe, sampling, batch)
        assert handle.stats()["macs_cached"] == schedule.macs["cached"] == macs["full"] * 3 / 5
    prediction = torch.randn(2, 4, 8, 8)
    assert torch.equal(module.guide(prediction), prediction)
    with pytest.raises(ValueError, match="unet:guidance is the difference that guidance makes"):
        RouterModule(str(tmp_path), sampling, sites=["unet:guidance"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_learns_from_the_full_schedule_on(teacher: Path, batch: dict[str, Any], dtype: str) -> None:
    module = RouterModule(str(teacher), SAMPLING, dtype=dtype, errors_of="latents")
    Rollout().warm_start(module, [batch])
    assert module.router.logits.isfinite().all()
    assert len(module.router.logits.unique()) > 10
    module.objective.gradients(module, batch, BUDGET)
    module.router.check_gradients()


@pytest.mark.parametrize("num_steps", [2, 5])
def test_few_gates_can_start_warm(teacher: Path, batch: dict[str, Any], num_steps: int) -> None:
    sampling = SamplingConfig(num_steps, SAMPLING.guidance_scale, SAMPLING.height, SAMPLING.width)
    module = RouterModule(str(teacher), sampling, sites=["unet:eps"], budgets=[0.9], errors_of="latents")
    Rollout().warm_start(module, [batch])
    assert module.router.logits.isfinite().all()
