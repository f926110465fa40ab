"""Loading a pipeline with another sampler than its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
)
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from training_fixtures import SAMPLING
from transformers import CLIPConfig, CLIPImageProcessorPil

from hgc_learn.evaluation import picture_psnr, render, timed
from hgc_learn.files import to_json
from hgc_learn.inference import apply_schedule
from hgc_learn.policies import POLICIES
from hgc_learn.sampling import generate, load_pipeline
from hgc_learn.scheduler_config import how_to_set, other_setting, scheduler_config
from hgc_learn.setting import Setting


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_latents_are_not_clipped_like_pixels(teacher: Path, scheduler: str) -> None:
    """The pipeline's config does not speak of it, and some schedulers clip by default."""
    pipe = load_pipeline(str(teacher), replace(SAMPLING, scheduler=scheduler))
    assert type(pipe.scheduler).__name__ == scheduler
    assert not pipe.scheduler.config.get("clip_sample", False)


def test_an_unknown_scheduler_is_refused(teacher: Path) -> None:
    with pytest.raises(ValueError, match="no scheduler named 'Nothing'"):
        load_pipeline(str(teacher), replace(SAMPLING, scheduler="Nothing"))


@pytest.mark.parametrize("scheduler", [None, "DPMSolverMultistepScheduler"])
def test_a_scheduler_is_set(teacher: Path, scheduler: str | None) -> None:
    plain, pipe = (
        load_pipeline(str(teacher), replace(SAMPLING, scheduler=scheduler, scheduler_config=settings))
        for settings in (None, {"use_karras_sigmas": True, "solver_order": 3})
    )
    expected = scheduler_config(plain.scheduler) | {"use_karras_sigmas": True, "solver_order": 3}
    assert type(pipe.scheduler) is type(plain.scheduler)
    assert scheduler_config(pipe.scheduler) == expected != scheduler_config(plain.scheduler)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"karras": True}, "scheduler_config: DPMSolverMultistepScheduler has no karras, only num_train_timesteps"),
        (
            {"algorithm_type": "best"},
            "set to {'algorithm_type': 'best'}, cannot take the place of the pipeline's",
        ),
    ],
)
def test_settings_that_a_scheduler_cannot_have_are_refused(
    teacher: Path, settings: dict[str, Any], message: str
) -> None:
    sampling = replace(SAMPLING, scheduler="DPMSolverMultistepScheduler", scheduler_config=settings)
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(teacher), sampling)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
def test_settings_survive_a_file(name: str) -> None:
    scheduler = getattr(diffusers, name)(beta_end=0.0123456789, timestep_spacing="trailing")
    settings = json.loads(to_json(scheduler_config(scheduler)))
    assert other_setting(settings, scheduler) is None
    assert other_setting(settings, type(scheduler)(beta_end=0.0123456789)) is None  # timesteps tell
    assert other_setting(settings, type(scheduler)(beta_end=0.0125)) == ("beta_end", 0.0123456789, 0.0125)
    assert other_setting({"of_another_version": 1}, scheduler) is None


def test_lists_and_objects_among_the_settings_are_compared() -> None:
    def unipc(**settings: Any) -> Any:
        return diffusers.UniPCMultistepScheduler(**settings)

    plain, betas = scheduler_config(unipc()), np.linspace(1e-4, 2e-2, 1000)
    for name, value in (
        ("disable_corrector", [0, 1]),
        ("trained_betas", betas),
        ("solver_p", diffusers.DPMSolverMultistepScheduler()),
    ):
        made_with = json.loads(to_json(scheduler_config(unipc(**{name: value}))))
        assert other_setting(made_with, unipc(**{name: value})) is None
        for one, other in ((made_with, unipc()), (plain, unipc(**{name: value}))):
            assert (difference := other_setting(one, other)) is not None
            assert difference[0] == name
    assert how_to_set(
        "X", "disable_corrector", scheduler_config(unipc(disable_corrector=[0, 1]))["disable_corrector"]
    ) == ("Set pipe.scheduler = X.from_config(pipe.scheduler.config, disable_corrector=[0, 1])")
    assert how_to_set("X", "solver_order", 2).endswith("solver_order=2)")
    digest = scheduler_config(unipc(trained_betas=betas))["trained_betas"]
    for text in (digest, "json __import__('os').system('true')"):  # the latter in a stranger's file
        assert how_to_set("X", "trained_betas", text) == "Set trained_betas of pipe.scheduler as it was"
    assert how_to_set("X", "disable_corrector", "json [true, null]").endswith("disable_corrector=[True, None])")


