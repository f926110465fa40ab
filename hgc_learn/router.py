"""The learned policy: one logit per (step, site), and the multiplier that makes it keep to a budget.

A gate computes with probability sigmoid((logit - price) / temperature). The price is not learned and not set by
hand: for every budget it is solved for, so that the expected MACs by liveness meet the budget exactly. One set of
logits therefore holds a whole family of schedules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hgc_learn.graph import Graph
from hgc_learn.macs import NodeCost
from hgc_learn.plan import ExpectedMacs, live_step


class Router(nn.Module):
    """Gates over `sites` for a run of `num_steps` steps.

    Attributes:
        logits: [steps, sites]. The first row has no effect: the first step computes everything.
    """

    def __init__(self, graph: Graph, costs: Mapping[str, NodeCost], sites: Sequence[str], num_steps: int):
        super().__init__()
        self.sites = list(sites)
        self.logits = nn.Parameter(torch.zeros(num_steps, len(self.sites)))
        self.temperature = 1.0
        self._expected = ExpectedMacs(graph, costs, self.sites)
        self._graph = graph
        self._macs = {name: cost.total(False) for name, cost in costs.items()}
        self._full = sum(self._macs.values())
        self._kept_by_row: dict[bytes, float] = {}

    @property
    def num_steps(self) -> int:
        return self.logits.shape[0]

    def probabilities(self, price: float) -> Tensor:
        """P(compute) [steps, sites]; the first row is 1."""
        p = torch.sigmoid((self.logits - price) / self.temperature)
        return torch.cat([torch.ones_like(p[:1]), p[1:]])

    def expected_macs(self, p_compute: Tensor) -> Tensor:
        """Expected fraction of the full run's MACs, differentiable; `p_compute` [steps, sites]."""
        return self._expected(p_compute).mean()

    @torch.no_grad()
    def price(self, budget: float, tolerance: float = 1e-3) -> float:
        """The price at which the expected MACs are `budget` (a fraction of the full run's), by bisection.

        Raises:
            ValueError: a budget below what the first step alone costs.
        """
        self.check_budget(budget)
        low, high = float(self.logits.min()) - 20.0, float(self.logits.max()) + 20.0
        for _ in range(40):
            middle = (low + high) / 2
            kept = float(self.expected_macs(self.probabilities(middle)))
            if abs(kept - budget) < tolerance:
                break
            low, high = (middle, high) if kept > budget else (low, middle)
        return middle

    def check_budget(self, budget: float) -> None:
        if not self.least_budget < budget <= 1:
            raise ValueError(
                f"A budget of {budget} cannot be met: it is the fraction of full MACs kept, at most 1, and the sites "
                f"that are routed leave at least {self.least_budget:.3f} (the first step computes everything)."
            )

    @property
    def least_budget(self) -> float:
        """Kept fraction when everything that can be reused is."""
        return self.kept(torch.zeros_like(self.logits, dtype=torch.bool))

    def kept(self, compute: Tensor) -> float:
        """Fraction of the full run's MACs that a hard schedule [steps, sites] keeps, by liveness."""
        total = 1.0  # the first step
        for row in compute[1:].to(torch.uint8).cpu():
            key = row.numpy().tobytes()
            if key not in self._kept_by_row:
                reused = {name for name, c in zip(self.sites, row.tolist(), strict=True) if not c}
                live = live_step(self._graph, reused)
                macs = sum(self._macs[name] for name in live.run)
                self._kept_by_row[key] = macs / self._full / (2 if live.is_half else 1)
            total += self._kept_by_row[key]
        return total / self.num_steps

    def savings(self) -> Tensor:
        """Per site [sites], the share of a full step's MACs that reusing it alone saves."""
        alone = []
        for s in range(len(self.sites)):
            compute = torch.ones_like(self.logits, dtype=torch.bool)
            compute[1, s] = False
            alone.append((1 - self.kept(compute)) * self.num_steps)
        return torch.tensor(alone)

    @torch.no_grad()
    def threshold(self, budget: float) -> Tensor:
        """The hard schedule [steps, sites] that computes as many of the highest logits as the budget allows."""
        self.check_budget(budget)
        levels = self.logits[1:].flatten().unique()
        low, high = 0, len(levels)  # gates at or above levels[high] fit; at or above levels[low] they do not
        levels = torch.cat([levels, levels[-1:] + 1])
        if self.kept(self.logits >= levels[0]) <= budget:
            return self.with_first_step(self.logits >= levels[0])
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.kept(self.logits >= levels[middle]) <= budget
            low, high = (low, middle) if fits else (middle, high)
        return self.with_first_step(self.logits >= levels[high])

    @staticmethod
    def with_first_step(compute: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(compute[:1]), compute[1:]])

    def table(self, compute: Tensor) -> dict[str, list[bool]]:
        """A hard schedule [steps, sites] as rows by site."""
        return dict(zip(self.sites, compute.t().tolist(), strict=True))
