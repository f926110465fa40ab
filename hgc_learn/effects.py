"""What other choices would do to the final latents: of all gates and weights at once, from a few backward passes.

What a site gives at step l is linear in the values that it has freshly: sum_j A[l, j] * fresh_j, where A[l, l] = 1 if
it is computed, and A[l, j] are the coefficients of the fitted predictor if it is filled in. One backward pass gives the
products <gradient_l, fresh_j> for all l and j. The first-order effect of any other row of the schedule is the sum of
its change of A times these products, later steps that look at the same values included; the derivatives by the
coefficients are such products themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hgc_learn import ops
from hgc_learn.forwards import RoutedForwards
from hgc_learn.graph import Graph, Node
from hgc_learn.hard import HardSchedule
from hgc_learn.plan import COMPUTE, Flips, Load, compile_plan
from hgc_learn.predictors.fitted import FITTED

REACH = FITTED.num_values + 1
"""How many computed values back from a step another choice may make a difference: one more than the predictor looks
at."""

LEAST = 0.1
"""A sample's squared error is never expected to fall to less than this share: directions are too few to tell."""

Products = NDArray[np.float64]
"""[steps l, steps j, halves, columns]: <gradient of what is used at l, fresh value of j>."""


@dataclass(frozen=True)
class Effects:
    """First-order changes of the final latents, per sample, seen in a few directions: along the error itself
    (<error, change> / |error|^2) and along random ones (<v, change> / |error|, v ~ N(0, 1 / number of them)).

    For changes with amounts x_i, the relative change of a sample's squared error is to second order
    2 sum_i x_i along_error_i + sum over directions of (sum_i x_i across_i)^2.

    Attributes:
        errors: mean squared error of the final latents [batch].
        flips: of every gate choosing the other way, float64 [directions, batch, steps, sites]; 0 where the site is not
            live. The first direction is the error's.
        weights: of adding 1 to a weight, float64 [directions, batch, 2, steps, sites]; 0 where the site is not filled
            in.
    """

    errors: Tensor
    flips: Tensor
    weights: Tensor

    @classmethod
    def join(cls, parts: Sequence[Effects]) -> Effects:
        """Of several batches."""
        return cls(
            torch.cat([part.errors for part in parts]),
            torch.cat([part.flips for part in parts], dim=1),
            torch.cat([part.weights for part in parts], dim=1),
        )

    def of_each_flip(self) -> Tensor:
        """What each gate alone, if it chose the other way, would add to the mean log error, to second order, [steps,
        sites]."""
        relative = 1 + 2 * self.flips[0] + self.flips[1:].square().sum(0)
        return relative.clamp_min(LEAST).log().mean(0)

    def of_weights(self) -> Tensor:
        """The mean log error's derivatives by the weights, [2, steps, sites]."""
        return 2 * self.weights[0].mean(0)


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
        self.set_schedule(HardSchedule.full(num_steps, len(self.sites)))

    def set_schedule(self, schedule: HardSchedule) -> None:
        """Sets what the next run does."""
        self.weights = dict(zip(self.sites, schedule.weights.unbind(2), strict=True))
        self.rows = {
            site: "".join(COMPUTE if computes else FITTED.code for computes in column)
            for site, column in zip(self.sites, schedule.compute.t().tolist(), strict=True)
        }
        self.plan = compile_plan(self.graph, self.rows, self.num_steps)
        self.run = [set(step.run) for step in self.plan.steps]
        self.load = [{load.site: load for load in step.load} for step in self.plan.steps]
        self.is_half = [step.is_half for step in self.plan.steps]
        self.probe = [self._probe(i) for i in range(self.num_steps)]
        self.computed = {site: [i for i in range(self.num_steps) if self._computes(site, i)] for site in self.sites}
        self.coefficients: dict[tuple[str, int, tuple[int, ...]], tuple[float, ...]] = {}
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
        unguided = load.unguided or self._sources(load.site, step, in_full=True)
        if unguided == load.guided:
            return self._combine(load, step, load.guided)
        num_unguided = len(self.values[load.site][0]) // 2
        halves = self._combine(load, step, unguided)[:num_unguided], self._combine(load, step, load.guided)
        return torch.cat([halves[0], halves[1][num_unguided:]])

    def _sources(self, site: str, step: int, *, in_full: bool) -> tuple[int, ...]:
        return _latest([j for j in self.computed[site] if not (in_full and self.is_half[j])], step)

    def _combine(self, load: Load, step: int, sources: tuple[int, ...]) -> Tensor:
        terms = zip(self._coefficients(load.site, step, sources), sources, strict=True)
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

    def _coefficients(self, site: str, step: int, sources: tuple[int, ...]) -> tuple[float, ...]:
        """Of the values computed at the steps `sources`, the latest first."""
        key = site, step, sources
        if key not in self.coefficients:
            self.coefficients[key] = fitted_coefficients(self.weights[site][:, step], step, sources)
        return self.coefficients[key]

    # Effects

    def effects(
        self, generate: Callable[[], Tensor], target: Tensor, generator: torch.Generator, num_directions: int
    ) -> Effects:
        """Runs the schedule and measures.

        Args:
            generate: runs the pipeline differentiably and returns its final latents, [batch, ...].
            target: the uncached pipeline's.
            generator: of the random directions.
            num_directions: how many of them.
        """
        self.install()
        try:
            with torch.enable_grad():
                latents = generate()
            error = (latents - target).detach()
            # A schedule that is nearly exact is measured against the rounding of its latents.
            squared = error.square().flatten(1).sum(1)
            scale = squared.clamp_min(1e-12 * target.square().flatten(1).sum(1)).view(-1, *[1] * (error.ndim - 1))
            directions = [error / scale]
            for _ in range(num_directions):
                random = torch.randn(error.shape, generator=generator, device=error.device)
                directions.append(random / (scale * num_directions).sqrt())
            seen = []
            for index, direction in enumerate(directions):
                seen.append(self._backward((direction * latents).sum(), keep=index < num_directions))
        finally:
            self.uninstall()
        flips, weights = self._by_choice(seen, len(error))
        self.forget()
        shape = len(directions), len(error)
        flips = flips.transpose(2, 0, 1).reshape(*shape, *flips.shape[:2])
        weights = weights.transpose(3, 0, 1, 2).reshape(*shape, *weights.shape[:3])
        return Effects(squared / error[0].numel(), torch.from_numpy(flips), torch.from_numpy(weights))

    def _by_choice(
        self, seen: Sequence[dict[str, Tensor]], batch_size: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """First-order changes, from the products of several backward passes, by every flip [steps, sites, columns] and
        weight [2, steps, sites, columns]; columns are directions * batch."""
        flips = np.zeros((self.num_steps, len(self.sites), len(seen) * batch_size))
        refreshes = np.zeros((2, *flips.shape))
        weights = np.zeros((len(FITTED.parameters), *flips.shape))
        for column, site in enumerate(self.sites):
            if site in seen[0]:
                products = self._by_half(torch.stack([products[site] for products in seen], dim=2), batch_size)
                flips[:, column], refreshes[:, :, column] = self._flips(site, products)
                weights[:, :, column] = self._by_weight(site, products)
        self._add_refreshes(flips, refreshes)
        return flips, weights

    def _backward(self, value: Tensor, keep: bool = False) -> dict[str, Tensor]:
        self.products = {}
        torch.autograd.grad(value, self.leaf, retain_graph=keep, allow_unused=True)
        return self.products

    def _by_half(self, products: Tensor, batch_size: int) -> Products:
        """From [l, j, directions, halves * batch] to `Products` with the columns directions * batch."""
        halves = products.unflatten(-1, (-1, batch_size)).transpose(2, 3).flatten(3)
        by_half: Products = halves.cpu().double().numpy()
        return by_half

    def _flips(self, site: str, products: Products) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """First-order change by every gate choosing the other way, [steps, columns]; and the part of it at later steps,
        wherever the fresh value is known, [whole batch or unguided half, steps, columns]."""
        total = np.zeros((self.num_steps, products.shape[-1]))
        refreshes = np.zeros((2, *total.shape))
        for half, computed, used in self._halves(site, products):
            is_unguided = half < products.shape[2] - 1
            mine = products[:, :, half]
            before = {i: self._used(site, i, computed, mine) for i in used}
            for step in sorted(self.fresh[site].keys() - {0}):
                other = [j for j in computed if j != step] if step in computed else sorted({*computed, step})
                changes = {
                    i: self._used(site, i, other, mine) - before[i] for i in self._affected(step, used, computed)
                }
                here, later = changes.pop(step, 0.0), sum(changes.values())
                if not (is_unguided and self.is_half[step]):
                    total[step] += here + later if step in before else 0.0
                    refreshes[0, step] += later
                if is_unguided:
                    refreshes[1, step] += later
        return total, refreshes

    def _add_refreshes(self, flips: NDArray[np.float64], refreshes: NDArray[np.float64]) -> None:
        """Adds to the effects of flips [steps, sites, columns] what follows from the sites behind them being computed
        at that step, or no longer: later steps find other values of theirs in the cache."""
        columns = {site: column for column, site in enumerate(self.sites)}
        for step in range(1, self.num_steps):
            flip = Flips(self.graph, self.run[step], {site for site, row in self.rows.items() if row[step] != COMPUTE})
            for column, site in enumerate(self.sites):
                if site == self.graph.guidance:
                    behind = [columns[name] for name in self.routed & self.run[step]]
                    flips[step, column] += refreshes[1, step, behind].sum(0)
                elif site in self.run[step] or site in self.load[step]:
                    behind = [columns[name] for name in flip.changes(site) if name in columns]
                    if behind:
                        flips[step, column] += refreshes[0, step, behind].sum(0)

    def _by_weight(self, site: str, products: Products) -> NDArray[np.float64]:
        """Derivatives by the weights, [2, steps, columns]: what is filled in is linear in them too."""
        units = torch.eye(len(FITTED.parameters))
        total = np.zeros((len(units), self.num_steps, products.shape[-1]))
        for half, computed, used in self._halves(site, products):
            for step in used:
                if step in self.computed[site]:
                    continue
                sources = _latest(computed, step)
                for index, unit in enumerate(units):
                    terms = zip(fitted_coefficients(unit, step, sources), sources, strict=True)
                    total[index, step] += sum(c * products[step, j, half] for c, j in terms)
        return total

    def _halves(self, site: str, products: Products) -> Iterator[tuple[int, list[int], list[int]]]:
        """Per half of the batch: its index, the steps at which it was computed, and those at which it is used. The
        unguided half is as old as the last full step."""
        used = [i for i in range(1, self.num_steps) if site in self.load[i] or i in self.computed[site]]
        for half in range(products.shape[2]):
            in_full = half < products.shape[2] - 1
            yield half, [j for j in self.computed[site] if not (in_full and self.is_half[j])], used

    @staticmethod
    def _affected(step: int, used: Sequence[int], computed: Sequence[int]) -> Iterator[int]:
        """Steps at which another choice at `step` may make a difference: until enough has been computed anew."""
        for later in used:
            if later >= step and sum(step < j < later for j in computed) < REACH - 1:
                yield later

    def _used(self, site: str, step: int, computed: Sequence[int], products: NDArray[np.float64]) -> Any:
        """The product of the gradient with what is used at a step, [columns]."""
        if step in computed:
            return products[step, step]
        sources = _latest(computed, step)
        return sum(c * products[step, j] for c, j in zip(self._coefficients(site, step, sources), sources, strict=True))


def fitted_coefficients(weights: Tensor, step: int, sources: Sequence[int]) -> tuple[float, ...]:
    """Of the values computed at the steps `sources`, the latest first, where `step` is filled in with `weights` [2]."""
    parameters = {
        parameter.name: weight.double().expand(step + 1)
        for parameter, weight in zip(FITTED.parameters, weights, strict=True)
    }
    return tuple(float(c) for c in FITTED.fill([step - j for j in sources], step, parameters).coefficients)


def _latest(computed: Sequence[int], step: int) -> tuple[int, ...]:
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
