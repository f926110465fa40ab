"""What does not change within a run is computed once: savings that are exact and need no schedule.

The keys and values of the text's cross-attention are made of the prompt alone, the ControlNet's condition embedding of
the control image alone, and both are the same at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.controlnets.controlnet import ControlNetModel
from torch import Tensor, nn

from hgc_learn.runtime.takeover import current_forward, give_back, owner_of_forward, take_over

MAX_KEPT = 2
"""Per module: for the whole batch and for its guided half."""


class Once:
    """Keeps what some modules of the models give, for as long as it is asked for the same tensor. A tensor is the same
    if it has the same memory and version: nothing is read from the device. What has been written into since is made
    again. Where gradients are recorded, under `torch.inference_mode` and inside of compiled regions the modules run as
    ever.

    Args:
        models: UNet and ControlNets.
    """

    def __init__(self, models: Iterable[nn.Module]):
        self.models = list(models)
        self.modules = [module for model in self.models for module in _constant_modules(model)]
        self.replaced: dict[nn.Module, Any] = {}  # the forward that stood in the instance, if any
        self.kept: dict[nn.Module, dict[Any, tuple[Tensor, Tensor, int]]] = {}
        self.is_off = False

    def prepare(self) -> None:
        """For a new run: takes the modules' places, or leaves them if some are compiled block by block, for one graph
        is to serve many blocks."""
        is_compiled = any(part._compiled_call_impl is not None for model in self.models for part in model.modules())
        if is_compiled:
            self.uninstall()
        elif not self.replaced:
            for module in self.modules:
                forward = partial(self._forward, module, current_forward(module))
                self.replaced[module] = take_over(module, forward)

    def uninstall(self) -> None:
        """Leaves alone what others have wrapped since: it runs as ever."""
        self.clear()
        for module, replaced in self.replaced.items():
            if owner_of_forward(module) is self:
                give_back(module, replaced)
        self.replaced = {}

    def clear(self) -> None:
        """A new run begins, or what the outputs depend on has changed."""
        self.kept = {}

    @contextmanager
    def without_keeping(self) -> Iterator[None]:
        """The modules run as ever meanwhile, and what is kept stays."""
        self.is_off = True
        try:
            yield
        finally:
            self.is_off = False

    def _forward(self, module: nn.Module, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_off = self.is_off or not self.replaced or torch.compiler.is_compiling() or torch.is_grad_enabled()
        if is_off or args or kwargs or x.is_inference():
            return forward(x, *args, **kwargs)
        kept = self.kept.setdefault(module, {})
        key = x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, x.device
        found = kept.get(key)
        if found is not None and found[1]._version == found[2]:
            return found[1]
        output = forward(x)
        if not output.is_inference():
            kept.pop(key, None)  # an attention processor has written into it
            while len(kept) >= MAX_KEPT:
                del kept[next(iter(kept))]
            # The input is held, so that no other tensor can take its place in memory.
            kept[key] = (x, output, output._version)
        return output


def _constant_modules(model: nn.Module) -> list[nn.Module]:
    """Those whose only input is the prompt or the control image as the pipeline gives it."""
    found: list[nn.Module] = []
    if isinstance(model, ControlNetModel):
        found.append(model.controlnet_cond_embedding)
    for module in model.modules():
        if isinstance(module, Attention) and module.is_cross_attention and module.norm_cross is None:
            found += [layer for layer in (module.to_k, module.to_v) if layer is not None]
    return found
