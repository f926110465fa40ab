"""Few distinct steps: torch.compile makes one graph for every different set of nodes that run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from hgc_learn.training.gates import Gates
from hgc_learn.training.router import Router

if TYPE_CHECKING:
    from hgc_learn.training.module import RouterModule


def rounded(module: RouterModule, budget: float, max_patterns: int | None) -> Gates:
    """The router's gates at a budget, of no more than so many different steps, if that is given.

    Raises:
        ValueError: as `cap`; or the router was trained for a policy whose rule that would undo.
    """
    gates = module.gates(budget)
    if max_patterns is None:
        return gates
    capped = cap(module.router, gates, budget, max_patterns)
    if capped is not gates and not module.objective.is_specialised:
        raise ValueError(
            f"max_patterns is {max_patterns}; the schedule of a router trained for {module.objective.policy} has more "
            "different steps, and making them fewer would undo its rule. Leave max_patterns out."
        )
    return capped


def cap(router: Router, gates: Gates, budget: float, max_patterns: int) -> Gates:
    """The router's gates at a budget, if they have no more than so many different steps, the first included; or some
    that compute the highest logits that the budget allows, where steps that want nearly the same share their mean
    logits.

    Raises:
        ValueError: a budget that cannot be met, or a cap below 2: the first step computes everything.
    """
    if max_patterns < 2:
        raise ValueError(f"max_patterns is {max_patterns}; it must be at least 2: the first step computes everything.")
    if count(router, gates) <= max_patterns:
        return gates
    logits = router.logits.detach()
    wanted = torch.sigmoid(logits[1:] - router.price(budget))
    tree = linkage(wanted.cpu().double().numpy(), method="ward")
    for num_groups in range(max_patterns - 1, 0, -1):
        groups = torch.from_numpy(fcluster(tree, num_groups, criterion="maxclust"))
        members = [[1 + step for step in (groups == group).nonzero().flatten().tolist()] for group in groups.unique()]
        shared = _shared(logits, members)
        gates = router.round(budget, shared, members)
        if count(router, gates) <= max_patterns:
            return gates
    raise AssertionError("one group and the first step are two patterns")


def count(router: Router, gates: Gates) -> int:
    """How many different steps gates have."""
    return len({router.pattern(row) for row in gates.compute.tolist()})


def _shared(logits: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Every step's logits [steps, sites] replaced by the mean of its group."""
    result = logits.clone()
    for steps in groups:
        result[steps] = logits[steps].mean(0)
    return result
