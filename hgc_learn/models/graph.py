"""The dataflow of a frozen UNet and its ControlNets: which tensor is made from which.

A `Graph` is a list of nodes in execution order. Every node makes one tensor by calling the models' own
submodules, so a graph can be measured (on meta tensors), analysed (liveness) and run (all of it, or only the
nodes that a plan leaves alive). Nodes that may be kept from an earlier step are *sites*: their name is
`<module path>:<kind>` (see `hgc_learn.sites`). Running every node is bit-identical to the models' own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from hgc_learn.models import ops

SUPPORTED_BLOCKS = (
    blocks.DownBlock2D,
    blocks.CrossAttnDownBlock2D,
    blocks.UNetMidBlock2DCrossAttn,
    blocks.UpBlock2D,
    blocks.CrossAttnUpBlock2D,
)


@dataclass(frozen=True)
class Node:
    """One tensor of the dataflow.

    `run(call, *inputs)` makes it; `call` holds what the model was called with (`ops.Call`). `model` says in
    whose forward it runs: `unet`, `controlnet`, or `controlnet.nets.<i>` for a MultiControlNetModel.
    """

    name: str
    model: str
    inputs: tuple[str, ...]
    run: Callable[..., Tensor]

    @property
    def reads_latents(self) -> bool:
        """Whether it looks at the values of the latents that its model is called with, not just at their shape."""
        return getattr(self.run, "func", None) in (ops.unet_conv_in, ops.controlnet_conv_in)


@dataclass
class Graph:
    """Nodes in execution order; `output` is the UNet's prediction, `guidance` its guided less its unguided half
    (nothing reads it: see `hgc_learn.plan`), `residuals[n]` the n-th ControlNet residual as the UNet receives it
    (empty without a ControlNet), `modules` by path what nodes hold, `opened` by path those of them that are not called
    themselves but in parts, with their types. `takes_guidance_scale`: the UNet guides by itself (LCM)."""

    nodes: dict[str, Node] = field(default_factory=dict)
    output: str = "unet:eps"
    guidance: str = "unet:guidance"
    residuals: tuple[str, ...] = ()
    modules: dict[str, nn.Module] = field(default_factory=dict)
    opened: dict[str, tuple[nn.Module, type]] = field(default_factory=dict)
    takes_guidance_scale: bool = False

    def num_halves(self, guidance_scale: float) -> int:
        """Samples in a model call per picture: an unguided and a guided one, or one where there is no guidance (1 or
        less), or the UNet takes its scale as an input."""
        return 2 if guidance_scale > 1 and not self.takes_guidance_scale else 1

    def consumers(self) -> dict[str, list[str]]:
        """Maps every node to the nodes that read it, in execution order."""
        readers: dict[str, list[str]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for name in dict.fromkeys(node.inputs):
                readers[name].append(node.name)
        return readers


def controlnet_list(controlnet: nn.Module | Sequence[ControlNetModel] | None) -> list[ControlNetModel]:
    """The ControlNets of a pipeline as a list: none, one, or the nets of a MultiControlNetModel."""
    if controlnet is None:
        return []
    nets = getattr(controlnet, "nets", controlnet)
    return [nets] if isinstance(nets, nn.Module) and not isinstance(nets, nn.ModuleList) else list(nets)


def named_models(unet: Any, controlnet: Any = None) -> dict[str, Any]:
    """The models by the names that sites and fingerprints have for them: `unet`, then `controlnet`, or
    `controlnet.nets.<i>` where there are several; `controlnet` is as for `build_graph`. Of compiled ones the
    original."""
    nets = controlnet_list(controlnet)
    names = ["controlnet"] if len(nets) == 1 else [f"controlnet.nets.{i}" for i in range(len(nets))]
    models = {"unet": unet, **dict(zip(names, nets, strict=True))}
    return {name: original(model) for name, model in models.items()}


def original(model: Any) -> Any:
    """Of a compiled model the one that was compiled."""
    return getattr(model, "_orig_mod", model)


def build_graph(
    unet: UNet2DConditionModel,
    controlnet: nn.Module | Sequence[ControlNetModel] | None = None,
    expand: Iterable[str] | None = None,
) -> Graph:
    """Reads the dataflow off the models' structure (SD1.5, SD2 and SDXL shapes).

    Args:
        unet: the frozen UNet.
        controlnet: a ControlNetModel, a MultiControlNetModel, a list of ControlNetModels, or None.
        expand: paths of the resnets and transformers whose inside is laid open (their `branch`, attention and
            feed-forward sites); the others are one node that calls the module. None lays all of them open.

    Raises:
        ValueError: a model or block of a type whose dataflow is not known here, or a ControlNet that is in the list
            twice; the message names it.
    """
    builder = _Builder(None if expand is None else set(expand))
    nets = named_models(unet, controlnet)
    unet = nets.pop("unet")
    controls = []
    for index, (path, net) in enumerate(nets.items()):
        if any(net is other for other in [*nets.values()][:index]):
            raise ValueError(
                f"{path} is one of the ControlNets before it, the same object. Give the pipeline a copy of it "
                "(copy.deepcopy) instead: each has values of its own to keep."
            )
        controls.append(builder.add_controlnet(path, net))
    builder.add_unet(unet, list(zip(*controls, strict=True)))
    return Graph(
        nodes=builder.nodes,
        residuals=tuple(builder.residuals),
        modules=builder.modules,
        opened=builder.opened,
        takes_guidance_scale=unet.config.time_cond_proj_dim is not None,
    )


class _Builder:
    """Walks the models in execution order; every method returns the name of the node it ends with."""

    def __init__(self, expand: set[str] | None):
        self.expand = expand
        self.nodes: dict[str, Node] = {}
        self.residuals: list[str] = []
        self.modules: dict[str, nn.Module] = {}
        self.opened: dict[str, tuple[nn.Module, type]] = {}
        self.model = ""
        self.temb = ""

    def add(self, name: str, run: Callable[..., Tensor], *inputs: str) -> str:
        assert name not in self.nodes, name
        assert all(i in self.nodes for i in inputs), (name, inputs)
        self.nodes[name] = Node(name, self.model, inputs, run)
        return name

    def open(self, path: str, module: nn.Module) -> None:
        self.modules[path] = module
        self.opened[path] = module, type(module)

    def call(self, path: str, module: nn.Module, run: Callable[..., Tensor], *inputs: str) -> str:
        """Adds the output of a module that is called whole."""
        self.modules[path] = module
        return self.add(f"{path}:out", run, *inputs)

    def open_block(self, path: str, block: nn.Module) -> None:
        if type(block) not in SUPPORTED_BLOCKS:
            known = ", ".join(b.__name__ for b in SUPPORTED_BLOCKS)
            raise ValueError(f"{path} is a {type(block).__name__}, whose dataflow is not known. Supported: {known}.")
        for attention in getattr(block, "attentions", []):
            if type(attention) is not Transformer2DModel:
                raise ValueError(f"{path} holds a {type(attention).__name__}; only Transformer2DModel is supported.")
        self.open(path, block)

    def add_controlnet(self, path: str, net: ControlNetModel) -> list[str]:
        """Returns the residuals: one per down-block tensor, then the mid block's."""
        if type(net) is not ControlNetModel:
            raise ValueError(f"{path} is a {type(net).__name__}; schedules support diffusers' ControlNetModel only.")
        self.model = path
        num_residuals = len(net.controlnet_down_blocks) + 1
        self.temb = self.add(f"{path}.time_embedding", partial(ops.controlnet_time_embedding, net))
        cond = self.add(f"{path}.controlnet_cond_embedding", partial(ops.condition_embedding, net))
        x = self.add(f"{path}.conv_in:out", partial(ops.controlnet_conv_in, net), cond)
        x, down = self.add_down(path, net, x)
        x = self.add_mid(f"{path}.mid_block", net.mid_block, x)
        controls = []
        for n, (_, source) in enumerate(zip(net.controlnet_down_blocks, down, strict=True)):
            run = partial(ops.control_residual, net, n, num_residuals)
            controls.append(self.add(f"{path}.controlnet_down_blocks.{n}:control", run, source))
        run = partial(ops.control_residual, net, num_residuals - 1, num_residuals)
        controls.append(self.add(f"{path}.controlnet_mid_block:control", run, x))
        return controls

    def add_unet(self, unet: UNet2DConditionModel, controls: list[tuple[str, ...]]) -> None:
        """`controls[n]` names the n-th residual of every ControlNet."""
        if not isinstance(unet, UNet2DConditionModel) or type(unet).forward is not UNet2DConditionModel.forward:
            raise ValueError(f"unet is a {type(unet).__name__}; schedules support diffusers' UNet2DConditionModel.")
        self.model = "unet"
        self.residuals = [self.add(f"unet.residual.{n}", ops.add_all, *c) for n, c in enumerate(controls)]
        self.temb = self.add("unet.time_embedding", partial(ops.unet_time_embedding, unet))
        x = self.add("unet.conv_in:out", partial(ops.unet_conv_in, unet))
        x, down = self.add_down("unet", unet, x)
        x = self.add_mid("unet.mid_block", unet.mid_block, x)
        if self.residuals:
            if len(self.residuals) != len(down) + 1:
                raise ValueError(
                    f"The ControlNet gives {len(self.residuals)} residuals, the UNet takes {len(down) + 1}: "
                    "they were not made for each other."
                )
            down = [
                self.add(f"unet.skip.{n}", ops.add_all, skip, residual)
                for n, (skip, residual) in enumerate(zip(down, self.residuals, strict=False))
            ]
            x = self.add("unet.mid", ops.add_all, x, self.residuals[-1])
        for i, block in enumerate(unet.up_blocks):
            level = len(unet.up_blocks) - 2 - i
            x = self.add_up(f"unet.up_blocks.{i}", block, x, down, level)
        x = self.add("unet:eps", partial(ops.unet_head, unet), x)
        self.add("unet:guidance", ops.guidance, x)

    def add_down(self, path: str, model: Any, x: str) -> tuple[str, list[str]]:
        """The encoder; returns its last tensor and all that the decoder will read."""
        skips = [x]
        for i, block in enumerate(model.down_blocks):
            block_path = f"{path}.down_blocks.{i}"
            self.open_block(block_path, block)
            for j, resnet in enumerate(block.resnets):
                x = self.add_layer(block_path, block, j, resnet, x)
                skips.append(x)
            if block.downsamplers is not None:
                for j, sampler in enumerate(block.downsamplers):
                    x = self.call(f"{block_path}.downsamplers.{j}", sampler, partial(ops.downsample, sampler), x)
                skips.append(x)
        return x, skips

    def add_mid(self, path: str, block: Any, x: str) -> str:
        if block is None:
            return x
        self.open_block(path, block)
        x = self.add_resnet(f"{path}.resnets.0", block.resnets[0], x)
        for j, (attention, resnet) in enumerate(zip(block.attentions, block.resnets[1:], strict=True)):
            x = self.add_transformer(f"{path}.attentions.{j}", attention, x)
            x = self.add_resnet(f"{path}.resnets.{j + 1}", resnet, x)
        return x

    def add_up(self, path: str, block: Any, x: str, skips: list[str], level: int) -> str:
        """Consumes the block's share of `skips` from the end; `level` is that of the tensor after upsampling."""
        self.open_block(path, block)
        for j, resnet in enumerate(block.resnets):
            x = self.add(f"{path}.resnets.{j}.concat", partial(ops.concat_skip, block), x, skips.pop())
            x = self.add_layer(path, block, j, resnet, x)
        for j, sampler in enumerate(block.upsamplers or []):
            x = self.call(f"{path}.upsamplers.{j}", sampler, partial(ops.upsample, sampler, level), x)
        return x

    def add_layer(self, path: str, block: Any, j: int, resnet: ResnetBlock2D, x: str) -> str:
        x = self.add_resnet(f"{path}.resnets.{j}", resnet, x)
        if getattr(block, "has_cross_attention", False):
            x = self.add_transformer(f"{path}.attentions.{j}", block.attentions[j], x)
        return x

    def is_expanded(self, path: str) -> bool:
        return self.expand is None or path in self.expand

    def add_resnet(self, path: str, resnet: ResnetBlock2D, x: str) -> str:
        if not self.is_expanded(path):
            return self.call(path, resnet, partial(ops.resnet, resnet), x, self.temb)
        self.open(path, resnet)
        branch = self.add(f"{path}:branch", partial(ops.resnet_branch, resnet), x, self.temb)
        return self.add(f"{path}:out", partial(ops.resnet_sum, resnet), x, branch)

    def add_transformer(self, path: str, transformer: Transformer2DModel, x: str) -> str:
        if not _can_expand(transformer) or not self.is_expanded(path):
            return self.call(path, transformer, partial(ops.transformer, transformer), x)
        self.open(path, transformer)
        h = self.add(f"{path}.proj_in", partial(ops.transformer_in, transformer), x)
        for k, block in enumerate(transformer.transformer_blocks):
            block_path = f"{path}.transformer_blocks.{k}"
            self.open(block_path, block)
            for part in ("attn1", "attn2", "ff"):
                if getattr(block, part) is None:
                    continue
                run = partial(getattr(ops, f"block_{part}"), block)
                branch = self.add(f"{block_path}.{part}:out", run, h)
                # The block's own output is the sum after its last part.
                name = f"{block_path}:out" if part == "ff" else f"{block_path}.{part}.sum"
                h = self.add(name, ops.add_all, branch, h)
        branch = self.add(f"{path}:branch", partial(ops.transformer_out, transformer), h, x)
        return self.add(f"{path}:out", ops.add_all, branch, x)


