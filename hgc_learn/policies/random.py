"""Chance: what a schedule is worth that knows nothing but its budget."""

from __future__ import annotations

import bisect
import random as chance

from hgc_learn.models.macs import BudgetError
from hgc_learn.plan import COMPUTE, row_of
from hgc_learn.policies.registry import register
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import select_sites

SITES = "*s.?:out unet:eps"  # of the UNet and the ControlNets: what a layer puts out, and the prediction


@register(
    "random",
    paper="a control: no knowledge of model or sampler",
    # The first step computes all, whatever the budget.
    grid=lambda setting: {
        "budget": [i / 20 for i in range(2, 20) if i * setting.num_steps > 20],
        "seed": range(3),
        "sites": (SITES,),
    },
)
def random(setting: Setting, *, budget: float = 0.5, seed: int = 0, sites: str = SITES) -> Draft:
    """Computes each site at each step with one probability, the highest that the budget allows.

    Args:
        budget: fraction of the full MACs to keep, at most.
        seed: of the draw.
        sites: glob patterns of the sites, separated by spaces.
    """
    if not 0 < budget <= 1:
        raise BudgetError(f"budget is {budget:g}; it is a fraction of the full MACs, above 0 and at most 1.")
    names = select_sites(setting.graph, sites.split())
    generator = chance.Random(seed)
    draws = {name: [generator.random() for _ in range(setting.num_steps)] for name in names}

    def draft(keep: float) -> Draft:
        rows = {}
        for name, values in draws.items():
            rows[name] = COMPUTE + row_of(u < keep for u in values[1:])
        return Draft(rows)

    # More computed sites never run fewer nodes, so the kept MACs grow with the probability.
    probabilities = [i / 1000 for i in range(1001)]
    index = bisect.bisect_right(probabilities, budget, key=lambda keep: setting.kept(draft(keep)))
    if index == 0:
        least = setting.kept(draft(0.0))
        why = "the first step computes everything" if least * setting.num_steps < 1.001 else "more sites reach further"
        raise BudgetError(f"budget is {budget:g}; with {sites!r} the least is {least:.3f}: {why}.")
    return draft(probabilities[index - 1])
