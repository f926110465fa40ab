"""Training on several processes: together they do what one does with all their samples.

Process r of n has every n-th sample of a batch, from the r-th on (`data`), and all average their gradients before each
makes the same update. `Rollout` draws a schedule in each, all else that is drawn is the same everywhere. Without
torch.distributed, or before it is set up, there is one process, and nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Of this process, from 0."""
    return dist.get_rank() if num_processes() > 1 else 0


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of the tensors [...] that all processes give, on every one of them; all must call this."""
    if num_processes() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / num_processes()


def own_noise(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise [batch, ...] for this process's samples: its rows of what one process would draw for all, where
    `generator` is in the same state everywhere."""
    noise = torch.randn(num_processes() * shape[0], *shape[1:], generator=generator, device=like.device)
    return noise[rank() :: num_processes()].to(like.dtype)
