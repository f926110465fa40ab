"""LoRA and IP-Adapter on a pipeline, for the table in `robustness.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor
from diffusers.models.embeddings import ImageProjection
from peft import IA3Config, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from robustness_pipelines import build
from torch import Tensor


def lora(model: Any, *targets: str, seed: int = 0) -> None:
    """Lays a random LoRA over the named layers of a model."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    inject_adapter_in_model(config, model, adapter_name="default")


@cache
def lora_file() -> dict[str, Tensor]:
    """What is in one."""
    donor = build().unet
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "conv1", "proj_in", "conv_shortcut"]
    donor.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(donor).items()}


def load_lora(pipe: Any) -> None:
    """As users do it, from a file's tensors."""
    pipe.load_lora_weights(dict(lora_file()), adapter_name="style")


def add_ia3(pipe: Any) -> None:
    torch.manual_seed(7)
    pipe.unet.add_adapter(IA3Config(target_modules=["to_k", "to_v"], feedforward_modules=[], init_ia3_weights=False))
    pipe.unet.double()


def with_lora() -> Any:
    pipe = build()
    load_lora(pipe)
    return pipe


class TextEncoder(torch.nn.Module):
    """One that is not used, for prompts come as embeddings, but whose LoRA layers the pipeline wants to scale."""

    dtype = torch.float64
    device = torch.device("cpu")


def with_lora_and_text_encoder() -> Any:
    pipe = with_lora()
    pipe.text_encoder = TextEncoder()
    return pipe


def with_lora_plain() -> Any:
    pipe = build("StableDiffusionPipeline")
    load_lora(pipe)
    return pipe


def mid_lora(pipe: Any, tensors: Any = None) -> None:
    pipe.set_adapters(["style"], [0.1])


def change_lora_scale(pipe: Any, tensors: dict[str, Any]) -> None:
    pipe._cross_attention_kwargs = {"scale": 0.1}


def fuse_lora(pipe: Any) -> None:
    pipe.fuse_lora(components=["unet"])


def fuse_scaled(pipe: Any, tensors: Any) -> None:
    pipe.fuse_lora(components=["unet"], lora_scale=0.3)


def fused() -> Any:
    pipe = with_lora()
    fuse_lora(pipe)
    return pipe


def load_ip_adapter(pipe: Any) -> None:
    """The tensors of an IP-Adapter file, random."""
    torch.manual_seed(6)
    dim = pipe.unet.config.cross_attention_dim
    layers = {}
    cross = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for i, name in enumerate(cross):
        hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for key, tensor in IPAdapterAttnProcessor(hidden, dim, scale=1.0).state_dict().items():
            layers[f"{2 * i + 1}.{key.replace('.0.', '.')}"] = tensor
    projection = ImageProjection(cross_attention_dim=dim, image_embed_dim=dim, num_image_text_embeds=4).state_dict()
    projection = {k.replace("image_embeds", "proj"): v for k, v in projection.items()}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    pipe.unet.double()


def with_ip_adapter() -> Any:
    pipe = build()
    load_ip_adapter(pipe)
    return pipe


def ip_image(pipe: Any, number: int = 1) -> dict[str, Any]:
    embeds = torch.randn(2, number, pipe.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(2))
    return {"ip_adapter_image_embeds": [embeds.double()]}


def ip_with(callback: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda pipe: ip_image(pipe) | callback


def no_ip(pipe: Any, tensors: dict[str, Any]) -> None:
    pipe.set_ip_adapter_scale(0.2)
