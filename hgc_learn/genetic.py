"""A genetic algorithm over schedules, with pymoo: steps are what parents exchange, and a budget holds throughout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.soo.nonconvex.ga import GA
from pymoo.core.crossover import Crossover
from pymoo.core.mutation import Mutation
from pymoo.core.problem import ElementwiseProblem

Genes = NDArray[np.int64]
"""[steps, genes]: the alternative that each gene has at each step; 0 computes most, the last one least."""


def search(
    error: Callable[[Genes], float],
    kept: Callable[[Genes], float],
    canonical: Callable[[Genes], Genes],
    starts: Sequence[Genes],
    sizes: Sequence[int],
    *,
    budget: float,
    population: int,
    generations: int,
    seed: int,
) -> list[Genes]:
    """Minimises `error` among genes with `kept` at most `budget`. Returns the last generation, the one with the least
    error first, which is never worse than the best of the starts.

    Args:
        canonical: one form of all genes that make the same schedule, of which no two survive.
        starts: where it begins, all within the budget; the best `population` of them survive.
        sizes: number of alternatives of each gene.
        generations: after the starts; each costs `population` evaluations.
    """
    shape = starts[0].shape
    problem = _Schedules(error, shape, sizes)
    vary = _Variation(kept, canonical, shape, sizes, budget)
    flat = np.stack([genes.ravel() for genes in starts])
    algorithm = GA(pop_size=population, sampling=flat, crossover=_StepCrossover(shape), mutation=vary)
    algorithm.setup(problem, termination=("n_gen", generations + 1), seed=seed, verbose=False)
    result = algorithm.run()
    last = sorted(result.pop, key=lambda individual: float(individual.F[0]))
    return [individual.X.reshape(shape).astype(np.int64) for individual in last]


class _Schedules(ElementwiseProblem):
    def __init__(self, error: Callable[[Genes], float], shape: tuple[int, ...], sizes: Sequence[int]):
        self.error, self.genes_shape = error, shape
        upper = np.tile(np.array(sizes) - 1, shape[0])
        super().__init__(n_var=upper.size, n_obj=1, xl=0, xu=upper, vtype=int)

    def _evaluate(self, x: NDArray[Any], out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        out["F"] = self.error(x.reshape(self.genes_shape))


class _StepCrossover(Crossover):
    """Two children that exchange whole steps: a stretch of the run, or any of them by chance."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__(n_parents=2, n_offsprings=2)
        self.genes_shape = shape

    def _do(self, problem: Any, X: NDArray[Any], *args: Any, random_state: Any = None, **kwargs: Any) -> NDArray[Any]:
        num_steps, num_genes = self.genes_shape
        children = X.copy()
        for mating in range(X.shape[1]):
            if random_state.random() < 0.5:
                first, last = np.sort(random_state.integers(0, num_steps + 1, size=2))
                exchanged = (np.arange(num_steps) >= first) & (np.arange(num_steps) < last)
            else:
                exchanged = random_state.random(num_steps) < 0.5
            mask = np.repeat(exchanged, num_genes)
            children[0, mating, mask], children[1, mating, mask] = X[1, mating, mask], X[0, mating, mask]
        return children


class _Variation(Mutation):
    """Changes a few genes or lets two steps change places, then spends the budget: first no more, then no less."""

    def __init__(
        self,
        kept: Callable[[Genes], float],
        canonical: Callable[[Genes], Genes],
        shape: tuple[int, ...],
        sizes: Sequence[int],
        budget: float,
    ):
        super().__init__()
        self.kept, self.canonical, self.genes_shape, self.sizes, self.budget = kept, canonical, shape, sizes, budget

    def _do(self, problem: Any, X: NDArray[Any], *args: Any, random_state: Any = None, **kwargs: Any) -> NDArray[Any]:
        return np.stack([self.vary(x.reshape(self.genes_shape).copy(), random_state).ravel() for x in X])

    def vary(self, genes: Genes, rng: np.random.Generator) -> Genes:
        num_steps, num_genes = genes.shape
        for _ in range(rng.poisson(2.0)):
            if rng.random() < 0.5:
                a, b = rng.integers(num_steps, size=2)
                genes[[a, b]] = genes[[b, a]]
            else:
                step, gene = int(rng.integers(num_steps)), int(rng.integers(num_genes))
                nearby = genes[step, gene] + rng.choice([-1, 1])  # alternatives are in the order of their cost
                anything = rng.integers(self.sizes[gene])
                genes[step, gene] = np.clip(nearby if rng.random() < 0.5 else anything, 0, self.sizes[gene] - 1)
        return self.canonical(self.spend(self.reduce(genes, rng), rng))

    def reduce(self, genes: Genes, rng: np.random.Generator) -> Genes:
        """Raises genes at random, where that saves something, until the budget is met."""
        kept = self.kept(genes)
        while kept > self.budget:
            step, gene = self._any(genes, rng, lambda value, size: value < size - 1)
            candidate = genes.copy()
            candidate[step, gene] = rng.integers(genes[step, gene] + 1, self.sizes[gene])
            if self.kept(candidate) < kept or rng.random() < 0.1:  # some save only together with others
                genes, kept = candidate, self.kept(candidate)
        return genes

    def spend(self, genes: Genes, rng: np.random.Generator, num_attempts: int = 16) -> Genes:
        """Lowers genes at random as long as the budget allows."""
        for _ in range(num_attempts):
            if not genes.any():
                break
            step, gene = self._any(genes, rng, lambda value, size: value > 0)
            candidate = genes.copy()
            candidate[step, gene] = rng.integers(0, genes[step, gene])
            if self.kept(genes) < self.kept(candidate) <= self.budget:
                genes = candidate
        return genes

    def _any(self, genes: Genes, rng: np.random.Generator, is_open: Callable[[Any, Any], Any]) -> tuple[int, int]:
        """A gene at random among those whose (value, number of alternatives) `is_open`."""
        step, gene = rng.choice(np.argwhere(is_open(genes, np.array(self.sizes)[None])))
        return int(step), int(gene)
