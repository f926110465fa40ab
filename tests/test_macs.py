"""The plan tells the truth: operations counted while a scheduled pipeline runs equal its prediction."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import (
    GUIDANCE_SCALE,
    IMAGE_SIZE,
    NUM_STEPS,
    NUM_TOKENS,
    SHAPES,
    UNET_CONFIGS,
    VAE_SCALE_FACTOR,
    build_models,
    build_pipeline,
    random_rows,
    shared_pipeline,
)

from hgc_learn.inference import apply_schedule, remove_schedule
from hgc_learn.models.architectures import ARCHITECTURES, Architecture, build_architecture
from hgc_learn.models.macs import NodeCost, flop_counter, measure_costs
from hgc_learn.plan import compile_plan
from hgc_learn.speed import watched_cache

LATENT_SIZE = IMAGE_SIZE // VAE_SCALE_FACTOR


def costs_of(pipe: Any) -> tuple[Any, dict[str, NodeCost]]:
    return measure_costs(
        pipe.unet,
        pipe.controlnet,
        latent_size=(LATENT_SIZE, LATENT_SIZE),
        image_size=(IMAGE_SIZE, IMAGE_SIZE),
        num_tokens=NUM_TOKENS,
    )


@cache
def shared_costs(shape: str) -> tuple[Any, dict[str, NodeCost]]:
    return costs_of(shared_pipeline(shape).pipe)


def counted(run: Callable[[], Any]) -> tuple[int, int]:
    """(MACs without attention matmuls, with them) of everything that `run` does on the CPU."""
    fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with flop_counter() as counter:
        run()
    macs = counter.get_total_flops() // 2
    attention_macs = counter.get_flop_counts().get("Global", {}).get(fused_attention, 0) // 2
    assert attention_macs > 0 or macs == 0
    return macs - attention_macs, macs


def assert_plan_is_true(tiny: Any, rows: dict[str, str], costs: Any, guidance_scale: float, **kwargs: Any) -> None:
    """With prompt embeddings given and latents returned only the UNet and the ControlNets multiply matrices."""
    graph, cost = costs
    schedule = tiny.schedule(rows, guidance_scale=guidance_scale)
    plan = compile_plan(graph, rows, NUM_STEPS)
    try:
        # Without what `test_speedups` is about: less to compute, and steps before their turn.
        handle = apply_schedule(tiny.pipe, schedule, exact_savings=False, max_steps_at_once=1)
        with watched_cache(handle) as kept:
            macs = counted(lambda: tiny(guidance_scale=guidance_scale, **kwargs))
    finally:
        remove_schedule(tiny.pipe)
    num_halves = 2 if guidance_scale > 1 else 1
    assert macs == tuple(plan.macs(cost, num_halves=num_halves, attention=attention) for attention in (False, True))
    assert max(kept) == plan.cache_bytes(cost, num_halves=num_halves)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", ["small", "small_sdxl"])
@pytest.mark.parametrize("guidance_scale", [1.0, GUIDANCE_SCALE])
def test_counted_operations_equal_the_plans(shape: str, guidance_scale: float, seed: int) -> None:
    tiny = shared_pipeline(shape)
    rows = random_rows(tiny.sites(), random.Random(seed))
    if guidance_scale == 1:
        rows.pop("unet:guidance", None)
    assert_plan_is_true(tiny, rows, shared_costs(shape), guidance_scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_counted_operations_of_whole_shapes_equal_the_plans(shape: str) -> None:
    tiny = shared_pipeline(shape)
    rows = random_rows(tiny.sites(), random.Random(0), num_sites=12)
    assert_plan_is_true(tiny, rows, shared_costs(shape), GUIDANCE_SCALE)


def test_counted_operations_of_the_unscheduled_pipeline_equal_the_full_plans() -> None:
    graph, costs = shared_costs("small")
    plan = compile_plan(graph, {}, NUM_STEPS)
    assert counted(shared_pipeline("small")) == (plan.macs(costs), plan.macs(costs, attention=True))


def test_counted_operations_with_two_controlnets() -> None:
    tiny = build_pipeline("small", num_controlnets=2)
    image = tiny.arguments()["image"]
    rows = {"controlnet.nets.1.controlnet_mid_block:control": "C--C--", "unet.up_blocks.1.attentions.0:out": "C-C-C-"}
    assert_plan_is_true(tiny, rows, costs_of(tiny.pipe), GUIDANCE_SCALE, image=[image, image])


def test_counting_does_not_depend_on_weights_or_device() -> None:
    """A node's cost is per sample: an odd size has its own, twice the batch is twice the cost."""
    pipe = shared_pipeline("sd15").pipe
    kwargs = {"image_size": (20, 26), "num_tokens": NUM_TOKENS}
    graph, costs = measure_costs(pipe.unet, pipe.controlnet, latent_size=(10, 13), **kwargs)
    assert set(costs) == set(graph.nodes)
    plan = compile_plan(graph, {}, 1)
    assert plan.macs(costs, num_halves=4) == 4 * plan.macs(costs, num_halves=1)
    assert costs["unet:eps"].numel == 4 * 10 * 13


