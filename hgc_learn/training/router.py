"""The learned policy: one gate per (step, site), and the price that makes it keep to a budget.

A gate computes with probability sigmoid((logit - price) / temperature). The price is not learned and not set by
hand: for every budget it is solved for, so that the MACs by liveness meet the budget. One set of logits therefore
holds a whole family of schedules. A gate that does not compute is filled in by the fitted predictor, with a reach of
its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hgc_learn.models.graph import Graph
from hgc_learn.models.macs import BudgetError, NodeCost
from hgc_learn.plan import ExpectedMacs, Liveness, live_step
from hgc_learn.training.gates import Gates

MAX_LOGIT = 8.0


class Router(nn.Module):
    """Gates over `sites` for a run of `num_steps` steps.

    Attributes:
        logits: [steps, sites]. The first row has no effect: the first step computes everything.
        reach: of the fitted predictor, with scale 1, [steps, sites]; begins with 0, that of `hold`.
    """

    def __init__(self, graph: Graph, costs: Mapping[str, NodeCost], sites: Sequence[str], num_steps: int):
        super().__init__()
        self.sites = list(sites)
        self.logits = nn.Parameter(torch.zeros(num_steps, len(self.sites)))
        self.reach = nn.Parameter(torch.zeros(num_steps, len(self.sites)))
        self.temperature = 1.0
        self._expected = ExpectedMacs(graph, costs, self.sites)
        self._graph = graph
        self._macs = {name: cost.total(False) for name, cost in costs.items()}
        self._full = sum(self._macs.values())

    @property
    def num_steps(self) -> int:
        return self.logits.shape[0]

    def probabilities(self, price: float) -> Tensor:
        """P(compute) [steps, sites]; the first row is 1."""
        p = torch.sigmoid((self.logits - price) / self.temperature)
        return torch.cat([torch.ones_like(p[:1]), p[1:]])

    @torch.no_grad()
    def sample(self, budget: float, generator: torch.Generator) -> tuple[Gates, float]:
        """Gates by chance that keep to the budget exactly, and their price: every gate's logit gets logistic
        noise, as many of the highest compute as the budget allows, and what that leaves is spent. Given the price, a
        gate computes with the probability that `probabilities` says, if it is not one of the few on which the rest is
        spent.

        Raises:
            BudgetError: it cannot be met.
        """
        uniform = torch.rand(self.logits.shape, generator=generator, device=self.logits.device)
        noisy = self.logits + self.temperature * uniform.clamp(1e-6, 1 - 1e-6).logit()
        price = self.price(budget, noisy)
        return self.spend(self.gates(noisy >= price), budget, noisy), price

    def round(
        self, budget: float, logits: Tensor | None = None, groups: Sequence[Sequence[int]] | None = None
    ) -> Gates:
        """Gates that compute as many of the highest logits as the budget allows, of other logits if given, and on which
        the rest is spent as in `spend`.

        Raises:
            BudgetError: it cannot be met.
        """
        logits = self.logits.detach() if logits is None else logits
        return self.spend(self.gates(logits >= self.price(budget, logits)), budget, logits, groups)

    def gates(self, compute: Tensor) -> Gates:
        """Computes where `compute` [steps, sites] says so, and at the first step."""
        compute = torch.cat([torch.ones_like(compute[:1]), compute[1:]])
        return Gates(compute.cpu(), self.reach.detach().cpu().clone())

    def expected_macs(self, p_compute: Tensor) -> Tensor:
        """Expected fraction of the full run's MACs, differentiable; `p_compute` [steps, sites]."""
        return self._expected(p_compute).mean()

    def price(self, budget: float, logits: Tensor | None = None) -> float:
        """The lowest logit that computes when the highest do that the budget allows, of other logits if given.

        Raises:
            BudgetError: it cannot be met.
        """
        self.check_budget(budget)
        logits = self.logits.detach() if logits is None else logits
        levels = logits[1:].flatten().unique()
        levels = torch.cat([levels, levels[-1:] + 1])
        low, high = -1, len(levels) - 1  # gates at or above levels[high] fit; at or above levels[low] they do not
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.kept(logits >= levels[middle]) <= budget
            low, high = (low, middle) if fits else (middle, high)
        return float(levels[high])

    def check_gradients(self) -> None:
        """Raises ValueError where one is not finite, before it reaches the router."""
        for name, parameter in self.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                raise ValueError(
                    f"The gradient of the router's {name} is not finite; the router stays as it was. The models may "
                    "overflow: train with --model.dtype=float32."
                )

    def clamp(self, limit: float = MAX_LOGIT) -> None:
        """Keeps the logits where gates can still change their mind."""
        self.logits.data.clamp_(-limit, limit)

    def check_budget(self, budget: float) -> None:
        """Raises BudgetError if it cannot be met."""
        if not self.least_budget <= budget <= 1:
            raise BudgetError(
                f"A budget of {budget} cannot be met: it is the fraction of full MACs kept, at most 1, and the sites "
                f"that are routed leave at least {self.least_budget:.3f} (the first step computes everything)."
            )

    @property
    def least_budget(self) -> float:
        """Kept fraction when everything that can be reused is."""
        return self.kept(torch.zeros_like(self.logits, dtype=torch.bool))

    def kept(self, compute: Tensor) -> float:
        """Fraction of the full run's MACs that gates [steps, sites] keep, by liveness."""
        return (1 + sum(map(self._kept_by, compute[1:].tolist()))) / self.num_steps

    def _kept_by(self, row: Iterable[bool]) -> float:
        """Fraction of a full step's MACs that a step keeps whose gates compute as `row` says, one entry per site."""
        live = self._live(row)
        return sum(self._macs[name] for name in live.run) / self._full / (2 if live.is_half else 1)

    def _live(self, row: Iterable[bool]) -> Liveness:
        """Of a step whose gates compute as `row` says, one entry per site."""
        return live_step(self._graph, {name for name, computes in zip(self.sites, row, strict=True) if not computes})

    def pattern(self, row: Iterable[bool]) -> tuple[tuple[str, ...], bool]:
        """What a step runs whose gates compute as `row` says: equal for steps that one compiled graph serves."""
        live = self._live(row)
        return live.run, live.is_half

    def dead(self, compute: Tensor) -> Tensor:
        """Gates whose choice makes no difference, because nothing reads their site at that step: bool [steps, sites].
        That of the guidance difference never counts as dead."""
        result = torch.zeros_like(compute)
        for step, row in enumerate(compute.tolist()):
            live = self._live(row)
            needed = {*live.run, *live.load, self._graph.guidance}
            result[step] = torch.tensor([name not in needed for name in self.sites])
        return result

    def savings(self) -> Tensor:
        """Per site [sites], the share of a full step's MACs that reusing it alone saves."""
        others = (~torch.eye(len(self.sites), dtype=torch.bool)).tolist()
        return torch.tensor([1 - self._kept_by(row) for row in others])

    def spend(
        self,
        gates: Gates,
        budget: float,
        logits: Tensor,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> Gates:
        """The gates with more of them computing, in the order of these logits, wherever the budget allows: the next
        one of all may cost more than is left. Gates that nothing would read stay as they are.

        Args:
            groups: of steps that have equal gates and logits, and keep them equal; else every step is its own.
        """
        groups = [[step] for step in range(self.num_steps)] if groups is None else groups
        members = {steps[0]: steps for steps in groups}
        rows = gates.compute.tolist()
        kept = [1.0, *map(self._kept_by, rows[1:])]
        left = budget * self.num_steps - sum(kept)
        for index in logits.flatten().argsort(descending=True, stable=True).tolist():
            step, site = divmod(index, len(self.sites))
            if step not in members or rows[step][site]:
                continue
            row = [*rows[step]]
            row[site] = True
            more = self._kept_by(row) - kept[step]
            if 0 < more * len(members[step]) <= left:
                left -= more * len(members[step])
                for member in members[step]:
                    rows[member], kept[member] = row, kept[step] + more
        return replace(gates, compute=torch.tensor(rows))
