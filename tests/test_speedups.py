"""What the runtime saves beyond the schedule: what does not change is computed once, independent steps run at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from oracle import by_definition
from robustness_adapters import ip_image, load_ip_adapter
from robustness_pipelines import SDXL, build, run, schedule_for
from tiny_models import NUM_STEPS, TinyPipeline, build_pipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hgc_learn.inference import apply_exact_savings, apply_schedule, remove_schedule
from hgc_learn.models.graph import build_graph
from hgc_learn.policies import POLICIES
from hgc_learn.sampling import SamplingConfig
from hgc_learn.setting import Setting
from hgc_learn.sites import list_sites
from hgc_learn.speed import watched_cache


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Batch sizes of the calls of a layer that is run by its weights: what other forwards call, too."""
    calls: list[int] = []
    hook = module.register_forward_hook(lambda _, inputs, output: calls.append(len(inputs[0])))
    try:
        yield calls
    finally:
        hook.remove()


def test_exact_savings_are_exact_and_compute_once(tiny: TinyPipeline) -> None:
    """The first convolution of the condition embedding, and the matrix product behind a cross-attention's keys."""
    expected = tiny()
    handle = apply_exact_savings(tiny.pipe)
    assert handle.stats()["macs_reduction"] == 0  # before any run, too
    with counted(tiny.pipe.controlnet.controlnet_cond_embedding.conv_in) as calls:
        assert torch.equal(tiny(), expected)
        assert torch.equal(tiny(num_inference_steps=NUM_STEPS - 2), tiny(num_inference_steps=NUM_STEPS - 2))
    assert calls == [2, 2, 2]  # once per run
    handle.remove()
    with counted(tiny.pipe.controlnet.controlnet_cond_embedding.conv_in) as calls:
        assert torch.equal(tiny(), expected)
    assert len(calls) == NUM_STEPS


