"""The learned policy: one gate per (step, site), and the multiplier that makes it keep to a budget.

A gate computes with probability sigmoid((logit - price) / temperature). The price is not learned and not set by
hand: for every budget it is solved for, so that the expected MACs by liveness meet the budget exactly. One set of
logits therefore holds a whole family of schedules. A gate that does not compute has a predictor fill in, chosen by
logits of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hgc_learn.graph import Graph
from hgc_learn.macs import NodeCost
from hgc_learn.plan import COMPUTE, ExpectedMacs, live_step


class Router(nn.Module):
    """Gates over `sites` for a run of `num_steps` steps.

    A hard schedule is a tensor of choices, int64 [steps, sites]: indices into `codes`, 0 for computing.

    Attributes:
        codes: `C` and the predictors' codes.
        logits: [steps, sites]. The first row has no effect: the first step computes everything.
        predictor_logits: [predictors, steps, sites].
    """

    def __init__(
        self, graph: Graph, costs: Mapping[str, NodeCost], sites: Sequence[str], num_steps: int, predictors: str = "-"
    ):
        super().__init__()
        self.sites = list(sites)
        self.codes = COMPUTE + predictors
        self.logits = nn.Parameter(torch.zeros(num_steps, len(self.sites)))
        self.predictor_logits = nn.Parameter(torch.zeros(len(predictors), num_steps, len(self.sites)))
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

    def choice_probabilities(self, p_compute: Tensor) -> Tensor:
        """P(choice) [codes, steps, sites] where P(compute) is `p_compute` [steps, sites]."""
        predictors = torch.softmax(self.predictor_logits / self.temperature, dim=0)
        return torch.cat([p_compute[None], (1 - p_compute) * predictors])

    @torch.no_grad()
    def sample(self, p_compute: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A hard schedule [steps, sites] by chance."""
        compute = torch.bernoulli(p_compute, generator=generator).bool()
        predictors = torch.softmax(self.predictor_logits / self.temperature, dim=0).flatten(1).t()
        chosen = torch.zeros_like(compute, dtype=torch.long)
        if len(self.codes) > 2:
            chosen = torch.multinomial(predictors, 1, generator=generator).view_as(chosen)
        return torch.where(compute, 0, 1 + chosen)

    @property
    def best_predictors(self) -> Tensor:
        """The choice of every gate if it does not compute, int64 [steps, sites]."""
        return 1 + self.predictor_logits.argmax(0)

    def choices(self, compute: Tensor) -> Tensor:
        """The hard schedule [steps, sites] that computes where `compute` [steps, sites] says so, and at step 0."""
        return torch.where(self.with_first_step(compute), 0, self.best_predictors)

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
        return self.kept(torch.ones_like(self.logits, dtype=torch.long))

    def kept(self, choices: Tensor) -> float:
        """Fraction of the full run's MACs that a hard schedule [steps, sites] keeps, by liveness."""
        rows = (choices[1:] == 0).to(torch.uint8).cpu().numpy()
        return (1.0 + sum(self._kept_by(row.tobytes()) for row in rows)) / self.num_steps

    def _kept_by(self, row: bytes) -> float:
        """Fraction of a full step's MACs that a step keeps; `row` has a byte per site, 1 for computing."""
        if row not in self._kept_by_row:
            live = live_step(
                self._graph, {name for name, computes in zip(self.sites, row, strict=True) if not computes}
            )
            macs = sum(self._macs[name] for name in live.run)
            self._kept_by_row[row] = macs / self._full / (2 if live.is_half else 1)
        return self._kept_by_row[row]

    def marginal_costs(self, choices: Tensor) -> Tensor:
        """By how much each gate alone, if it were flipped between computing and not, would change the fraction of the
        full run's MACs that a hard schedule keeps: [steps, sites]."""
        costs = torch.zeros(choices.shape)
        rows = (choices == 0).to(torch.uint8).cpu().numpy()
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
            choices = torch.zeros_like(self.logits, dtype=torch.long)
            choices[1, s] = 1
            alone.append((1 - self.kept(choices)) * self.num_steps)
        return torch.tensor(alone)

    @torch.no_grad()
    def threshold(self, budget: float) -> Tensor:
        """The hard schedule [steps, sites] that computes as many of the highest logits as the budget allows."""
        self.check_budget(budget)
        levels = self.logits[1:].flatten().unique()
        low, high = 0, len(levels)  # gates at or above levels[high] fit; at or above levels[low] they do not
        levels = torch.cat([levels, levels[-1:] + 1])
        if self.kept(self.choices(self.logits >= levels[0])) <= budget:
            return self.choices(self.logits >= levels[0])
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.kept(self.choices(self.logits >= levels[middle])) <= budget
            low, high = (low, middle) if fits else (middle, high)
        return self.choices(self.logits >= levels[high])

    @staticmethod
    def with_first_step(compute: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(compute[:1]), compute[1:]])

    def rows(self, choices: Tensor) -> dict[str, str]:
        """A hard schedule [steps, sites] as rows of codes by site; sites that are always computed are left out."""
        columns = zip(self.sites, choices.t().tolist(), strict=True)
        rows = {site: "".join(self.codes[choice] for choice in column) for site, column in columns}
        return {site: row for site, row in rows.items() if set(row) != {COMPUTE}}
