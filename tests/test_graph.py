"""The graph computes what the models' own forward computes, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from tiny_models import SHAPES, UNET_CONFIGS, build_models, conditioning

from hgc_learn.models import ops
from hgc_learn.models.graph import build_graph, meta_copy, run_graph
from hgc_learn.sites import KINDS, list_sites, select_sites, to_lay_open

VARIANTS: dict[str, dict[str, Any]] = {
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "only_cross_attention": {"only_cross_attention": True},
    "class_projection": {"class_embed_type": "timestep"},
    "centered": {"center_input_sample": True},
    "one_layer": {"layers_per_block": 1},
}


def assert_parity(
    unet: Any, controlnet: Any, shape: str, size: tuple[int, int], batch_size: int, **kwargs: Any
) -> None:
    kwargs = conditioning(shape, batch_size) | kwargs
    context = kwargs.pop("encoder_hidden_states")
    generator = torch.Generator().manual_seed(7)
    sample = torch.randn(batch_size, 4, *size, generator=generator)
    image = torch.rand(batch_size, 3, 2 * size[0], 2 * size[1], generator=generator)
    timestep = torch.tensor(500)
    control = {"conditioning_scale": 0.8}
    with torch.no_grad():
        down, mid = controlnet(sample, timestep, context, controlnet_cond=image, **control, **kwargs, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        expected = unet(sample, timestep, context, **residuals, **kwargs).sample
        for expand in (None, (), ("unet.mid_block.attentions.0", "controlnet.down_blocks.1.resnets.0")):
            graph = build_graph(unet, controlnet, expand)
            calls = {
                "unet": ops.unet_call(unet, sample, timestep, context, **dict(kwargs)),
                "controlnet": ops.controlnet_call(
                    controlnet, sample, timestep, context, image, **control, **dict(kwargs)
                ),
            }
            assert torch.equal(run_graph(graph, calls, lambda node, value: value), expected), expand


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "batch_size"), [((8, 8), 2), ((10, 13), 1), ((9, 16), 2)])
def test_graph_equals_forward(shape: str, size: tuple[int, int], batch_size: int) -> None:
    assert_parity(*build_models(UNET_CONFIGS[shape]), shape, size, batch_size)


@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_equals_forward_of_variants(variant: str) -> None:
    unet, controlnet = build_models(UNET_CONFIGS["sd15"] | VARIANTS[variant])
    kwargs = {"class_labels": torch.tensor([3.0, 5.0])} if unet.config.class_embed_type else {}
    assert_parity(unet, controlnet, "sd15", (8, 8), 2, **kwargs)


def test_graph_equals_forward_with_freeu_and_chunked_feed_forward() -> None:
    unet, controlnet = build_models(UNET_CONFIGS["sd15"])
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    for module in unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(1, 0)
    assert_parity(unet, controlnet, "sd15", (8, 8), 2)


def test_graph_equals_forward_with_masks() -> None:
    unet = build_models(UNET_CONFIGS["sd15"])[0]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    graph = build_graph(unet)
    sample, timestep = torch.randn(2, 4, 8, 8), torch.tensor(3)
    context = conditioning("sd15", 2)["encoder_hidden_states"]
    with torch.no_grad():
        expected = unet(sample, timestep, context, encoder_attention_mask=mask).sample
        call = ops.unet_call(unet, sample, timestep, context, encoder_attention_mask=mask)
        assert torch.equal(run_graph(graph, {"unet": call}, lambda node, value: value), expected)
        unmasked = ops.unet_call(unet, sample, timestep, context)
        assert not torch.equal(run_graph(graph, {"unet": unmasked}, lambda node, value: value), expected)


@pytest.mark.parametrize("guess_mode", [False, True])
def test_several_controlnets(guess_mode: bool) -> None:
    unet, first = build_models(UNET_CONFIGS["sd15"])
    second = build_models(UNET_CONFIGS["sd15"], seed=1)[1]
    multi = MultiControlNetModel([first, second])
    sample, timestep = torch.randn(1, 4, 8, 8), torch.tensor(40)
    context = conditioning("sd15", 1)["encoder_hidden_states"]
    images, scales = [torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)], [0.5, 2.0]
    with torch.no_grad():
        down, mid = multi(sample, timestep, context, images, scales, guess_mode=guess_mode, return_dict=False)
        expected = unet(
            sample, timestep, context, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        calls = {"unet": ops.unet_call(unet, sample, timestep, context)}
        for i, net in enumerate(multi.nets):
            calls[f"controlnet.nets.{i}"] = ops.controlnet_call(
                net, sample, timestep, context, images[i], conditioning_scale=scales[i], guess_mode=guess_mode
            )
        assert torch.equal(run_graph(build_graph(unet, multi), calls, lambda node, value: value), expected)


def test_every_kind_of_site_exists_and_is_found_by_pattern() -> None:
    graph = build_graph(*build_models(UNET_CONFIGS["sd15"]))
    sites = list_sites(graph)
    assert {site.rpartition(":")[2] for site in sites} == set(KINDS)
    assert len(select_sites(graph, ["controlnet.*:control"])) == 13
    assert len(select_sites(graph, ["unet.*.attn2:out"])) == 16
    assert select_sites(graph, ["*"]) == sites
    with pytest.raises(ValueError, match=r"No site matches 'unet\.nothing'"):
        select_sites(graph, ["unet.nothing"])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_site_inside_a_module_appears_when_that_module_is_expanded(shape: str) -> None:
    models = [meta_copy(model) for model in build_models(UNET_CONFIGS[shape])]
    for site in list_sites(build_graph(*models)):
        assert site in build_graph(*models, to_lay_open([site])).nodes


def test_unknown_block_types_are_refused_by_name() -> None:
    config = UNET_CONFIGS["sd15"] | {
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) + ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",)
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    with pytest.raises(ValueError, match=r"unet\.down_blocks\.0 is a SimpleCrossAttnDownBlock2D"):
        build_graph(unet)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET_CONFIGS["sd15"] | {"dual_cross_attention": True})
    with pytest.raises(ValueError, match=r"unet\.down_blocks\.0 holds a DualTransformer2DModel"):
        build_graph(unet)


def test_other_models_are_refused_by_name() -> None:
    unet, controlnet = build_models(UNET_CONFIGS["sd15"])
    with pytest.raises(ValueError, match="unet is a Linear"):
        build_graph(torch.nn.Linear(1, 1))

    class OtherControlNet(ControlNetModel):
        pass

    other = OtherControlNet.from_config(controlnet.config)
    with pytest.raises(ValueError, match="controlnet is a OtherControlNet"):
        build_graph(unet, other)
    shallow = build_models(UNET_CONFIGS["sd15"] | {"layers_per_block": 1})[1]
    with pytest.raises(ValueError, match="9 residuals, the UNet takes 13"):
        build_graph(unet, shallow)
