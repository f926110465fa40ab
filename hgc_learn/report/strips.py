"""What runs at each step, as strips: one entry per step, for all, for each block and for each site."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hgc_learn.models.graph import Graph
from hgc_learn.models.macs import NodeCost
from hgc_learn.plan import Plan, compile_plan
from hgc_learn.predictors import BY_CODE
from hgc_learn.schedule import HGCSchedule
from hgc_learn.sites import list_sites

RUN, FILLED, DEAD = "RFD"
TOPS = {RUN: 0.0, FILLED: 0.55}  # told apart by height as well as by colour

_BLOCK = re.compile(r"(unet|controlnet)(\.nets\.\d+)?(\.(down|up)_blocks\.\d+|\.mid_block|\.controlnet_\w+)?")


@dataclass
class Strip:
    """One row of the page.

    Attributes:
        name: of the site or block.
        part: the module whose MACs are counted.
        full: MACs of a step that computes all of it.
        macs: per step, those that run.
        states: per step `R` runs, `F` filled in, `D` not needed; empty for blocks.
        fills: per step, how it is filled in, or "".
        sites: of a block, theirs.
    """

    name: str
    part: str
    full: int
    macs: list[int]
    states: str = ""
    fills: list[str] = field(default_factory=list)
    sites: list[Strip] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For the page's script."""
        return {"name": self.name, "part": self.part, "full": self.full, "macs": self.macs, "states": self.states} | (
            {"fills": self.fills} if self.states else {}
        )

    @property
    def bars(self) -> str:
        """SVG path of one bar per step, in a box of steps x 1."""
        shares = [macs / self.full if self.full else 0.0 for macs in self.macs]
        return "".join(_cell(i, 1 - share) for i, share in enumerate(shares) if share)

    def marks(self, state: str) -> str:
        """SVG path of all steps with a state."""
        return "".join(_cell(i, TOPS[state]) for i, other in enumerate(self.states) if other == state)

    @property
    def words(self) -> str:
        """For those who do not see the strip."""
        counts = [self.states.count(state) for state in (RUN, FILLED, DEAD)]
        if not self.states:
            return f"{self.name}: {sum(self.macs) / max(1, self.full * len(self.macs)):.0%} of its MACs"
        return "{}: runs at {} steps, filled in at {}, not needed at {}".format(self.name, *counts)


def strips(schedule: HGCSchedule, graph: Graph, costs: Mapping[str, NodeCost]) -> tuple[Strip, list[Strip], Plan]:
    """All of the models, and their blocks in execution order with the sites of each; attention matmuls not counted.

    Raises:
        ValueError: a schedule that does not fit the models.
    """
    plan = compile_plan(graph, schedule.sites, schedule.num_steps)
    num_halves = graph.num_halves(schedule.guidance_scale)
    batch = [1 if step.is_half else num_halves for step in plan.steps]
    run = [set(step.run) for step in plan.steps]

    def strip(name: str, part: str, nodes: Iterable[str]) -> Strip:
        paid = {node: costs[node].macs for node in nodes if costs[node].macs}
        macs = [n * sum(paid[node] for node in paid.keys() & names) for n, names in zip(batch, run, strict=True)]
        return Strip(name, part, num_halves * sum(paid.values()), macs)

    members: dict[str, list[str]] = {}
    for node in graph.nodes:
        members.setdefault(_block(node), []).append(node)
    blocks = {name: strip(name, name, nodes) for name, nodes in members.items()}
    for site in list_sites(graph):
        part = site.partition(":")[0]
        row = strip(site, part, (node for node in graph.nodes if node.startswith((f"{part}.", f"{part}:"))))
        _fill(row, graph, plan)
        blocks[_block(site)].sites.append(row)
    total = strip("all", "all", graph.nodes)
    return total, [block for block in blocks.values() if block.full or block.sites], plan


def _fill(row: Strip, graph: Graph, plan: Plan) -> None:
    # The plan runs the node of the guidance difference where it is to be kept; both halves run besides.
    node = graph.output if row.name == graph.guidance else row.name
    for i, step in enumerate(plan.steps):
        load = next((load for load in step.load if load.site == row.name), None)
        row.states += FILLED if load else RUN if node in step.run else DEAD
        row.fills.append(_words(load.code, i, load.guided, load.unguided) if load else "")


def _words(code: str, step: int, guided: Sequence[int], unguided: Sequence[int]) -> str:
    text = f"{BY_CODE[code].name}, {step - guided[0]} steps old"
    if unguided and unguided[0] != guided[0]:
        text += f" (unguided half {step - unguided[0]})"
    return text.replace(" 1 steps", " 1 step")


def _cell(step: int, top: float) -> str:
    return f"M{step + 0.04:g} {top:.3g}h.92V1h-.92z"


def _block(node: str) -> str:
    match = _BLOCK.match(node)
    assert match is not None, node
    return match[0] if match[3] else f"{match[0]}, outside of blocks"
