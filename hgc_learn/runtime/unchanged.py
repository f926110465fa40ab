"""What a run's models are called with and how they are set, to tell whether any of it has changed since the last step:
kept tensors are right only as long as nothing has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_FREEU = ("s1", "s2", "b1", "b2")


class Settings:
    """What can be changed on models in mid-run without being an argument of theirs: attention processors and their
    scale (IP-Adapter), LoRA, FreeU."""

    def __init__(self, models: dict[str, Any]):
        modules = [module for model in models.values() for module in model.modules()]
        self.models = list(models.values())
        self.attentions = [m for m in modules if _has(m, "processor")]
        self.adapted = [m for m in modules if _has(m, "merged_adapters")]
        self.blocks = [m for m in modules if _has(m, "resolution_idx")]

    def read(self) -> tuple[Any, ...]:
        """At every model call, so in plain values: what may be changed in place is copied."""
        processors = [m.processor for m in self.attentions]
        scales = [getattr(processor, "scale", None) for processor in processors]
        return (
            processors,
            [tuple(scale) if isinstance(scale, list) else scale for scale in scales],
            [
                # Not every kind of adapter has a scale.
                (dict(getattr(m, "scaling", {})), (*m.active_adapters,), (*m.merged_adapters,), m.disable_adapters)
                for m in self.adapted
            ],
            [getattr(m, name, None) for m in self.blocks for name in _FREEU],
            [tuple(getattr(m, "peft_config", ())) for m in self.models],
        )


def _has(module: nn.Module, name: str) -> bool:
    """As hasattr, which takes a hundred times as long where a module has it not, as thousands have."""
    return name in module.__dict__ or name in module._modules


def state(tensor: Tensor) -> int:
    """Another one after each write into a tensor; those made in inference mode do not tell."""
    return 0 if tensor.is_inference() else tensor._version


class Signature:
    """Identity of everything that must stay the same for kept tensors to be right. Tensors are compared by memory
    and version, not by value, so that nothing is read from the device; they are held so that no other tensor can
    take their place in memory. Those made in inference mode have no version, so of them the values are compared.

    Args:
        inputs: what a model is called with, nested.
        settings: compared as they are.
    """

    def __init__(self, inputs: Any, settings: tuple[Any, ...]):
        self.settings = settings
        self.held: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.key = self._key(inputs)

    def equals(self, other: Signature) -> bool:
        is_same = self.key == other.key and self.settings == other.settings
        return is_same and all(map(torch.equal, self.copies, other.copies))

    def _key(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.held.append(value)
            if value.is_inference():
                self.copies.append(value.clone())
            return (value.data_ptr(), state(value), tuple(value.shape), value.stride(), value.dtype, value.device)
        if isinstance(value, dict):
            return tuple((key, self._key(value[key])) for key in sorted(value))
        if isinstance(value, list | tuple):
            return tuple(self._key(v) for v in value)
        return value
