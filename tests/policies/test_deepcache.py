"""DeepCache against its authors' package, its spacing against theirs, and its MACs against the published figures."""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_pipelines import controlnet_at
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UniPCMultistepScheduler
from tiny_models import GUIDANCE_SCALE, IMAGE_SIZE, NUM_STEPS, TinyPipeline, build_pipeline, shared_pipeline
from torch import Tensor
from unmeasured import unmeasured_setting

from hgc_learn.inference import apply_schedule
from hgc_learn.models.architectures import build_architecture
from hgc_learn.policies import POLICIES
from hgc_learn.policies.deepcache import quadratic_steps
from hgc_learn.sampling import SamplingConfig
from hgc_learn.setting import Setting
from hgc_learn.sites import decoder_inputs

SAMPLING = SamplingConfig(NUM_STEPS, GUIDANCE_SCALE, IMAGE_SIZE, IMAGE_SIZE)
DEEPCACHE = POLICIES["deepcache"]

needs_package = pytest.mark.skipif(importlib.util.find_spec("DeepCache") is None, reason="needs the package DeepCache")


class Plain(TinyPipeline):
    """The same models without the ControlNet."""

    def __init__(self, tiny: TinyPipeline):
        kind = StableDiffusionXLPipeline if tiny.shape == "sdxl" else StableDiffusionPipeline
        parts = {
            name: part for name, part in tiny.pipe.components.items() if name not in ("controlnet", "image_encoder")
        }
        parts["scheduler"] = DDIMScheduler(steps_offset=1, clip_sample=False)  # the only ones that it does not warn of
        extra = {} if tiny.shape == "sdxl" else {"requires_safety_checker": False}
        super().__init__(tiny.shape, kind(**parts, **extra))
        self.pipe.set_progress_bar_config(disable=True)

    def arguments(self, num_images: int = 1, seed: int = 0) -> dict[str, Any]:
        arguments = super().arguments(num_images, seed)
        del arguments["image"]
        return arguments


def by_package(tiny: TinyPipeline, interval: int, branch: int) -> Tensor:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=tiny.pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        return tiny()
    finally:
        helper.disable()
        for module in (tiny.pipe.unet, *tiny.pipe.unet.modules()):
            module.__dict__.pop("forward", None)


def by_policy(tiny: TinyPipeline, setting: Setting, **knobs: Any) -> Tensor:
    with apply_schedule(tiny.pipe, DEEPCACHE.schedule(setting, **knobs)):
        return tiny()


def setting_of(tiny: TinyPipeline) -> Setting:
    return Setting.of_pipeline(tiny.pipe, SAMPLING)


