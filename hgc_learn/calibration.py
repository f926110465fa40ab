"""What the policies that measure look at: how sites move along the uncached trajectory.

A site's values over a run are summed up by the L1 distances between any two steps and, per channel, by the Gram matrix
over steps. Every predictor is linear in computed values, so its squared error at any step, from any earlier steps,
follows from the Gram matrix alone: histories are kept for the batch at hand only, statistics for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hgc_learn.models import ops
from hgc_learn.models.graph import Graph, build_graph
from hgc_learn.plan import StepPlan
from hgc_learn.runtime.forwards import RoutedForwards
from hgc_learn.runtime.program import compile_program
from hgc_learn.sampling import generate
from hgc_learn.setting import Setting

MAX_HISTORY_BYTES = 4 * 2**30
"""Sites are measured together as long as their values over a run fit in here; the rest takes another run."""

T = TypeVar("T")


@dataclass
class SiteStatistics:
    """One site over the steps of a run, summed over samples (the halves of a guided pair count as two).

    Attributes:
        l1_distance: |F_i - F_j|_1, float64 [steps, steps].
        l1_norm: |F_i|_1, float64 [steps].
        gram: sum of F_i F_j over samples and positions, float64 [channels, steps, steps].
        total: sum of F_i over samples and positions, float64 [channels, steps].
        count: number of values per channel and step.
    """

    l1_distance: Tensor
    l1_norm: Tensor
    gram: Tensor
    total: Tensor
    count: int

    @classmethod
    def of(cls, history: Tensor) -> SiteStatistics:
        """Of one batch's values [steps, channels, values per channel]."""
        history = history.double()
        flat = history.flatten(1)
        by_channel = history.transpose(0, 1)
        return cls(
            l1_distance=torch.cdist(flat, flat, p=1).cpu(),
            l1_norm=flat.abs().sum(1).cpu(),
            gram=(by_channel @ by_channel.mT).cpu(),
            total=by_channel.sum(2).cpu(),
            count=history.shape[2],
        )

    def __add__(self, other: SiteStatistics) -> SiteStatistics:
        return SiteStatistics(
            self.l1_distance + other.l1_distance,
            self.l1_norm + other.l1_norm,
            self.gram + other.gram,
            self.total + other.total,
            self.count + other.count,
        )

    def change(self) -> Tensor:
        """Relative L1 error of having F_i at step j, |F_i - F_j|_1 / |F_j|_1: float64 [steps i, steps j]."""
        return self.l1_distance / self.l1_norm.clamp_min(1e-30)

    def squared_error(self, step: int, fill: Mapping[int, float]) -> Tensor:
        """Per channel, |F_step - sum_j fill[j] F_j|^2: float64 [channels]."""
        weights = torch.zeros(self.gram.shape[1], dtype=torch.float64)
        weights[step] = 1.0
        for j, coefficient in fill.items():
            weights[j] -= coefficient
        return (self.gram @ weights @ weights).clamp_min(0.0)


def site_statistics(setting: Setting, sites: Sequence[str]) -> dict[str, SiteStatistics]:
    """Statistics of sites over the setting's samples; those known from before are not measured again."""
    known: dict[str, SiteStatistics] = setting.memo.setdefault("site_statistics", {})
    missing = [site for site in sites if site not in known]
    for group in _groups_that_fit(setting, missing):
        measured: dict[str, SiteStatistics] = {}  # known when all samples have been seen
        for batch in progress(setting.batches, f"calibrating {len(group)} sites"):
            for site, history in _histories(setting, group, batch).items():
                statistics = SiteStatistics.of(history)
                measured[site] = measured[site] + statistics if site in measured else statistics
        known.update(measured)
    return {site: known[site] for site in sites}


def _groups_that_fit(setting: Setting, sites: Sequence[str]) -> Iterator[list[str]]:
    largest_batch = max(len(batch["seed"]) for batch in setting.batches)
    values = setting.num_steps * setting.num_halves * largest_batch
    group: list[str] = []
    num_bytes = 0
    for site in sites:
        site_bytes = values * setting.costs[site].numel * setting.pipe.unet.dtype.itemsize
        if group and num_bytes + site_bytes > MAX_HISTORY_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append(site)
        num_bytes += site_bytes
    if group:
        yield group


def _histories(setting: Setting, sites: Sequence[str], batch: dict[str, Any]) -> dict[str, Tensor]:
    """Per site, its values over an uncached run: [steps, channels, values per channel]."""
    kept: dict[str, list[Tensor]] = {site: [] for site in sites}

    def keep(site: str, step: int, value: Tensor) -> None:
        channels_first = value.movedim(1 if value.ndim == 4 else -1, 0)
        kept[site].append(channels_first.flatten(1).clone())

    graph = build_graph(setting.pipe.unet, getattr(setting.pipe, "controlnet", None))
    forwards = ObservedForwards(setting.pipe, graph, setting.num_steps, sites, keep)
    forwards.install()
    try:
        generate(setting.pipe, setting.sampling, batch)
    finally:
        forwards.uninstall()
    return {site: torch.stack(kept.pop(site)) for site in sites}  # one after the other: they are large


class ObservedForwards(RoutedForwards):
    """Runs every node and shows the values of `sites` as they are made: `visit(site, step, value)`."""

    def __init__(
        self,
        pipe: Any,
        graph: Graph,
        num_steps: int,
        sites: Iterable[str],
        visit: Callable[[str, int, Tensor], None],
    ):
        super().__init__(pipe, graph, num_steps)
        self.sites, self.visit = set(sites), visit
        full = StepPlan(tuple(name for name in graph.nodes if name != graph.guidance), ())
        self.programs = {model: compile_program(graph, full, model) for model in self.models}

    def execute(self, model: str, step: int, call: ops.Call, given: dict[str, Tensor]) -> dict[str, Tensor]:
        for op in self.programs[model].ops:
            given[op.name] = op.run(call, *[given[name] for name in op.inputs])
            if op.name in self.sites:
                self.visit(op.name, step, given[op.name])
            for name in op.drop:
                del given[name]
        return given


def progress(items: Sequence[T], description: str) -> Iterable[T]:
    """The items, with a bar on the terminal."""
    from rich.progress import track

    return track(items, description=description)
