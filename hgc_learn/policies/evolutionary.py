"""A genetic search over schedules, judged by real rollouts: no gradients, no model of what caching does."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hgc_learn.models.graph import Graph
from hgc_learn.models.macs import BudgetError
from hgc_learn.plan import COMPUTE, live_step
from hgc_learn.policies.registry import register
from hgc_learn.predictors import PREDICTORS
from hgc_learn.rollouts import mean_psnr
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import decoder_inputs, encoder_outputs, list_sites
from hgc_learn.spacing import first_fulls, full_steps

if TYPE_CHECKING:
    from hgc_learn.genetic import Genes

FORECASTS = [PREDICTORS[name].code for name in ("hold", "linear", "taylor2", "ab2")]
"""Codes of the predictors of the prediction."""

LINES = FORECASTS[:2]
"""Codes of those of the decoder's features."""

CLEARLY = 1.0
"""dB below the worst survivor on the first batch, with which a schedule is dropped."""

Alternative = Mapping[str, str]
"""What a gene does at a step: the codes of the sites that it reuses."""


@register(
    "evolutionary",
    paper="in the manner of ECAD (arXiv 2506.15682): a genetic algorithm on measured quality",
    grid={"budget": (0.5, 0.37, 0.25), "rank": tuple(range(16))},
    searches=True,
)
def evolutionary(
    setting: Setting,
    *,
    budget: float = 0.5,
    population: int = 32,
    generations: int = 30,
    seed: int = 0,
    rank: int = 0,
) -> Draft:
    """Evolves, per step, where the decoder starts from and whether ControlNet, guidance and attention are reused.

    Maximises the mean PSNR of the pictures to the uncached ones, in real rollouts. It starts from the best, on the
    first batch of samples, of all rules that do one thing at all steps but full ones at the start and at regular
    intervals, at the budget. What has been tried is kept beside the schedule until that is written: interrupted, the
    same command goes on.

    Args:
        budget: fraction of the full MACs that must not be exceeded.
        population: schedules that survive a generation, and those tried in it: on all samples, but for those that are
            clearly worse than the survivors on the first batch.
        generations: after the one that the rules are.
        seed: of the search; the same seed finds the same schedule.
        rank: of the schedule among those of the last generation, from 0, the best on the samples that it was judged on;
            another one may be better on others.
    """
    setting.need_samples("evolutionary")
    encoding = Encoding(setting)
    if not encoding.least_kept() <= budget <= 1:
        raise BudgetError(f"budget is {budget}; with this model it can be {encoding.least_kept():.3f} to 1.")
    if setting.num_steps < 2:
        raise ValueError("A run of one step computes everything: there is nothing to search.")
    if population < 2 or generations < 0:
        raise ValueError(f"population is {population}, generations {generations}; at least 2 and 0 are needed.")
    if not 0 <= rank < population:
        raise ValueError(f"rank is {rank}; it can be 0 to {population - 1}, for the population is {population}.")
    key = ("evolutionary", budget, population, generations, seed)
    last = setting.once(key, lambda: _evolve(encoding, budget, population, generations, seed))
    if rank >= len(last):  # few rules, and no generation after them
        raise ValueError(f"rank is {rank}; the last generation has {len(last)} schedules.")
    return encoding.draft(last[rank])


def _evolve(encoding: Encoding, budget: float, population: int, generations: int, seed: int) -> list[Genes]:
    """The last generation, the best first."""
    from rich.progress import Progress

    from hgc_learn.genetic import search

    starts = rules(encoding, budget)
    num_trials = len(starts) + population * generations
    race = Race(encoding, population)
    with Progress() as bar:
        task = bar.add_task("evolving", total=num_trials)

        def first(genes: Genes) -> float:
            bar.update(task, advance=1, description="trying rules")
            return race.first(genes)

        def error(genes: Genes) -> float:
            psnr = race.psnr(genes)
            bar.update(task, advance=1, description=f"evolving, {race.survivors[0][0]:.2f} dB")
            return -psnr

        best = sorted(starts, key=first, reverse=True)[:population]
        bar.update(task, completed=len(starts) - len(best))
        last = search(
            error,
            encoding.kept,
            encoding.canonical,
            best,
            encoding.sizes,
            budget=budget,
            population=population,
            generations=generations,
            seed=seed,
        )
        bar.update(task, completed=num_trials)
    return last


class Race:
    """Tries schedules on all samples but those that are clearly worse than the survivors on the first batch of them.

    Attributes:
        survivors: PSNR on all samples and on the first batch, dB, of the best schedules so far, the best first.
    """

    def __init__(self, encoding: Encoding, population: int):
        self.encoding, self.population = encoding, population
        self.survivors: list[tuple[float, float]] = []

    def first(self, genes: Genes) -> float:
        return mean_psnr(self.encoding.setting, self.encoding.draft(genes), num_batches=1)

    def psnr(self, genes: Genes) -> float:
        """On all samples; where it is clearly below that of the worst survivor, as the first batch says."""
        first = self.first(genes)
        if len(self.survivors) == self.population:
            worst, worst_first = self.survivors[-1]
            if first < worst_first - CLEARLY:
                return worst + first - worst_first
        psnr = mean_psnr(self.encoding.setting, self.encoding.draft(genes))
        self.survivors = sorted([*self.survivors, (psnr, first)], reverse=True)[: self.population]
        return psnr


