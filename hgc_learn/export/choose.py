"""Which of several trainings an export goes on with.

What a training puts where is chance, and one in some goes wrong at some budget: 3 dB at 25 % of the MACs in one of
three seeds (docs/recipe.md). Nothing that an export learns mends that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hgc_learn.export.patterns import rounded
from hgc_learn.training.saved import read_checkpoint

if TYPE_CHECKING:
    from hgc_learn.training.module import RouterModule

Weights = dict[str, Tensor]
"""Of a router."""


def read_routers(module: RouterModule, ckpt_paths: Sequence[Path]) -> dict[Path, Weights]:
    """The routers of a module's training, the first, and of others for the same, by their checkpoints.

    Raises:
        ValueError: a checkpoint cannot be found or read, or is of another model, sampler, objective or sites.
    """
    routers, prefix = {}, "router."
    for path in ckpt_paths:
        checkpoint = read_checkpoint(path)
        if path != ckpt_paths[0]:
            module.check_training(checkpoint, str(path))
        weights = checkpoint["state_dict"].items()
        routers[path] = {name.removeprefix(prefix): value for name, value in weights if name.startswith(prefix)}
    return routers


def choose(
    module: RouterModule,
    budget: float,
    routers: Mapping[Path, Weights],
    batches: Sequence[dict[str, Any]],
    max_patterns: int | None = None,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[Path, float]:
    """Gives the module the router whose rounded schedule at a budget has the lowest mean log error of the outcome on
    these batches. Returns this error of each.

    Raises:
        ValueError: as `rounded`.
    """

    def counted() -> Iterator[dict[str, Any]]:
        for batch in batches:
            yield batch
            on_batch()

    errors = {}
    for path, weights in routers.items():
        module.router.load_state_dict(weights)
        errors[path] = module.log_error(counted(), rounded(module, budget, max_patterns))
    module.router.load_state_dict(routers[min(errors, key=errors.__getitem__)])
    return errors
