"""What other choices would do to the outcome, pictures or final latents: of all gates and reaches at once, from a few
backward passes.

What a site gives at step l is linear in the values that it has freshly: sum_j A[l, j] * fresh_j, where A[l, l] = 1 if
it is computed, and A[l, j] are the coefficients of the fitted predictor if it is filled in. One backward pass gives the
products <gradient_l, fresh_j> for all l and j (`probe`). The first-order effect of any other row of the schedule is
the sum of its change of A times these products, later steps that look at the same values included; the derivatives by
the coefficients are such products themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hgc_learn.plan import COMPUTE, Flips
from hgc_learn.predictors.fitted import line
from hgc_learn.training.distributed import own_noise
from hgc_learn.training.probe import NUM_WATCHED, ProbedForwards, latest

LEAST = 0.1
"""A sample's squared error is never expected to fall to less than this share: directions are too few to tell."""

LEAST_ERROR = 1e-12
"""A schedule that is nearly exact is measured as if its squared error were this share of the outcome's power."""

Products = NDArray[np.float64]
"""[steps l, steps j, halves, columns]: <gradient of what is used at l, fresh value of j>."""


@dataclass(frozen=True)
class Effects:
    """First-order changes of the outcome, per sample, seen in a few directions: along the error itself
    (<error, change> / |error|^2) and along random ones (<v, change> / |error|, v ~ N(0, 1 / number of them)).

    For changes with amounts x_i, the relative change of a sample's squared error is to second order
    2 sum_i x_i along_error_i + sum over directions of (sum_i x_i across_i)^2.

    Attributes:
        errors: mean squared error of the outcome [batch].
        flips: of every gate choosing the other way, float64 [directions, batch, steps, sites]; 0 where the site is not
            live. The first direction is the error's.
        reach: of adding 1 to a reach, float64 [directions, batch, steps, sites]; 0 where the site is not filled in.
    """

    errors: Tensor
    flips: Tensor
    reach: Tensor

    def of_each_flip(self) -> Tensor:
        """What each gate alone, if it chose the other way, would add to the mean log error, to second order, [steps,
        sites]."""
        relative = 1 + 2 * self.flips[0] + self.flips[1:].square().sum(0)
        return relative.clamp_min(LEAST).log().mean(0)

    def of_reach(self) -> Tensor:
        """The mean log error's derivatives by the reaches, [steps, sites]."""
        return 2 * self.reach[0].mean(0)


def measure_effects(
    forwards: ProbedForwards,
    generate: Callable[[], Tensor],
    target: Tensor,
    generator: torch.Generator,
    num_directions: int,
) -> Effects:
    """Runs the schedule that `forwards` is set to, and measures.

    Args:
        generate: runs the pipeline differentiably and returns the outcome, [batch, ...].
        target: the uncached pipeline's.
        generator: of the random directions.
        num_directions: how many of them.
    """
    forwards.install()
    try:
        with torch.enable_grad():
            outcome = generate()
        error = (outcome - target).detach()
        squared, power = (values.square().flatten(1).sum(1) for values in (error, target))
        scale = squared.maximum(LEAST_ERROR * power)
        # Directions so long overflow in float16, and are made longer afterwards.
        least = 1e-6 if forwards.pipe.unet.dtype == torch.float16 else LEAST_ERROR
        bounded = squared.maximum(least * power)
        length = bounded.view(-1, *[1] * (error.ndim - 1))
        directions = [error / length]
        for _ in range(num_directions):
            random = own_noise(error.shape, error, generator)
            directions.append(random / (length * num_directions).sqrt())
        seen = []
        for index, direction in enumerate(directions):
            seen.append(forwards.backward((direction * outcome).sum(), keep=index < num_directions))
    finally:
        forwards.uninstall()
    by_choice = Choices(forwards).by_choice(seen, len(error))
    forwards.forget()
    longer = (bounded / scale).double().cpu()
    longer = torch.stack([longer, *[longer.sqrt()] * num_directions])[..., None, None]
    flips, reach = (
        torch.from_numpy(values).permute(2, 0, 1).unflatten(0, longer.shape[:2]) * longer for values in by_choice
    )
    return Effects(squared / error[0].numel(), flips, reach)


