"""Runs a schedule on the student's own trajectory, differentiably, and knows besides what it would have computed.

Of every site the gradient by what it gives at a step is multiplied with its fresh values, of that step and of those
before: from these products `effects` tells what other choices would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hgc_learn.models import ops
from hgc_learn.models.graph import Graph, Node
from hgc_learn.plan import COMPUTE, Load, compile_plan, row_of
from hgc_learn.predictors.fitted import FITTED, line
from hgc_learn.runtime.forwards import RoutedForwards
from hgc_learn.training.gates import Gates

NUM_WATCHED = FITTED.num_values + 1
"""How many computed values back from a step another choice may make a difference: one more than the predictor looks
at."""


class ProbedForwards(RoutedForwards):
    """Runs a schedule hard, with its own cache, in a differentiable way, and computes besides (without a gradient) the
    fresh value of every site that is filled in.

    Steps that count for the guided half only run in full: to know the fresh guidance difference.

    Args:
        gradient_checkpointing: keep only the tensors between nodes for the backward passes, and run each node again in
            them: they take twice as long, and a fraction of the memory.
    """

    def __init__(
        self, pipe: Any, graph: Graph, sites: Sequence[str], num_steps: int, *, gradient_checkpointing: bool = False
    ):
        super().__init__(pipe, graph, num_steps)
        self.gradient_checkpointing = gradient_checkpointing
        self.sites = list(sites)
        self.routed = set(sites)
        self.order = {model: [n for n in graph.nodes.values() if n.model == model] for model in self.models}
        self.set_gates(Gates.full(num_steps, len(self.sites)))

    def set_gates(self, gates: Gates) -> None:
        """Sets what the next run does."""
        self.reach = dict(zip(self.sites, gates.reach.t().tolist(), strict=True))
        self.rows = {
            site: row_of(column, FITTED.code)
            for site, column in zip(self.sites, gates.compute.t().tolist(), strict=True)
        }
        self.plan = compile_plan(self.graph, self.rows, self.num_steps)
        self.run = [set(step.run) for step in self.plan.steps]
        self.load = [{load.site: load for load in step.load} for step in self.plan.steps]
        self.is_half = [step.is_half for step in self.plan.steps]
        self.probe = [self._probe(i) for i in range(self.num_steps)]
        self.computed = {site: [i for i in range(self.num_steps) if self._computes(site, i)] for site in self.sites}
        self.coefficients: dict[tuple[str, int, tuple[int, ...]], tuple[Any, ...]] = {}
        self.forget()

    def forget(self) -> None:
        """Lets go of the values of the last run, and of its graph."""
        self.values: dict[str, dict[int, Tensor]] = {site: {} for site in self.sites}  # computed, with their graph
        self.fresh: dict[str, dict[int, Tensor]] = {site: {} for site in self.sites}  # all, without
        self.products: dict[str, Tensor] = {}
        self.leaf = torch.zeros(1, requires_grad=True)  # so that there is a graph: no parameter needs a gradient

    def _computes(self, site: str, step: int) -> bool:
        if site == self.graph.guidance:
            return not self.is_half[step] and self.graph.output in self.run[step]
        return site in self.run[step]

    def _probe(self, step: int) -> set[str]:
        """Nodes that run only to know the fresh values of the sites loaded at this step."""
        nodes = self.graph.nodes
        wanted = set(self.load[step]) - {self.graph.guidance}
        needed = {i for name in wanted for i in nodes[name].inputs}
        for name in reversed(nodes):
            if name in needed and self.rows.get(name, COMPUTE * self.num_steps)[step] == COMPUTE:
                wanted.add(name)
                needed.update(nodes[name].inputs)
        return wanted - self.run[step]

    def execute(self, model: str, step: int, call: ops.Call, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if step in self.refreshed:
            raise RuntimeError(f"Inputs changed at step {step}; training needs them constant over a run.")
        run, load, probe = self.run[step], self.load[step], self.probe[step]
        values, batch_size = given, len(call.sample)

        def run_node(node: Node) -> Tensor:
            inputs = [self._read(values, name, batch_size) for name in node.inputs]
            if not self.gradient_checkpointing or not torch.is_grad_enabled():
                return node.run(call, *inputs)
            again: Tensor = checkpoint(node.run, call, *inputs, use_reentrant=False, preserve_rng_state=False)
            return again

        for node in self.order[model]:
            name = node.name
            if name in self.graph.residuals or name == self.graph.guidance:
                continue
            if name in run:
                values[name] = run_node(node)
                if name in self.routed:
                    values[name] = self._keep(name, step, values[name])
            elif name in probe:
                with torch.no_grad():
                    values[name] = run_node(node)
                if name in self.routed:
                    self.fresh[name][step] = values[name]
                if name in load:
                    values[name] = self._watch(self._fill_in(load[name], step, call.guess_mode), name, step)
        for name in self.residuals.get(model, ()):  # a fresh value in the UNet may read one that is not live
            if name not in values and name in self.routed:
                values[name] = self._read(values, name, batch_size)
        if model == "unet" and self.graph.guidance in self.routed:
            self._guide(values, step)
        return values

    def _read(self, values: dict[str, Tensor], name: str, batch_size: int) -> Tensor:
        """The value of this step or, of a site that is not live, the latest one computed."""
        if name in values:
            return values[name]
        kept = self.values[name]
        return kept[max(kept)][-batch_size:]

    def _keep(self, name: str, step: int, value: Tensor) -> Tensor:
        self.values[name][step], self.fresh[name][step] = value, value.detach()
        return self._watch(value, name, step)

    def _watch(self, used: Tensor, name: str, step: int) -> Tensor:
        if not torch.is_grad_enabled() or step == 0:  # the first step has no other choice
            return used
        watched: Tensor = _Watched.apply(used, self.leaf, self, name, step)
        return watched

    def _fill_in(self, load: Load, step: int, is_guided_alone: bool) -> Tensor:
        unguided = load.unguided or latest([j for j in self.computed[load.site] if not self.is_half[j]], step)
        if unguided == load.guided or is_guided_alone:
            return self._combine(load, step, load.guided)
        num_unguided = len(self.values[load.site][0]) // 2
        halves = self._combine(load, step, unguided)[:num_unguided], self._combine(load, step, load.guided)
        return torch.cat([halves[0], halves[1][num_unguided:]])

    def _combine(self, load: Load, step: int, sources: tuple[int, ...]) -> Tensor:
        """As `Cache` does: rounded once, at the end."""
        values = [self.values[load.site][j] for j in sources]
        dtype = values[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        terms = zip(self.coefficients_of(load.site, step, sources), values, strict=True)
        scaled = [value.to(wide) if c == 1.0 else c * value.to(wide) for c, value in terms]
        return sum(scaled[1:], start=scaled[0]).to(dtype)

    def _guide(self, values: dict[str, Tensor], step: int) -> None:
        """The guidance difference, where it is one of the sites."""
        guidance, prediction = self.graph.guidance, values[self.graph.output]
        unguided, guided = prediction.tensor_split(2)
        if self.is_half[step]:
            self.fresh[guidance][step] = (guided - unguided).detach()
            load = self.load[step][guidance]
            used = self._watch(self._combine(load, step, load.guided), guidance, step)
            values[self.graph.output] = torch.cat([guided - used, guided])
        elif step in self.computed[guidance]:
            used = self._keep(guidance, step, guided - unguided)
            values[self.graph.output] = torch.cat([_Unguided.apply(unguided, guided, used), guided])

    def collect(self, site: str, step: int, gradient: Tensor) -> None:
        """Takes the gradient by what a site gives at a step and notes its products with the site's fresh values."""
        # The unguided half is filled in from full steps only, so that its sources lie farther back.
        before = [j for j in self.computed[site] if j < step and not self.is_half[j]]
        first = before[-NUM_WATCHED] if len(before) >= NUM_WATCHED else 0
        if site not in self.products:
            shape = self.num_steps, self.num_steps, len(gradient)
            self.products[site] = gradient.new_zeros(shape, dtype=torch.float32)
        gradient = gradient.flatten(1).float()  # what is wanted are small differences of these products
        for j, fresh in self.fresh[site].items():
            if first <= j <= step:
                self.products[site][step, j] = (gradient * fresh.flatten(1).float()).sum(1)

    def coefficients_of(self, site: str, step: int, sources: tuple[int, ...]) -> tuple[Any, ...]:
        """Of the values computed at the steps `sources`, the latest first."""
        key = site, step, sources
        if key not in self.coefficients:
            ages = [step - j for j in sources]
            self.coefficients[key] = line(ages, scale=1.0, reach=self.reach[site][step]).coefficients
        return self.coefficients[key]

    def backward(self, value: Tensor, keep: bool = False) -> dict[str, Tensor]:
        """The products of a backward pass from `value`, by site [step of use l, step of computing j, halves * batch].

        Args:
            keep: whether there will be another one.
        """
        self.products = {}
        torch.autograd.grad(value, self.leaf, retain_graph=keep, allow_unused=True)
        return self.products


def latest(computed: Sequence[int], step: int) -> tuple[int, ...]:
    """The steps whose values fill in for `step`, the latest first."""
    return tuple([j for j in reversed(computed) if j < step][: FITTED.num_values])


class _Unguided(torch.autograd.Function):
    """guided - difference, where the difference is guided - unguided: the unguided prediction itself, to the bit, with
    the derivative by the difference."""

    @staticmethod
    def forward(ctx: Any, unguided: Tensor, guided: Tensor, difference: Tensor) -> Tensor:
        return unguided.view_as(unguided)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, grad, -grad


class _Watched(torch.autograd.Function):
    """The value itself; shows its gradient to `ProbedForwards.collect`."""

    @staticmethod
    def forward(ctx: Any, used: Tensor, leaf: Tensor, forwards: ProbedForwards, site: str, step: int) -> Tensor:
        ctx.collect = lambda gradient: forwards.collect(site, step, gradient)
        return used.view_as(used)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        ctx.collect(grad)
        return grad if ctx.needs_input_grad[0] else None, None, None, None, None
