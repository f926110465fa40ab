"""Which of several trainings an export goes on with.

What a training puts where is chance, and one in some goes wrong at some budget: 3 dB at 25 % of the MACs in one of
three seeds (docs/recipe.md). Nothing that an export learns mends that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hgc_learn.export.patterns import rounded
from hgc_learn.training.lightning_cli import read_checkpoint

if TYPE_CHECKING:
    from hgc_learn.training.module import RouterModule

Weights = dict[str, Tensor]
"""Of a router."""


def read_routers(module: RouterModule, ckpt_paths: Sequence[Path]) -> list[Weights]:
    """The routers of other trainings of what the module was trained for.

    Raises:
        ValueError: a checkpoint cannot be found or read, or is of another model, sampler, objective or sites.
    """
    routers = []
    for path in ckpt_paths:
        checkpoint = read_checkpoint(path)
        module.check_training(checkpoint, str(path))
        prefix = "router."
        weights = checkpoint["state_dict"].items()
        routers.append({name.removeprefix(prefix): value for name, value in weights if name.startswith(prefix)})
    return routers


def choose(
    module: RouterModule,
    budget: float,
    routers: Iterable[Weights],
    batches: Sequence[dict[str, Any]],
    max_patterns: int | None = None,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> list[float]:
    """Gives the module, of its own router and others, the one whose rounded schedule at a budget has the lowest mean
    log error of the outcome on these batches. Returns this error of each, its own first.

    Raises:
        ValueError: as `rounded`.
    """

    def counted() -> Iterator[dict[str, Any]]:
        for batch in batches:
            yield batch
            on_batch()

    router = module.router
    best, errors = {name: value.clone() for name, value in router.state_dict().items()}, []
    for weights in [best, *routers]:
        router.load_state_dict(weights)
        errors.append(module.log_error(counted(), rounded(module, budget, max_patterns)))
        if errors[-1] <= min(errors[:-1], default=errors[-1]):
            best = weights
    router.load_state_dict(best)
    return errors
