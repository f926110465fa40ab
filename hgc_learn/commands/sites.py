"""List the sites of a model: the tensors that a schedule may keep from an earlier step.

For each, the share of a full step's MACs that reusing it alone saves. The names are what `model.sites` in a training
configuration matches with glob patterns.

  hgc_learn sites --arch sd15-controlnet --match '*.attn2:out'
"""

from __future__ import annotations

import argparse

from hgc_learn.commands import add_architecture, named_architecture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_architecture(parser, required=True)
    parser.add_argument("--match", metavar="GLOB", nargs="+", default=["*"], help="only sites that match (default all)")


def run(args: argparse.Namespace) -> None:
    from hgc_learn.plan import live_step
    from hgc_learn.sites import select_sites

    architecture = named_architecture(args)
    graph, costs = architecture.measure()
    full = sum(cost.macs for cost in costs.values())
    for site in select_sites(graph, args.match):
        step = live_step(graph, {site})
        saved = 1 - sum(costs[name].macs for name in step.run) / full / (2 if step.is_half else 1)
        print(f"{saved:7.2%}  {site}")
