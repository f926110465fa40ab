"""Where refining starts from: the router's schedule, or what a rule would write in the router's own vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from hgc_learn.hard import HardSchedule, hold_weights
from hgc_learn.policies.deepcache import num_branches, quadratic_steps, shallow_inputs
from hgc_learn.router import Router
from hgc_learn.setting import Setting


def rule_schedules(router: Router, setting: Setting, budget: float) -> list[HardSchedule]:
    """Full steps, as many as the budget allows, evenly spaced, denser early on, or all first and few later; at the
    others the prediction is filled in, or the decoder starts from one of its layers, with the ControlNet's residuals or
    without, held or extrapolated: hard schedules that differ."""
    found: dict[tuple[bytes, float], HardSchedule] = {}
    num_steps = router.num_steps
    for sites in _reused_together(router, setting):
        columns = [router.sites.index(site) for site in sites]
        for spacing in SPACINGS:
            for num_full in range(num_steps, 0, -1):
                compute = torch.ones(router.logits.shape, dtype=torch.bool)
                compute[:, columns] = False
                compute[spacing(num_steps, num_full)] = True
                if router.kept(compute) <= budget:
                    for reach in (0.0, 1.0):
                        weights = hold_weights(*compute.shape)
                        weights[1] = reach
                        key = compute.numpy().tobytes(), reach
                        found.setdefault(key, HardSchedule(compute, weights))
                    break
    return list(found.values())


def _reused_together(router: Router, setting: Setting) -> Iterator[list[str]]:
    graph, routed = setting.graph, set(router.sites)
    controls = [site for site in router.sites if site.endswith(":control")]
    layers = [shallow_inputs(graph, branch) for branch in range(num_branches(graph))]
    for sites in [[graph.output], *layers]:
        if routed.issuperset(sites):
            yield sites
            if controls and graph.output not in sites:
                yield [*sites, *(site for site in controls if site not in sites)]


def _evenly(num_steps: int, num_full: int) -> list[int]:
    return [i * num_steps // num_full for i in range(num_full)]


def _early(num_steps: int, num_full: int) -> list[int]:
    try:
        return quadratic_steps(num_steps, num_full, center=num_steps * 3 // 10, power=1.4)
    except ValueError:  # too many of them to be that dense
        return _evenly(num_steps, num_full)


def _first(num_steps: int, num_full: int, interval: int) -> list[int]:
    """All up to a step, from there on every interval-th."""
    for cutoff in range(num_full, 0, -1):
        steps = [*range(cutoff), *range(cutoff - 1 + interval, num_steps, interval)]
        if len(steps) <= num_full:
            return steps
    return _evenly(num_steps, num_full)


SPACINGS: tuple[Callable[[int, int], list[int]], ...] = (
    _evenly,
    _early,
    *(partial(_first, interval=interval) for interval in (2, 4, 8)),
)