def test_keys_and_values_of_the_prompt_are_computed_once(own: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    attentions = [m for m in own.pipe.unet.modules() if getattr(m, "is_cross_attention", False)]
    weights = {id(layer.weight) for attention in attentions for layer in (attention.to_k, attention.to_v)}
    linear, products = nn.functional.linear, []

    def counting(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        if id(weight) in weights:
            products.append(1)
        return linear(x, weight, *args)

    monkeypatch.setattr(nn.functional, "linear", counting)
    expected = own()
    assert len(products) == NUM_STEPS * len(weights)
    products.clear()
    apply_schedule(own.pipe, own.schedule())
    assert torch.equal(own(), expected)
    assert len(products) == len(weights)


def test_nothing_is_kept_over_a_change_of_the_prompt(own: TinyPipeline) -> None:
    def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            inputs["prompt_embeds"] = inputs["prompt_embeds"].flip(1)
        if step == 3:
            inputs["prompt_embeds"].mul_(0.5)  # in place: the same memory
        return inputs

    kwargs = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = own(**kwargs)
    assert not torch.equal(expected, own())
    apply_exact_savings(own.pipe)
    assert torch.equal(own(**kwargs), expected)


def test_memory_is_given_back_after_a_run(own: TinyPipeline) -> None:
    handle = apply_exact_savings(own.pipe)
    own()
    assert handle.runtime.once is not None
    assert not handle.runtime.once.kept


def test_nothing_is_kept_after_removal_even_where_others_wrapped_it(own: TinyPipeline) -> None:
    apply_exact_savings(own.pipe)
    own()
    module = own.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    wrapped = module.forward
    module.forward = lambda x: wrapped(x)
    remove_schedule(own.pipe)
    prompt = torch.randn(1, 4, module.in_features)
    with torch.no_grad():
        before = module(prompt)
        module.weight.mul_(3)
        torch.testing.assert_close(module(prompt), 3 * before)


@pytest.mark.parametrize("num_controlnets", [1, 2])
def test_no_controlnet_runs_while_its_scale_is_zero(num_controlnets: int) -> None:
    tiny = build_pipeline("sd15", num_controlnets=num_controlnets)
    first = getattr(tiny.pipe.controlnet, "nets", [tiny.pipe.controlnet])[0]
    kwargs: dict[str, Any] = {"control_guidance_start": 0.3, "control_guidance_end": 0.7}
    if num_controlnets == 2:
        image = tiny.arguments()["image"]
        kwargs = {"image": [image, image.flip(2)], "control_guidance_end": [0.5, 1.0], "control_guidance_start": [0, 0]}
    expected = tiny(**kwargs)
    apply_exact_savings(tiny.pipe)
    with counted(first.conv_in) as calls:
        assert torch.equal(tiny(**kwargs), expected)
    assert 0 < len(calls) < NUM_STEPS
    remove_schedule(tiny.pipe)
    row = "C-C-C-"
    sites = {name: row for name in tiny.sites() if ":control" in name}
    apply_schedule(tiny.pipe, tiny.schedule(sites))
    everything_fresh = tiny(**kwargs)
    apply_schedule(tiny.pipe, tiny.schedule(sites), exact_savings=False)
    assert torch.equal(everything_fresh, tiny(**kwargs))


class Decoders:
    """Faster-Diffusion on a tiny pipeline, its key steps 0 and 5 of 6."""

    def __init__(self, tiny: TinyPipeline, **kwargs: Any):
        self.tiny, self.kwargs = tiny, kwargs
        arguments = tiny.arguments()
        sampling = SamplingConfig(NUM_STEPS, arguments["guidance_scale"], arguments["height"], arguments["width"])
        self.schedule = POLICIES["faster_diffusion"].schedule(Setting.of_pipeline(tiny.pipe, sampling), keys=(0, 5))

    def run(self, **call: Any) -> tuple[Tensor, list[int]]:
        with (
            apply_schedule(self.tiny.pipe, self.schedule, **self.kwargs),
            counted(self.tiny.pipe.unet.up_blocks[-1].resnets[-1].conv1) as calls,
        ):
            return self.tiny(**call), calls


def test_independent_steps_run_as_one_batch(tiny: TinyPipeline) -> None:
    latents, calls = Decoders(tiny).run()
    one_by_one, single_calls = Decoders(tiny, max_steps_at_once=1).run()
    assert calls == [2, 8, 2]
    assert single_calls == [2] * NUM_STEPS
    assert (latents - one_by_one).norm() < 1e-5 * one_by_one.norm()
    _, calls = Decoders(tiny, max_steps_at_once=3).run()
    assert calls == [2, 6, 2, 2]


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"guess_mode": True},
        {"control_guidance_end": 0.9},
    ],
)
@pytest.mark.filterwarnings("ignore:guidance_scale is", "ignore:controlnet_conditioning_scale is")
def test_batches_of_steps_give_what_single_ones_give(own: TinyPipeline, call: dict[str, Any]) -> None:
    own.pipe.to(torch.float64)
    latents, _ = Decoders(own).run(**call)
    one_by_one, _ = Decoders(own, max_steps_at_once=1).run(**call)
    assert (latents - one_by_one).norm() < 1e-9 * one_by_one.norm()


@pytest.mark.parametrize("kind", ["StableDiffusionXLPipeline", "StableDiffusionXLControlNetPipeline"])
def test_no_step_is_run_ahead_that_is_not_part_of_the_run(kind: str) -> None:
    pipe = build(kind, **SDXL)
    behind = ("unet.up_blocks", "unet:")
    graph = build_graph(pipe.unet, getattr(pipe, "controlnet", None))
    encoder = [site for site in list_sites(graph) if not site.startswith(behind)]
    schedule = schedule_for(pipe, dict.fromkeys(encoder, "CC" + "-" * (NUM_STEPS - 2)))
    with apply_schedule(pipe, schedule) as handle, counted(pipe.unet.up_blocks[-1].resnets[-1].conv1) as calls:
        run(pipe)
        assert calls == [2, 2, 8]
        calls.clear()
        run(pipe, denoising_end=0.6)
        assert not handle.runtime.cache.values
    assert calls == [2, 2, 2]