def test_measured_once_per_architecture_and_size() -> None:
    graph, costs = shared_costs("sd15")
    again = costs_of(build_pipeline("sd15", seed=1).pipe)
    assert again[0] is graph
    assert again[1] is costs
    assert costs_of(build_pipeline("sd15", num_controlnets=2).pipe)[1] != costs
    assert shared_costs("sd2")[1] != costs
    pipe = shared_pipeline("sd15").pipe
    size = {"latent_size": (2 * LATENT_SIZE, LATENT_SIZE), "image_size": (2 * IMAGE_SIZE, IMAGE_SIZE)}
    larger = measure_costs(pipe.unet, pipe.controlnet, **size, num_tokens=NUM_TOKENS)[1]
    assert larger["unet:eps"].numel == 2 * costs["unet:eps"].numel


def test_parameters_of_known_architectures() -> None:
    """Those of the public checkpoints, in millions."""
    expected = {"sd15": (860, 361), "sd21": (866, 364), "sdxl": (2567, 1251)}
    for name, (unet, controlnet) in expected.items():
        assert name in ARCHITECTURES
        architecture = build_architecture(f"{name}-controlnet")
        assert round(architecture.unet.num_parameters() / 1e6) == unet
        assert not isinstance(architecture.controlnet, list)
        assert architecture.controlnet is not None
        assert round(architecture.controlnet.num_parameters() / 1e6) == controlnet
    assert build_architecture("sd15").controlnet is None
    with pytest.raises(ValueError, match="Unknown architecture 'sd3'; known: sd15,"):
        build_architecture("sd3")


def test_fused_attention_on_the_cpu_is_counted_there_and_back() -> None:
    """QK^T and AV are two products; backward has four, and QK^T once more."""
    query, key, value = (torch.rand(1, 2, n, 8, requires_grad=True) for n in (16, 24, 24))
    product = 2 * 2 * 16 * 24 * 8
    with flop_counter() as counter:
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert counter.get_total_flops() == 2 * product
    with flop_counter() as counter:
        attended.sum().backward()
    assert counter.get_total_flops() == 5 * product


@pytest.mark.parametrize(
    "config",
    [
        {"num_class_embeds": 3},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
    ],
    ids=str,
)
def test_models_that_take_classes_are_counted(config: dict[str, Any]) -> None:
    unet, *_ = build_models(UNET_CONFIGS["small"] | config)
    _, costs = measure_costs(unet, None, latent_size=(8, 8), image_size=(64, 64), num_tokens=7)
    assert costs["unet.time_embedding"].macs > 0


def test_a_model_that_names_no_size_needs_one() -> None:
    unet, *_ = build_models(UNET_CONFIGS["small"] | {"sample_size": None})
    with pytest.raises(ValueError, match="no sample_size"):
        Architecture(unet, None).measure()
    assert Architecture(unet, None).measure((64, 64))
