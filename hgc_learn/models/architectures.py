"""Well-known architectures by name, built on the meta device: enough to count, plan and benchmark without weights.

Configurations are those of the public checkpoints' config.json files. `load_architecture` reads those of a pipeline
folder instead.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from hgc_learn.models.fingerprint import ModelFingerprint
from hgc_learn.models.graph import Graph
from hgc_learn.models.macs import NodeCost, measure_costs
from hgc_learn.schedule import HGCSchedule

_SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD21: dict[str, Any] = _SD15 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

_CONFIGS = {"sd15": _SD15, "sd21": _SD21, "sdxl": _SDXL}
ARCHITECTURES = [f"{name}{suffix}" for name in _CONFIGS for suffix in ("", "-controlnet")]


@dataclass(frozen=True)
class Architecture:
    """What has to be known of a pipeline to count with it.

    Attributes:
        unet: the UNet, on any device; its weights are not read.
        controlnet: none, one ControlNet, or several as a list.
        vae_scale_factor: image pixels per latent pixel.
        num_tokens: length of the prompt embeddings.
    """

    unet: UNet2DConditionModel
    controlnet: ControlNetModel | list[ControlNetModel] | None
    vae_scale_factor: int = 8
    num_tokens: int = 77

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the UNet was made for.

        Raises:
            ValueError: its config does not say, or nonsense.
        """
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("The UNet's config has no sample_size, the size that costs are counted at. Set it.")
        sizes = [size, size] if isinstance(size, int) else size
        if not isinstance(sizes, list | tuple) or len(sizes) != 2 or not all(map(_is_count, sizes)):
            raise ValueError(f"The UNet's config says sample_size {size!r}; it must be a positive integer or two.")
        height, width = sizes
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @classmethod
    def of(cls, pipe: Any) -> Architecture:
        """That of a diffusers pipeline."""
        tokenizer = getattr(pipe, "tokenizer", None)
        num_tokens = 77 if tokenizer is None else _num_tokens(tokenizer.model_max_length)
        return cls(pipe.unet, getattr(pipe, "controlnet", None), pipe.vae_scale_factor, num_tokens)

    def measure(self, size: tuple[int, int] | None = None) -> tuple[Graph, dict[str, NodeCost]]:
        """The expanded graph and its costs at an image size (height, width) in pixels; see `measure_costs`.

        Raises:
            ValueError: a size that has no whole number of latent pixels, or models that do not run on what pipelines
                give them.
        """
        height, width = size or self.default_size
        scale = self.vae_scale_factor
        if height % scale or width % scale:
            raise ValueError(f"The size is {height}x{width}; this model takes multiples of {scale}.")
        try:
            return measure_costs(
                self.unet,
                self.controlnet,
                latent_size=(height // scale, width // scale),
                image_size=(height, width),
                num_tokens=self.num_tokens,
            )
        except (RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"These models do not run on an image of {height}x{width} ({reason}).") from error

    def check(self, schedule: HGCSchedule) -> None:
        """Raises ValueError if the schedule was made for another one. Weights are not compared."""
        difference = schedule.model.difference(ModelFingerprint.of(self.unet, self.controlnet))
        if difference is not None:
            raise ValueError(
                f"model: the schedule was made for another model ({difference[0]}: {difference[1]}). Name that one."
            )


def build_architecture(name: str) -> Architecture:
    """Builds one of `ARCHITECTURES` on the meta device.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"Unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}.")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**_CONFIGS[name.removesuffix("-controlnet")])
        controlnet = None
        if name.endswith("-controlnet"):
            controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    return Architecture(unet, controlnet)


def load_architecture(folder: str | os.PathLike[str], controlnet: str | os.PathLike[str] | None = None) -> Architecture:
    """Builds the models of a diffusers pipeline folder on the meta device; reads its configs, never its weights.

    Args:
        folder: of the pipeline.
        controlnet: folder of a ControlNet, where the pipeline has none.

    Raises:
        ValueError: a folder without a UNet's or the ControlNet's config, a config that cannot be used (the message
            names the file), or a ControlNet besides the pipeline's own.
    """
    folder = Path(folder)
    if not (folder / "unet" / "config.json").is_file():
        raise ValueError(f"{folder}: not the folder of a diffusers pipeline (it has no unet/config.json).")
    # A MultiControlNetModel is saved as controlnet, controlnet_1, controlnet_2, ...
    paths = [folder / "controlnet" / "config.json"]
    while paths[-1].is_file():
        paths.append(folder / f"controlnet_{len(paths)}" / "config.json")
    paths.pop()
    if controlnet is not None:
        if paths:
            raise ValueError(f"{folder}: has a ControlNet already, and {controlnet} is given besides.")
        paths = [Path(controlnet) / "config.json"]
        if not paths[0].is_file():
            raise ValueError(f"{controlnet}: not the folder of a ControlNet (it has no config.json).")
    nets = [_from_config(ControlNetModel, path) for path in paths]
    unet = _from_config(UNet2DConditionModel, folder / "unet" / "config.json")
    for path, net in zip(paths, nets, strict=True):
        check_fits(net, unet, str(path.parent), str(folder))
    vae, tokenizer = folder / "vae" / "config.json", folder / "tokenizer" / "tokenizer_config.json"
    channels = _read_config(vae).get("block_out_channels", [0] * 4)
    if not isinstance(channels, list) or not channels:
        raise ValueError(f"{vae}: block_out_channels is {channels!r}; it must be a list of numbers.")
    max_length = _read_config(tokenizer).get("model_max_length", 77)
    if not _is_count(max_length):
        raise ValueError(f"{tokenizer}: model_max_length is {max_length!r}; it must be a positive integer.")
    return Architecture(
        unet=unet,
        controlnet=nets if len(nets) > 1 else nets[0] if nets else None,
        vae_scale_factor=2 ** (len(channels) - 1),
        num_tokens=_num_tokens(max_length),
    )


def check_fits(controlnet: Any, unet: Any, controlnet_name: str, model_name: str) -> None:
    """Raises ValueError where a ControlNet is for UNets of another kind."""
    for name in ("cross_attention_dim", "block_out_channels"):
        its, theirs = (torch.tensor(model.config[name]).tolist() for model in (controlnet, unet))  # tuples, or lists
        if its != theirs:
            raise ValueError(
                f"controlnet: {controlnet_name!r} is for another kind of model than {model_name!r} (its {name} is "
                f"{its}, the UNet's {theirs})."
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _num_tokens(model_max_length: int) -> int:
    return model_max_length if model_max_length <= 4096 else 77  # tokenizers without a limit say 1e30


def _read_config(path: Path) -> dict[str, Any]:
    """The config, or {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: does not hold a JSON object.")
    return config


def _from_config(model_class: Any, path: Path) -> Any:
    config = _read_config(path)
    name = config.get("_class_name")
    if name != model_class.__name__:
        raise ValueError(f"{path}: is the config of a {name}; schedules support {model_class.__name__} only.")
    try:
        with torch.device("meta"):
            return model_class.from_config(config)
    except Exception as error:  # whatever a broken config makes the model's constructor raise
        raise ValueError(f"{path}: {model_class.__name__} cannot be built from it ({error}).") from error
