"""A device that is not there: tensors on it hold CPU tensors, and refuse, as a GPU does, to be mixed with those.

They say that they are on `meta`, of which nothing else here makes use meanwhile. What a GPU allows is allowed: numbers
(tensors without axes), copies, and indices on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
MIXED = ("aten.copy_", "aten._to_copy", "aten.index", "aten._index_put_impl_", "aten.set_")


class PretendTensor(torch.Tensor):
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.inner.tolist()

    @property
    def _version(self) -> int:
        return self.inner._version

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    def __init__(self, generators: set[int]):
        super().__init__()
        self.generators = generators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.generators)


def run(func: Any, args: Any, kwargs: dict[str, Any], generators: set[int] | None = None) -> Any:
    name = str(func)
    leaves = tree_leaves((args, kwargs))
    pretend = [leaf for leaf in leaves if isinstance(leaf, PretendTensor)]
    real = [
        leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, PretendTensor) and leaf.ndim
    ]
    if pretend and real and not name.startswith(MIXED):
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (pretend, real)]
        raise RuntimeError(f"{name} of tensors on two devices: {shapes[0]} there, {shapes[1]} on the CPU")
    device = kwargs.get("device")
    is_there = bool(pretend) if device is None else torch.device(device) == DEVICE
    generator = kwargs.get("generator")
    if generator is not None and generators is not None and (generator._cdata in generators) != is_there:
        raise RuntimeError(f"{name} with a generator of another device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, PretendTensor) else leaf, (args, kwargs)
    )
    result = func(*inner_args, **inner_kwargs)
    known = {id(tensor.inner): tensor for tensor in pretend}  # what works in place gives back the same tensor

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not is_there:
            return leaf
        return known[id(leaf)] if id(leaf) in known else PretendTensor(leaf)

    return tree_map(wrap, result)


@contextmanager
def pretend_accelerator() -> Iterator[torch.device]:
    """While it lasts, the device that it gives is an accelerator."""
    made: list[torch.Generator] = []  # kept, for they are known by their address
    generators: set[int] = set()
    real, real_tensor = torch.Generator, torch.tensor

    def generator(device: Any = "cpu") -> torch.Generator:
        made.append(real())
        if torch.device(device) == DEVICE:
            generators.add(made[-1]._cdata)
        return made[-1]

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:  # no operator makes these
        made_here = real_tensor(data, **kwargs)
        return made_here if device is None else made_here.to(device)

    with (
        patch.object(torch, "Generator", generator),
        patch.object(torch, "tensor", tensor),
        Mode(generators),
    ):
        yield DEVICE


def move(module: Any, device: torch.device) -> None:
    """A module or the models of a pipeline."""
    parts = module.components.values() if hasattr(module, "components") else [module]
    for part in parts:
        if isinstance(part, torch.nn.Module):
            part.to(device)