def relative_error(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


@needs_package
@pytest.mark.parametrize(
    ("shape", "interval", "first"), [("sd15", 2, 0), ("sd15", 3, 1), ("sdxl", 3, 0), ("sdxl", 5, 1), ("sd2", 2, 0)]
)
def test_latents_are_the_packages(shape: str, interval: int, first: int) -> None:
    """Every branch of SD1.5 and SDXL is met at one of the intervals; SD2 has the blocks of SD1.5."""
    tiny = Plain(shared_pipeline(shape))
    setting, full = setting_of(tiny), tiny()
    for branch in range(first, len(decoder_inputs(setting.graph)), 2 if shape != "sd2" else 5):
        reference = by_package(tiny, interval, branch)
        assert relative_error(by_policy(tiny, setting, interval=interval, branch=branch), reference) < 1e-6
        assert relative_error(full, reference) > 1e-5


@needs_package
def test_fresh_residuals_are_what_the_package_does_to_a_controlnet_pipeline() -> None:
    tiny = shared_pipeline("sd15")
    setting, full = setting_of(tiny), tiny()
    for branch in (0, 1, 2, 7, 11):
        reference = by_package(tiny, 3, branch)
        ours = by_policy(tiny, setting, branch=branch, control="fresh")
        assert relative_error(ours, reference) < 1e-6
        assert relative_error(full, reference) > 1e-5


@needs_package
def test_held_residuals_are_those_of_the_full_steps() -> None:
    tiny = shared_pipeline("sd15")
    setting = setting_of(tiny)
    for branch in (0, 1, 5, 11):
        with controlnet_at(tiny.pipe.controlnet, range(0, NUM_STEPS, 3)):
            reference = by_package(tiny, 3, branch)
        assert relative_error(by_policy(tiny, setting, branch=branch, control="held"), reference) < 1e-6
        assert relative_error(by_policy(tiny, setting, branch=branch, control="fresh"), reference) > 1e-5


class TwoControlNets(TinyPipeline):
    def arguments(self, num_images: int = 1, seed: int = 0) -> dict[str, Any]:
        arguments = super().arguments(num_images, seed)
        image = arguments["image"]
        return {**arguments, "image": [image, 1 - image], "controlnet_conditioning_scale": [0.7, 0.9]}


@needs_package
@pytest.mark.filterwarnings("ignore:controlnet_conditioning_scale is")
def test_two_controlnets_and_another_sampler() -> None:
    pipe = build_pipeline("sd15", num_controlnets=2, scheduler=UniPCMultistepScheduler()).pipe
    tiny = TwoControlNets("sd15", pipe)
    setting = setting_of(tiny)
    for branch in (0, 11):
        reference = by_package(tiny, 3, branch)
        assert relative_error(by_policy(tiny, setting, branch=branch, control="fresh"), reference) < 1e-6


@pytest.fixture(scope="module")
def sd15() -> Setting:
    return unmeasured_setting("sd15-controlnet")


def test_branch_names(sd15: Setting) -> None:
    branches = decoder_inputs(sd15.graph)[::-1]
    assert len(branches) == 12
    assert branches[0] == ["unet.up_blocks.3.attentions.1:out"]
    assert branches[2] == ["unet.up_blocks.2.upsamplers.0:out"]
    assert branches[3] == ["unet.up_blocks.2.attentions.1:out"]
    assert branches[10] == ["unet.up_blocks.0.resnets.0:out"]
    assert branches[11] == ["unet.mid_block.resnets.1:out", "controlnet.controlnet_mid_block:control"]
    branches = decoder_inputs(build_architecture("sdxl").measure()[0])[::-1]
    assert len(branches) == 9
    assert branches[0] == ["unet.up_blocks.2.resnets.1:out"]
    assert branches[8] == ["unet.mid_block.resnets.1:out"]


def test_macs_of_interval_3_branch_0(sd15: Setting) -> None:
    """6.91T with the ControlNet at full steps only; 9.94T where all of it runs at every step, as the authors' code does
    it, though most of that is read by nothing: what is read of it leaves 7.11T."""
    held = DEEPCACHE.write(sd15, interval=3, branch=0, control="held")
    assert held.sites == {
        "unet.up_blocks.3.attentions.1:out": "C--" * 6 + "C-",
        "controlnet.controlnet_down_blocks.0:control": "C--" * 6 + "C-",
    }
    assert macs(sd15, held) == pytest.approx(6.91e12, rel=1e-3)
    fresh = DEEPCACHE.write(sd15, interval=3, branch=0, control="fresh")
    assert list(fresh.sites) == ["unet.up_blocks.3.attentions.1:out"]
    assert macs(sd15, fresh) == pytest.approx(7.11e12, rel=1e-3)
    controlnet = 2 * sum(c.macs for name, c in sd15.costs.items() if sd15.graph.nodes[name].model == "controlnet")
    assert macs(sd15, fresh, model="unet") + 20 * controlnet == pytest.approx(9.94e12, rel=1e-3)


def macs(setting: Setting, draft: Any, model: str = "") -> int:
    """Of one picture, with guidance, attention matmuls not counted; of one model if it is named."""
    nodes = setting.graph.nodes
    run = [name for step in setting.plan(draft).steps for name in step.run]
    return 2 * sum(setting.costs[name].macs for name in run if model in ("", nodes[name].model))


@needs_package
def test_quadratic_spacing_is_the_authors() -> None:
    theirs = authors_function("sample_from_quad_center")
    for num_steps in (20, 25, 50):
        for interval in (2, 3, 5, 10):
            num_full = -(-num_steps // interval)
            for center in (num_steps // 4, num_steps // 2, num_steps - 1):
                for power in (1.1, 1.4, 2.0, 3.0):
                    try:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")  # it casts complex numbers to integers
                            steps, _ = theirs(num_steps, num_full, center=center, pow=power)
                    except ValueError:
                        with pytest.raises(ValueError, match="no power"):
                            quadratic_steps(num_steps, num_full, center=center, power=power)
                        continue
                    assert quadratic_steps(num_steps, num_full, center=center, power=power) == list(steps)


def authors_function(name: str) -> Callable[..., Any]:
    """A function of the package's pipelines, which as a whole are for an older diffusers."""
    spec = importlib.util.find_spec("DeepCache")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "sd" / "pipeline_stable_diffusion.py").read_text(encoding="utf-8")
    function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name)
    namespace: dict[str, Any] = {"np": np}
    exec(compile(ast.Module([function], []), name, "exec"), namespace)
    return namespace[name]


def test_quadratic_spacing_in_a_schedule(sd15: Setting) -> None:
    row = DEEPCACHE.write(sd15, interval=3, spacing="quadratic", center=6, power=1.4).sites
    assert row["unet.up_blocks.3.attentions.1:out"] == "C--C-C-C--C--C--C---"
    assert row == DEEPCACHE.write(sd15, interval=3, spacing="quadratic").sites
    assert set(DEEPCACHE.write(sd15, interval=1, spacing="quadratic").sites.values()) == {"C" * 20}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"interval": 0}, "interval is 0"),
        ({"branch": 12}, "branches 0 to 11"),
        ({"branch": -1}, "branches 0 to 11"),
        ({"spacing": "quadratic", "center": 20}, "center is 20"),
        ({"spacing": "quadratic", "power": 1.0}, "power is 1"),
    ],
)
def test_refuses(sd15: Setting, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DEEPCACHE.write(sd15, **knobs)