def _can_expand(transformer: Transformer2DModel) -> bool:
    """The inside is laid open for the plain pre-norm block of the Stable Diffusion family only."""
    return transformer.is_input_continuous and all(
        type(block) is BasicTransformerBlock
        and block.norm_type == "layer_norm"
        and block.pos_embed is None
        and not hasattr(block, "fuser")
        for block in transformer.transformer_blocks
    )


def run_graph(graph: Graph, calls: dict[str, ops.Call], visit: Callable[[Node, Tensor], Tensor]) -> Tensor:
    """Runs every node once but `guidance`; `visit(node, fresh)` returns the value that its readers see.

    `calls` maps a model (`Node.model`) to what it is called with. Returns the UNet's prediction.
    """
    values: dict[str, Tensor] = {}
    last_reader = {n: node.name for node in graph.nodes.values() for n in node.inputs if n != graph.output}
    for node in graph.nodes.values():
        if node.name == graph.guidance:
            continue
        inputs = [values[name] for name in node.inputs]
        values[node.name] = visit(node, node.run(calls[node.model], *inputs))
        for name in set(node.inputs):
            if last_reader.get(name) == node.name:
                del values[name]
    return values[graph.output]


def meta_copy(model: Any) -> Any:
    """The same architecture on the meta device: shapes without weights, to count with."""
    with torch.device("meta"):
        return type(model).from_config(model.config).eval().requires_grad_(False)


def architecture_key(model: Any) -> tuple[type, str]:
    """What a meta copy depends on: equal for models of one architecture, wherever they were loaded from."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return type(model), repr(sorted(config.items()))