class Encoding:
    """Schedules as integers [steps - 1, genes]; the first step computes everything.

    Attributes:
        genes: by name, the alternatives of each gene, from the one that computes most to the one that does least.
    """

    def __init__(self, setting: Setting):
        self.setting = setting
        self.genes: dict[str, list[Alternative]] = {
            "trunk": self._by_cost(trunk_alternatives(setting.graph)),
            "control": [{}, *_held(setting.graph, ":control")],
            "guidance": [{}, *guidance_alternatives(setting)],
            "attn1": [{}, *_held(setting.graph, ".attn1:out")],
            "attn2": [{}, *_held(setting.graph, ".attn2:out")],
        }
        self.genes = {name: those for name, those in self.genes.items() if len(those) > 1}
        self.sizes = [len(alternatives) for alternatives in self.genes.values()]
        self.macs: dict[tuple[int, ...], int] = {}
        self.same: dict[tuple[int, ...], tuple[int, ...]] = {}

    def _by_cost(self, alternatives: Sequence[Alternative]) -> list[Alternative]:
        return sorted(alternatives, key=lambda reused: -self._macs(reused))

    def _macs(self, reused: Alternative) -> int:
        """MACs of a step per picture."""
        step = live_step(self.setting.graph, set(reused))
        samples = 1 if step.is_half else self.setting.num_halves
        return samples * sum(self.setting.costs[name].macs for name in step.run)

    def reused(self, step: Sequence[int]) -> dict[str, str]:
        """Sites that a step reuses, with their codes."""
        result: dict[str, str] = {}
        for alternatives, value in zip(self.genes.values(), step, strict=True):
            result.update(alternatives[value])
        output = self.setting.graph.output
        return {output: result[output]} if output in result else result

    def canonical(self, genes: Genes) -> Genes:
        """The same schedule with 0 wherever a gene makes no difference: where a step reuses the prediction, nothing
        else does."""
        return np.array([self._canonical(tuple(step)) for step in genes.tolist()])

    def _canonical(self, step: tuple[int, ...]) -> tuple[int, ...]:
        if step not in self.same:
            result = step
            for gene in range(len(step)):
                without = (*result[:gene], 0, *result[gene + 1 :])
                result = without if self._does(without) == self._does(step) else result
            self.same[step] = result
        return self.same[step]

    def _does(self, step: Sequence[int]) -> object:
        """What a step runs, and what it loads how."""
        reused = self.reused(step)
        live = live_step(self.setting.graph, set(reused))
        return live, [reused[site] for site in live.load]

    def draft(self, genes: Genes) -> Draft:
        steps: list[dict[str, str]] = [{}, *(self.reused(step) for step in genes.tolist())]
        sites = dict.fromkeys(site for step in steps for site in step)
        return Draft({site: "".join(step.get(site, COMPUTE) for step in steps) for site in sites})

    def kept(self, genes: Genes) -> float:
        """Fraction of the full MACs."""
        total = self._step_macs((0,) * len(self.sizes))
        full = total * (len(genes) + 1)
        for step in genes.tolist():
            total += self._step_macs(tuple(step))
        return total / full

    def _step_macs(self, step: tuple[int, ...]) -> int:
        if step not in self.macs:
            self.macs[step] = self._macs(self.reused(step))
        return self.macs[step]

    def least_kept(self) -> float:
        """Of all schedules: what the first step takes."""
        return 1 / self.setting.num_steps


def trunk_alternatives(graph: Graph) -> list[Alternative]:
    """Compute all; hold the encoder (Faster-Diffusion); hold the decoder up to one of its layers (DeepCache), or take
    it from the line through its last two values; hold or forecast the prediction."""
    encoder = [site for site in encoder_outputs(graph) if not site.endswith(":control")]
    deeper = [dict.fromkeys(sites, code) for sites in decoder_inputs(graph) if len(sites) == 1 for code in LINES]
    return [{}, dict.fromkeys(encoder, "-"), *deeper, *({graph.output: code} for code in FORECASTS)]


def guidance_alternatives(setting: Setting) -> list[Alternative]:
    """Hold the guidance difference, extrapolate it, or drop it."""
    return [{setting.graph.guidance: code} for code in "-10"] if setting.is_guided else []


def _held(graph: Graph, suffix: str) -> list[Alternative]:
    """One alternative that holds all sites with a suffix, if there are any."""
    sites = [site for site in list_sites(graph) if site.endswith(suffix)]
    return [dict.fromkeys(sites, "-")] if sites else []


def rules(encoding: Encoding, budget: float) -> list[Genes]:
    """One alternative at every step but full ones, as many of them as the budget allows: a number of them at the start,
    the others at whole intervals or spread evenly; for every combination of trunk, control and guidance (held)."""
    num_steps = encoding.setting.num_steps
    whole = [float(interval) for interval in range(1, num_steps + 1)]
    spread = [num_steps / number for number in range(num_steps, 0, -1)]
    choices = {"trunk": encoding.sizes[0], "control": 2, "guidance": 2}
    combinations = itertools.product(*(range(choices.get(name, 1)) for name in encoding.genes))
    found: dict[str, Genes] = {}
    for reused, first_full in itertools.product(combinations, first_fulls(num_steps)):
        for intervals in (whole, spread):
            tried = (
                encoding.canonical(_spaced(reused, full_steps(num_steps, interval, first_full), num_steps))
                for interval in intervals
            )
            within = (genes for genes in tried if encoding.kept(genes) <= budget)
            for genes in itertools.islice(within, 1):
                found.setdefault(str(encoding.draft(genes).sites), genes)
    return list(found.values())


def _spaced(reused: Sequence[int], full: Sequence[int], num_steps: int) -> Genes:
    return np.array([[0] * len(reused) if i in full else reused for i in range(1, num_steps)])
