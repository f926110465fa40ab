"""What another choice at a gate would do to the final latents: all gates, all predictors, from two backward passes.

What a site gives at step l is linear in the values that it has freshly: sum_j A[l, j] * fresh_j, where A[l, l] = 1 if
it is computed and A[l, j] are the predictor's coefficients if it is filled in. One backward pass gives the products
<gradient_l, fresh_j> for all l and j. The first-order effect of any other row of the schedule is the sum of its change
of A times these products, whatever predictor it uses, later steps that look at the same values included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hgc_learn import ops
from hgc_learn.forwards import RoutedForwards
from hgc_learn.graph import Graph, Node
from hgc_learn.plan import COMPUTE, Load, compile_plan
from hgc_learn.predictors import BY_CODE

REACH = 3
"""How many computed values back from a step another choice may make a difference: one more than predictors look at."""

Products = NDArray[np.float64]
"""[steps l, steps j, halves, batch]: <gradient of what is used at l, fresh value of j>."""


class ProbedForwards(RoutedForwards):
    """Runs a schedule hard, with its own cache, in a differentiable way, and computes besides (without a gradient) the
    fresh value of every site that is filled in.

    Steps that count for the guided half only run in full: to know the fresh guidance difference.
    """

    def __init__(self, pipe: Any, graph: Graph, sites: Sequence[str], num_steps: int):
        super().__init__(pipe, graph, num_steps)
        self.sites = list(sites)
        self.routed = set(sites)
        self.order = {model: [n for n in graph.nodes.values() if n.model == model] for model in self.models}
        self.set_rows({})

    def set_rows(self, rows: Mapping[str, str]) -> None:
        """Sets what the next run does: codes by step for sites (not those with tensors, not the mean of halves)."""
        self.rows = {site: rows.get(site, COMPUTE * self.num_steps) for site in self.sites}
        self.plan = compile_plan(self.graph, self.rows, self.num_steps)
        self.run = [set(step.run) for step in self.plan.steps]
        self.load = [{load.site: load for load in step.load} for step in self.plan.steps]
        self.is_half = [step.is_half for step in self.plan.steps]
        self.probe = [self._probe(i) for i in range(self.num_steps)]
        self.computed = {site: [i for i in range(self.num_steps) if self._computes(site, i)] for site in self.sites}
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
            return node.run(call, *[self._read(values, name, batch_size) for name in node.inputs])

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
                if name in load:
                    self.fresh[name][step] = values[name]
                    values[name] = self._watch(self._fill_in(load[name], step), name, step)
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

    def _fill_in(self, load: Load, step: int) -> Tensor:
        unguided = load.unguided or self._sources(load.site, step, load.code, in_full=True)
        if unguided == load.guided:
            return self._combine(load, step, load.guided)
        num_unguided = len(self.values[load.site][0]) // 2
        halves = self._combine(load, step, unguided)[:num_unguided], self._combine(load, step, load.guided)
        return torch.cat([halves[0], halves[1][num_unguided:]])

    def _sources(self, site: str, step: int, code: str, *, in_full: bool) -> tuple[int, ...]:
        steps = [j for j in reversed(self.computed[site]) if j < step and not (in_full and self.is_half[j])]
        return tuple(steps[: BY_CODE[code].num_values])

    def _combine(self, load: Load, step: int, sources: tuple[int, ...]) -> Tensor:
        terms = zip(_coefficients(load.code, step, sources), sources, strict=False)
        scaled = [self.values[load.site][j] if c == 1.0 else c * self.values[load.site][j] for c, j in terms]
        return sum(scaled[1:], start=scaled[0])

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
        before = [j for j in self.computed[site] if j < step]
        first = before[-REACH] if len(before) >= REACH else 0
        if site not in self.products:
            self.products[site] = gradient.new_zeros(self.num_steps, self.num_steps, len(gradient))
        gradient = gradient.flatten(1)
        for j, fresh in self.fresh[site].items():
            if first <= j <= step:
                self.products[site][step, j] = (gradient * fresh.flatten(1)).sum(1)

    # Effects

    def effects(
        self, generate: Callable[[], Tensor], target: Tensor, codes: str, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Runs the schedule.

        Args:
            generate: runs the pipeline differentiably and returns its final latents, [batch, ...].
            target: the uncached pipeline's.
            codes: what a gate may choose from, `C` first.
            generator: of the random direction.

        Returns:
            The mean squared error per sample [batch], and its relative change, to second order, by every other choice
            of a gate alone, [codes, steps, sites], mean over samples: what it adds to the mean logarithm of the error.
            0 for the present choice and where a site is not live.
        """
        self.install()
        try:
            with torch.enable_grad():
                latents = generate()
            error = (latents - target).detach()
            direction = torch.randn(error.shape, generator=generator, device=error.device)
            slopes = self._backward((error * latents).sum(), keep=True)
            probes = self._backward((direction * latents).sum())
        finally:
            self.uninstall()
        squared = error.square().flatten(1).sum(1)
        result = np.zeros((len(codes), self.num_steps, len(self.sites)))
        scale = squared.clamp_min(1e-12 * target.square().flatten(1).sum(1)).cpu().double().numpy()
        for column, site in enumerate(self.sites):
            if site in slopes:
                slope = self._changes(site, codes, self._by_half(slopes[site], len(error)))
                probe = self._changes(site, codes, self._by_half(probes[site], len(error)))
                result[:, :, column] = ((2 * slope + probe**2) / scale).mean(-1)
        self.set_rows(self.rows)  # lets go of the graph
        return squared / error[0].numel(), torch.from_numpy(result).to(error)

    def _backward(self, value: Tensor, keep: bool = False) -> dict[str, Tensor]:
        self.products = {}
        torch.autograd.grad(value, self.leaf, retain_graph=keep, allow_unused=True)
        return self.products

    def _by_half(self, products: Tensor, batch_size: int) -> Products:
        by_half: Products = products.unflatten(2, (-1, batch_size)).cpu().double().numpy()
        return by_half

    def _changes(self, site: str, codes: str, products: Products) -> NDArray[np.float64]:
        """First-order change of a quantity by every choice at every step, [codes, steps, batch]."""
        total = np.zeros((len(codes), self.num_steps, products.shape[-1]))
        num_halves = products.shape[2]
        row = self.rows[site]
        for half in range(num_halves):
            in_full = half < num_halves - 1  # the unguided half: as old as the last full step
            mine = [j for j in self.computed[site] if not (in_full and self.is_half[j])]
            used = [i for i in range(1, self.num_steps) if site in self.load[i] or i in self.computed[site]]
            before = {i: self._used(row[i], i, mine, products[i, :, half]) for i in used}
            for step in used:
                for index, code in enumerate(codes):
                    if code == row[step] or (in_full and self.is_half[step]):
                        continue
                    other = sorted({*mine, step}) if code == COMPUTE else [j for j in mine if j != step]
                    for later in self._affected(step, used, mine):
                        after = self._used(
                            code if later == step else row[later], later, other, products[later, :, half]
                        )
                        total[index, step] += after - before[later]
        return total

    @staticmethod
    def _affected(step: int, used: Sequence[int], computed: Sequence[int]) -> Iterator[int]:
        """Steps at which another choice at `step` may make a difference: until enough has been computed anew."""
        for later in used:
            if later >= step and sum(step < j < later for j in computed) < REACH - 1:
                yield later

    def _used(self, code: str, step: int, computed: Sequence[int], products: NDArray[np.float64]) -> Any:
        """The product of the gradient with what is used at a step, [batch]."""
        if code == COMPUTE:
            return products[step]
        sources = tuple([j for j in reversed(computed) if j < step][: BY_CODE[code].num_values])
        return sum(c * products[j] for c, j in zip(_coefficients(code, step, sources), sources, strict=False))


@lru_cache(maxsize=1 << 18)
def _coefficients(code: str, step: int, sources: tuple[int, ...]) -> tuple[float, ...]:
    """Of the values computed at the steps `sources`, the latest first."""
    fill = BY_CODE[code].fill([step - j for j in sources], step, {})
    return tuple(float(c) for c in fill.coefficients)


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
