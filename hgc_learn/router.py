"""The learned policy: one gate per (step, site), and the multiplier that makes it keep to a budget.

A gate computes with probability sigmoid((logit - price) / temperature). The price is not learned and not set by
hand: for every budget it is solved for, so that the expected MACs by liveness meet the budget exactly. One set of
logits therefore holds a whole family of schedules. A gate that does not compute is filled in by the fitted predictor,
with weights of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hgc_learn.graph import Graph
from hgc_learn.hard import HardSchedule, hold_weights
from hgc_learn.macs import NodeCost
from hgc_learn.plan import ExpectedMacs, Liveness, live_step


class Router(nn.Module):
    """Gates over `sites` for a run of `num_steps` steps.

    Attributes:
        logits: [steps, sites]. The first row has no effect: the first step computes everything.
        weights: scale and reach of the fitted predictor, [2, steps, sites]; they begin with those of `hold`.
    """

    def __init__(self, graph: Graph, costs: Mapping[str, NodeCost], sites: Sequence[str], num_steps: int):
        super().__init__()
        self.sites = list(sites)
        self.logits = nn.Parameter(torch.zeros(num_steps, len(self.sites)))
        self.weights = nn.Parameter(hold_weights(num_steps, len(self.sites)))
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

    @torch.no_grad()
    def sample(self, p_compute: Tensor, generator: torch.Generator | None = None) -> HardSchedule:
        """A hard schedule by chance; `p_compute` [steps, sites]."""
        return self.hard(torch.bernoulli(p_compute, generator=generator).bool())

    def hard(self, compute: Tensor) -> HardSchedule:
        """Computes where `compute` [steps, sites] says so, and at the first step."""
        compute = torch.cat([torch.ones_like(compute[:1]), compute[1:]])
        return HardSchedule(compute.cpu(), self.weights.detach().cpu().clone())

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
        """Fraction of the full run's MACs that gates [steps, sites] keep, by liveness."""
        rows = compute[1:].to(torch.uint8).cpu().numpy()
        return (1.0 + sum(self._kept_by(row.tobytes()) for row in rows)) / self.num_steps

    def _kept_by(self, row: bytes) -> float:
        """Fraction of a full step's MACs that a step keeps; `row` has a byte per site, 1 for computing."""
        if row not in self._kept_by_row:
            live = self._live(row)
            macs = sum(self._macs[name] for name in live.run)
            self._kept_by_row[row] = macs / self._full / (2 if live.is_half else 1)
        return self._kept_by_row[row]

    def _live(self, row: Iterable[int]) -> Liveness:
        """Of a step whose gates compute as `row` says, one entry per site."""
        return live_step(self._graph, {name for name, computes in zip(self.sites, row, strict=True) if not computes})

    def dead(self, compute: Tensor) -> Tensor:
        """Gates whose choice makes no difference, because nothing reads their site at that step: bool [steps, sites].
        That of the guidance difference never counts as dead."""
        result = torch.zeros_like(compute)
        for step, row in enumerate(compute.tolist()):
            live = live_step(
                self._graph, {name for name, computes in zip(self.sites, row, strict=True) if not computes}
            )
            needed = {*live.run, *live.load, self._graph.guidance}
            result[step] = torch.tensor([name not in needed for name in self.sites])
        return result

    def marginal_costs(self, compute: Tensor) -> Tensor:
        """By how much each gate alone, if it chose the other way, would change the fraction of the full run's MACs that
        gates [steps, sites] keep: [steps, sites]."""
        costs = torch.zeros(compute.shape)
        rows = compute.to(torch.uint8).cpu().numpy()
        for step in range(1, len(rows)):
            kept = self._kept_by(rows[step].tobytes())
            for site in range(len(self.sites)):
                flipped = rows[step].copy()
                flipped[site] ^= 1
                costs[step, site] = (self._kept_by(flipped.tobytes()) - kept) / self.num_steps
        return costs

    def savings(self) -> Tensor:
        """Per site [sites], the share of a full step's MACs that reusing it alone saves."""
        alone = []
        for s in range(len(self.sites)):
            compute = torch.ones_like(self.logits, dtype=torch.bool)
            compute[1, s] = False
            alone.append((1 - self.kept(compute)) * self.num_steps)
        return torch.tensor(alone)

    @torch.no_grad()
    def threshold(self, budget: float) -> HardSchedule:
        """The hard schedule that computes as many of the highest logits as the budget allows."""
        self.check_budget(budget)
        levels = self.logits[1:].flatten().unique()
        low, high = 0, len(levels)  # gates at or above levels[high] fit; at or above levels[low] they do not
        levels = torch.cat([levels, levels[-1:] + 1])
        if self.kept(self.logits >= levels[0]) <= budget:
            return self.hard(self.logits >= levels[0])
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.kept(self.logits >= levels[middle]) <= budget
            low, high = (low, middle) if fits else (middle, high)
        return self.hard(self.logits >= levels[high])
