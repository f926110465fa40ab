"""Recognises the models that a schedule was made for.

Two parts: a hash of the architecture (names and shapes of all parameters), which must match, and the norms of a
few weight tensors, which tell other weights of the same architecture. Norms survive a change of dtype and light
fine-tuning; a hash of the weights would not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NORM_TOLERANCE = 2e-3
"""Relative; rounding a tensor to bfloat16 moves its norm by less."""

SAME_NORM_TOLERANCE = 1e-5
"""Relative; other orders of summation, of another machine, move a norm by less."""

MAX_NORM = 1e30

_PROBES = ("conv_in", "mid_block.resnets.0.conv1", "mid_block.resnets.1.conv2", "conv_out", "controlnet_mid_block")


@dataclass(frozen=True)
class ModelFingerprint:
    """`architecture` and `norms` by model: `unet`, `controlnet` or `controlnet.nets.<i>`."""

    architecture: dict[str, str]
    norms: dict[str, dict[str, float]]

    @classmethod
    def of(cls, unet: nn.Module, controlnet: Any = None) -> ModelFingerprint:
        """Reads the fingerprint off models on any device (one transfer of a few numbers to the host)."""
        from hgc_learn.models.graph import named_models  # diffusers takes seconds to import; files are read without it

        models = named_models(unet, controlnet)
        return cls(
            architecture={name: _architecture(model) for name, model in models.items()},
            norms={name: _norms(model) for name, model in models.items()},
        )

    def difference(self, other: ModelFingerprint, tolerance: float = NORM_TOLERANCE) -> tuple[str, str] | None:
        """None if `other` is the same model, else (`architecture` or `weights`, what differs). Norms may differ by
        `tolerance`, relative."""
        if self.architecture.keys() != other.architecture.keys():
            expected, found = (", ".join(models.architecture) for models in (self, other))
            return "architecture", f"{found} where {expected} {'is' if len(self.architecture) == 1 else 'are'} expected"
        for name, mine in self.architecture.items():
            theirs = other.architecture[name]
            if mine != theirs:
                return "architecture", f"{name} is {theirs} where {mine} is expected"
        for name, norms in self.norms.items():
            for key, norm in norms.items():
                their_norm = other.norms.get(name, {}).get(key)
                if their_norm is not None and abs(their_norm - norm) > tolerance * max(abs(norm), abs(their_norm)):
                    what = f"the norm of {name}.{key}.weight"
                    return "weights", f"{what} is {their_norm:.6g} where {norm:.6g} is expected"
        return None

    def to_dict(self) -> dict[str, Any]:
        return {
            name: {"architecture": hash_, "norms": self.norms.get(name, {})}
            for name, hash_ in self.architecture.items()
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelFingerprint:
        """Raises ValueError where `data` is not what `to_dict` writes."""
        if "unet" not in data:
            raise ValueError("'unet' is missing")
        for name, entry in data.items():
            if not isinstance(entry, dict) or set(entry) != {"architecture", "norms"}:
                raise ValueError(f"{name!r} must hold exactly 'architecture' and 'norms'")
            if not isinstance(entry["architecture"], str) or not isinstance(entry["norms"], dict):
                raise ValueError(f"{name!r}: 'architecture' must be a string and 'norms' an object")
            for key, norm in entry["norms"].items():
                if isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 <= norm < MAX_NORM:
                    raise ValueError(f"{name!r}: norm of {key!r} is not a number from 0 to {MAX_NORM:g}")
        return cls(
            architecture={name: entry["architecture"] for name, entry in data.items()},
            norms={name: {k: float(v) for k, v in entry["norms"].items()} for name, entry in data.items()},
        )


_architectures: dict[tuple[type, str], str] = {}  # building a model takes longer than reading one


def _architecture(model: Any) -> str:
    from hgc_learn.models.graph import architecture_key, meta_copy

    key = architecture_key(model)
    if key not in _architectures:
        shapes = sorted(f"{name} {tuple(p.shape)}" for name, p in meta_copy(model).named_parameters())
        _architectures[key] = hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]
    return _architectures[key]


def _norms(model: nn.Module) -> dict[str, float]:
    norms: dict[str, float] = {}
    for path in _PROBES:
        try:
            module: Any = model.get_submodule(path)
        except AttributeError:
            continue
        weight = _weight(getattr(module, "base_layer", module))  # a LoRA layer wraps the original
        if not weight.is_meta and weight.dtype.itemsize > 1:  # rounded to 8 bits it has another norm
            norm = float(torch.linalg.vector_norm(weight.detach().float()))
            norms[path] = float(f"{norm:.8g}")
    return norms


def _weight(module: Any) -> torch.Tensor:
    """Sequential offload keeps it elsewhere until it is used."""
    elsewhere = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    weight: torch.Tensor = elsewhere["weight"] if module.weight.is_meta and elsewhere is not None else module.weight
    return weight