class Choices:
    """First-order changes by all other choices at the schedule that has just been run.

    One thing is left out, for routers did not learn better with it (docs/recipe.md, what failed): a guidance
    difference is kept only where a full step computes the prediction, so that a flip of the prediction's gate gives
    later steps another difference, and a flip of the guidance gate beside a prediction that is filled in gives none.
    """

    def __init__(self, ran: ProbedForwards):
        self.ran = ran

    def by_choice(
        self, seen: Sequence[dict[str, Tensor]], batch_size: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """First-order changes, from the products of several backward passes, by every flip and by every reach, both
        [steps, sites, columns]; columns are directions * batch."""
        flips = np.zeros((self.ran.num_steps, len(self.ran.sites), len(seen) * batch_size))
        refreshes = np.zeros((2, *flips.shape))
        reach = np.zeros_like(flips)
        for column, site in enumerate(self.ran.sites):
            if site in seen[0]:
                products = self._by_half(torch.stack([products[site] for products in seen], dim=2), batch_size)
                flips[:, column], refreshes[:, :, column] = self._flips(site, products)
                reach[:, column] = self._by_reach(site, products)
        self._add_refreshes(flips, refreshes)
        return flips, reach

    def _by_half(self, products: Tensor, batch_size: int) -> Products:
        """From [l, j, directions, halves * batch] to `Products` with the columns directions * batch."""
        halves = products.unflatten(-1, (-1, batch_size)).transpose(2, 3).flatten(3)
        by_half: Products = halves.cpu().double().numpy()
        return by_half

    def _flips(self, site: str, products: Products) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """First-order change by every gate choosing the other way, [steps, columns]; and the part of it at later steps,
        wherever the fresh value is known, [whole batch or unguided half, steps, columns]."""
        total = np.zeros((self.ran.num_steps, products.shape[-1]))
        refreshes = np.zeros((2, *total.shape))
        for half, computed, used in self._halves(site, products):
            is_unguided = half < products.shape[2] - 1
            mine = products[:, :, half]
            before = {i: self._used(site, i, computed, mine) for i in used}
            for step in sorted(self.ran.fresh[site].keys() - {0}):
                other = [j for j in computed if j != step] if step in computed else sorted({*computed, step})
                changes = {
                    i: self._used(site, i, other, mine) - before[i] for i in self._affected(step, used, computed)
                }
                here, later = changes.pop(step, 0.0), sum(changes.values())
                if not (is_unguided and self.ran.is_half[step]):
                    total[step] += here + later if step in before else 0.0
                    refreshes[0, step] += later
                if is_unguided:
                    refreshes[1, step] += later
        return total, refreshes

    def _add_refreshes(self, flips: NDArray[np.float64], refreshes: NDArray[np.float64]) -> None:
        """Adds to the effects of flips [steps, sites, columns] what follows from the sites behind them being computed
        at that step, or no longer: later steps find other values of theirs in the cache."""
        columns = {site: column for column, site in enumerate(self.ran.sites)}
        for step in range(1, self.ran.num_steps):
            reused = {site for site, row in self.ran.rows.items() if row[step] != COMPUTE}
            flip = Flips(self.ran.graph, self.ran.run[step], reused)
            for column, site in enumerate(self.ran.sites):
                if site == self.ran.graph.guidance:
                    behind = [columns[name] for name in self.ran.routed & self.ran.run[step]]
                    flips[step, column] += refreshes[1, step, behind].sum(0)
                elif site in self.ran.run[step] or site in self.ran.load[step]:
                    behind = [columns[name] for name in flip.changes(site) if name in columns]
                    if behind:
                        flips[step, column] += refreshes[0, step, behind].sum(0)

    def _by_reach(self, site: str, products: Products) -> NDArray[np.float64]:
        """Derivatives by the reaches, [steps, columns]: what is filled in is linear in them too."""
        total = np.zeros((self.ran.num_steps, products.shape[-1]))
        for half, computed, used in self._halves(site, products):
            for step in used:
                if step in self.ran.computed[site]:
                    continue
                sources = latest(computed, step)
                slope = line([step - j for j in sources], scale=0.0, reach=1.0).coefficients
                total[step] += sum(c * products[step, j, half] for c, j in zip(slope, sources, strict=True))
        return total

    def _halves(self, site: str, products: Products) -> Iterator[tuple[int, list[int], list[int]]]:
        """Per half of the batch: its index, the steps at which it was computed, and those at which it is used. The
        unguided half is as old as the last full step."""
        steps = range(1, self.ran.num_steps)
        used = [i for i in steps if site in self.ran.load[i] or i in self.ran.computed[site]]
        for half in range(products.shape[2]):
            in_full = half < products.shape[2] - 1
            yield half, [j for j in self.ran.computed[site] if not (in_full and self.ran.is_half[j])], used

    @staticmethod
    def _affected(step: int, used: Sequence[int], computed: Sequence[int]) -> Iterator[int]:
        """Steps at which another choice at `step` may make a difference: until enough has been computed anew."""
        for later in used:
            if later >= step and sum(step < j < later for j in computed) < NUM_WATCHED - 1:
                yield later

    def _used(self, site: str, step: int, computed: Sequence[int], products: NDArray[np.float64]) -> Any:
        """The product of the gradient with what is used at a step, [columns]."""
        if step in computed:
            return products[step, step]
        sources = latest(computed, step)
        terms = zip(self.ran.coefficients_of(site, step, sources), sources, strict=True)
        return sum(c * products[step, j] for c, j in terms)