def test_batches_load_residuals_that_are_filled_in_each_in_its_own_way(own: TinyPipeline) -> None:
    """What the ControlNet's forward has loaded for the last time is gone when the batch begins."""
    own.pipe.to(torch.float64)
    reused = "CC" + "-" * (NUM_STEPS - 2)
    rows = {site: reused for site in own.sites() if not site.startswith(("unet.up_blocks", "unet:"))}
    controls = [site for site in rows if site.endswith(":control")]
    rows[controls[0]] = reused.replace("CC-", "CC1")
    latents = {}
    for num_steps in (1, 4):
        with apply_schedule(own.pipe, own.schedule(rows), max_steps_at_once=num_steps) as handle:
            assert bool(handle.runtime.batches) == (num_steps > 1)
            latents[num_steps] = own()
    assert (latents[4] - latents[1]).norm() < 1e-9 * latents[1].norm()


def test_batches_give_the_unet_residuals_as_its_hooks_do(own: TinyPipeline) -> None:
    """A ControlNet of another precision, whose residuals a hook casts."""
    own.pipe.controlnet.double()

    def cast(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        names = "down_block_additional_residuals", "mid_block_additional_residual"
        return args, kwargs | {name: tree_map(lambda tensor: tensor.float(), kwargs[name]) for name in names}

    known: dict[int, tuple[Any, Any]] = {}  # what stays the same in a run is the same for the ControlNet

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return known.setdefault(id(value), (value, value.double()))[1]

    def widen(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return tree_map(wide, (args, kwargs))

    own.pipe.unet.register_forward_pre_hook(cast, with_kwargs=True)
    own.pipe.controlnet.register_forward_pre_hook(widen, with_kwargs=True)
    reused = "CC" + "-" * (NUM_STEPS - 2)
    rows = {site: reused for site in own.sites() if not site.startswith(("unet.up_blocks", "unet:"))}
    latents = {}
    for num_steps in (1, 4):
        with (
            apply_schedule(own.pipe, own.schedule(rows), max_steps_at_once=num_steps) as handle,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            latents[num_steps] = own()
            assert bool(handle.runtime.batches) == (num_steps > 1)
    assert (latents[4] - latents[1]).norm() < 1e-5 * latents[1].norm()


def weigh_output(module: Any, args: Any, output: Any) -> Any:
    down, mid = output
    return [residual * 0.5 for residual in down], mid * 0.5


class WeighInPlace:
    """From the third step on, where residuals are lines through two kept ones: new tensors, which nobody keeps."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self.num_calls += 1
        if self.num_calls % NUM_STEPS not in (1, 2):
            output[0][-1].mul_(0.5)


def weigh_input(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    names = "down_block_additional_residuals", "mid_block_additional_residual"
    return args, kwargs | {name: tree_map(lambda residual: residual * 0.5, kwargs[name]) for name in names}


class Weighing(MultiControlNetModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return weigh_output(self, args, super().forward(*args, **kwargs))


@pytest.mark.parametrize(
    ("num_controlnets", "way"),
    [
        *((number, way) for number in (1, 2) for way in ("controlnet", "in place", "unet")),
        *((2, way) for way in ("first net", "class")),
    ],
)
def test_batches_keep_what_is_done_to_residuals_on_their_way(num_controlnets: int, way: str) -> None:
    tiny = build_pipeline("sd15", num_controlnets=num_controlnets)
    pipe, image = tiny.pipe, tiny.arguments()["image"]
    pipe.to(torch.float64)
    if way == "class":
        pipe.controlnet = Weighing([*pipe.controlnet.nets])
    reused = "CC" + ("1" if way == "in place" else "-") * (NUM_STEPS - 2)
    rows = {site: reused for site in tiny.sites() if not site.startswith(("unet.up_blocks", "unet:"))}
    call = {"image": [image, image.flip(2)]} if num_controlnets == 2 else {}
    plain = tiny(**call)
    if way == "unet":
        pipe.unet.register_forward_pre_hook(weigh_input, with_kwargs=True)
    elif way == "first net":
        pipe.controlnet.nets[0].register_forward_hook(weigh_output)
    elif way in ("controlnet", "in place"):
        pipe.controlnet.register_forward_hook(WeighInPlace() if way == "in place" else weigh_output)
    latents = {}
    for num_steps in (1, 4):
        with apply_schedule(pipe, tiny.schedule(rows), max_steps_at_once=num_steps) as handle:
            assert bool(handle.runtime.batches) == (num_steps > 1)
            latents[num_steps] = tiny(**call)
            assert not handle.runtime.handed_on  # nothing is held after a run
    assert (latents[1] - plain).norm() > 1e-4 * plain.norm()
    assert (latents[4] - latents[1]).norm() < 1e-9 * latents[1].norm()


def test_batches_leave_what_is_kept_of_the_prompt(own: TinyPipeline) -> None:
    layer = own.pipe.unet.up_blocks[-1].attentions[0].transformer_blocks[0].attn2.to_k
    seen = []
    with apply_schedule(own.pipe, Decoders(own).schedule, max_steps_at_once=2) as handle:

        def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            assert handle.runtime.once is not None
            seen.append([len(prompt) for prompt, _, _ in handle.runtime.once.kept.get(layer, {}).values()])
            return inputs

        own(callback_on_step_end=callback)
    assert seen[:-1] == [[2]] * (NUM_STEPS - 1)  # the prompt of one step, and none of the batches' own
    assert seen[-1] == []  # the run has ended


def test_masks_of_an_ip_adapter_are_those_of_one_step(own: TinyPipeline) -> None:
    """Given as attention arguments, and there may be one for each sample: these steps do not run as one batch."""
    decoders = Decoders(own, allow_other_weights=True)
    own.pipe.to(torch.float64)
    load_ip_adapter(own.pipe)
    masks = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    call = ip_image(own.pipe) | {"cross_attention_kwargs": {"ip_adapter_masks": [masks]}}
    with by_definition(own.pipe, decoders.schedule.sites):
        expected = own(**call)
    latents, calls = decoders.run(**call)
    assert calls == [2] * NUM_STEPS
    assert (latents - expected).norm() < 1e-9 * expected.norm()


def test_a_change_in_mid_batch_is_noticed(own: TinyPipeline) -> None:
    own.pipe.to(torch.float64)

    def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": inputs["prompt_embeds"].flip(1)} if step == 2 else inputs

    call = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    latents, calls = Decoders(own).run(**call)
    one_by_one, _ = Decoders(own, max_steps_at_once=1).run(**call)
    assert len(calls) > 3
    assert (latents - one_by_one).norm() < 1e-9 * one_by_one.norm()


def test_several_controlnets_and_a_sampler_with_scaled_latents() -> None:
    tiny = build_pipeline("sd15", num_controlnets=2, scheduler=EulerDiscreteScheduler())
    tiny.pipe.to(torch.float64)
    image = tiny.arguments()["image"]
    latents, calls = Decoders(tiny).run(image=[image, image.flip(2)])
    one_by_one, _ = Decoders(tiny, max_steps_at_once=1).run(image=[image, image.flip(2)])
    assert max(calls) == 8
    assert (latents - one_by_one).norm() < 1e-9 * one_by_one.norm()


def test_predicted_cache_bytes_are_the_measured_ones(own: TinyPipeline) -> None:
    for name in ("deepcache", "faster_diffusion", "tgate", "tgate_deepcache", "hgc"):
        arguments = own.arguments()
        sampling = SamplingConfig(NUM_STEPS, arguments["guidance_scale"], arguments["height"], arguments["width"])
        policy = POLICIES[name]
        knobs = {"gate": 4} if "gate" in policy.knobs else {}
        schedule = policy.schedule(Setting.of_pipeline(own.pipe, sampling), **knobs)
        handle = apply_schedule(own.pipe, schedule)
        with watched_cache(handle) as seen:
            own()
        assert max(seen) == pytest.approx(handle.stats()["cache_bytes"], rel=0.05), name
        handle.remove()
