"""Puts other forwards in the place of modules' own, and gives these back, in any order with offload hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def take_over(module: nn.Module, forward: Callable[..., Any]) -> Any:
    """Puts a forward, a method of its owner or a partial of one, in the place of a module's; returns what stood in the
    instance, if anything."""
    slot = _forward_slot(module)
    replaced = module.__dict__.get(slot)
    setattr(module, slot, forward)
    return replaced


def current_forward(module: nn.Module) -> Callable[..., Any]:
    """What a module runs, without the offload hooks around it."""
    return module.__dict__.get(_forward_slot(module)) or partial(type(module).forward, module)


def owner_of_forward(module: nn.Module) -> Any:
    """Whose method it is that stands in the place of a module's forward; None for the class's own."""
    forward = module.__dict__.get(_forward_slot(module))
    return getattr(getattr(forward, "func", forward), "__self__", None)


def has_own_forward(module: nn.Module) -> bool:
    """Whether another forward than its class's has been put into it, offload hooks apart."""
    forward = module.__dict__.get(_forward_slot(module))
    forward = getattr(forward, "func", forward)  # of a partial
    return forward is not None and getattr(forward, "__func__", forward) is not type(module).forward


def give_back(module: nn.Module, replaced: Any) -> None:
    """Undoes `take_over`."""
    slot = _forward_slot(module)
    if replaced is None and slot == "forward":
        del module.forward  # the class's own shows again
    else:
        setattr(module, slot, replaced or partial(type(module).forward, module))


def _forward_slot(module: nn.Module) -> str:
    """accelerate's offload hooks keep the forward they wrap in `_old_forward` and put it back when they go."""
    return "_old_forward" if hasattr(module, "_old_forward") else "forward"