def test_a_setting_is_of_the_pipelines_own_scheduler(teacher: Path) -> None:
    pipe = load_pipeline(str(teacher), SAMPLING)
    for sampling, message in (
        (replace(SAMPLING, scheduler="DDIMScheduler"), "sampling has DDIMScheduler, the pipeline UniPCMultistep"),
        (replace(SAMPLING, scheduler_config={"solver_order": 3}), "sampling has solver_order=3, the pipeline 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Setting.of_pipeline(pipe, sampling)
        assert Setting.of_pipeline(load_pipeline(str(teacher), sampling), sampling).num_steps == 5


@pytest.mark.parametrize(
    "scheduler", ["FlowMatchEulerDiscreteScheduler", "DDPMWuerstchenScheduler", "RePaintScheduler"]
)
def test_schedulers_of_other_kinds_of_pipelines_are_refused(teacher: Path, scheduler: str) -> None:
    with pytest.raises(ValueError, match=f"scheduler: {scheduler} is for pipelines of another kind"):
        load_pipeline(str(teacher), replace(SAMPLING, scheduler=scheduler))


def test_a_scheduler_with_noise_of_its_own_is_refused(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DPMSolverSDEScheduler, which needs torchsde."""

    class Noisy(DDIMScheduler):
        @register_to_config
        def __init__(self, noise_sampler_seed: int | None = None) -> None:
            DDIMScheduler.__init__(self)

    monkeypatch.setattr(diffusers, "NoisyScheduler", Noisy, raising=False)
    with pytest.raises(ValueError, match="Noisy draws its noise from the whole batch"):
        load_pipeline(str(teacher), replace(SAMPLING, scheduler="NoisyScheduler"))


def test_pipelines_without_a_unet_are_refused(teacher: Path, tmp_path: Path) -> None:
    vae = load_pipeline(str(teacher), SAMPLING).vae
    transformer = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=8)
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a DiTPipeline, which has no UNet"):
        load_pipeline(str(tmp_path), SAMPLING)


def test_weights_that_have_not_been_fetched_are_told(teacher: Path, tmp_path: Path) -> None:
    model = shutil.copytree(teacher, tmp_path / "model", ignore=shutil.ignore_patterns("trained"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (model / "text_encoder" / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match="cannot be loaded as a diffusers pipeline"):
        load_pipeline(str(model), SAMPLING)


def test_pictures_are_not_blacked_out(teacher: Path, tmp_path: Path, batch: dict[str, Any]) -> None:
    """A checker that flags all: what is cached and what is not would both be black, and equal."""
    pipe = load_pipeline(str(teacher), SAMPLING)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=4))
    checker.concept_embeds_weights.data.fill_(-2)
    parts = {**pipe.components, "safety_checker": checker, "feature_extractor": CLIPImageProcessorPil()}
    checked = StableDiffusionControlNetPipeline(**parts)
    expected = generate(pipe, SAMPLING, batch, output_type="pt")
    assert not torch.equal(generate(checked, SAMPLING, batch, output_type="pt"), expected)
    checked.save_pretrained(tmp_path)
    assert torch.equal(generate(load_pipeline(str(tmp_path), SAMPLING), SAMPLING, batch, output_type="pt"), expected)


def test_several_controlnets_are_refused(teacher: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(str(teacher), SAMPLING)
    parts = {**pipe.components, "controlnet": [pipe.controlnet, pipe.controlnet]}
    StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="several ControlNets"):
        load_pipeline(str(tmp_path), SAMPLING)


def test_pipelines_that_start_from_a_picture_are_refused(teacher: Path, tmp_path: Path) -> None:
    parts = load_pipeline(str(teacher), SAMPLING).components
    pipe = StableDiffusionControlNetImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a StableDiffusionControlNetImg2ImgPipeline, which starts from a picture"):
        load_pipeline(str(tmp_path), SAMPLING)


def test_pipelines_are_put_on_the_default_device(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hgc_learn.sampling.default_device", lambda: torch.device("meta"))
    assert load_pipeline(str(teacher), SAMPLING).device.type == "meta"


def test_a_sampler_that_calls_the_model_twice_a_step(teacher: Path, batch: dict[str, Any]) -> None:
    """A schedule counts calls, a pipeline is asked for steps."""
    sampling = replace(SAMPLING, scheduler="HeunDiscreteScheduler", num_inference_steps=4)
    pipe = load_pipeline(str(teacher), sampling)
    schedule = POLICIES["uniform"].schedule(Setting.of_pipeline(pipe, sampling, []), interval=2)
    assert schedule.num_steps == 7
    full = generate(pipe, sampling, batch)
    with apply_schedule(pipe, schedule):
        expected = generate(pipe, sampling, batch)
    assert not torch.equal(expected, full)
    assert torch.equal(render(pipe, sampling, [batch], schedule).latents, expected)
    assert torch.equal(timed(pipe, sampling, batch, schedule)[0], expected)


def test_psnr_of_half_precision_is_not_rounded_to_it() -> None:
    full = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    cached = (full + torch.tensor([0.01, 0.013, 0.017])[:, None, None, None]).bfloat16()
    expected = -10 * (cached.double() - full.double()).square().flatten(1).mean(1).log10()
    torch.testing.assert_close(picture_psnr(cached, full).double(), expected, rtol=1e-5, atol=0)
