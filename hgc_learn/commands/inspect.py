"""Print what a schedule file holds, or refuse it (exit status 2) with the reason.

The file is read strictly; nothing in it is run and no model is needed.

  hgc_learn inspect hgc_schedule.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hgc_learn.schedule import HGCSchedule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a schedule file, a folder or hub id with one")


def run(args: argparse.Namespace) -> None:
    from hgc_learn.files import printable
    from hgc_learn.schedule import HGCSchedule

    schedule = HGCSchedule.from_pretrained(args.file)
    print("\n".join(printable(line) for line in describe(schedule)))


def describe(schedule: HGCSchedule) -> list[str]:
    """The lines that `inspect` prints."""
    steps = schedule.num_inference_steps
    guided = "with" if schedule.guidance_scale > 1 else "without"
    timesteps = " ".join(f"{t:g}" for t in schedule.timesteps)
    lines = [
        f"setting    {schedule.scheduler}, {steps} steps, {schedule.height}x{schedule.width} pixels, "
        f"guidance scale {schedule.guidance_scale:g} ({guided} guidance)",
        f"timesteps  {timesteps}",
    ]
    lines += _section("model", {name: f"architecture {hash_}" for name, hash_ in schedule.model.architecture.items()})
    lines += _section("producer", schedule.producer)
    lines += _section("macs", {name: f"{value:.4e}" for name, value in schedule.macs.items()})
    lines += [f"{'':<11}{name}: {share}" for name, share in schedule.reductions().items()]
    lines += _section("fidelity", schedule.fidelity)
    kinds = Counter(site.rpartition(":")[2] for site in schedule.sites)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none: every step computes all"
    columns = {tuple(row[i] for row in schedule.sites.values()) for i in range(steps)}
    lines += [f"sites      {counts}; {len(columns)} distinct steps"]
    return lines + _site_table(schedule.sites, steps)


def _section(title: str, entries: dict[str, Any]) -> list[str]:
    return [f"{'' if i else title:<11}{name}: {value}" for i, (name, value) in enumerate(entries.items())]


def _site_table(sites: dict[str, str], steps: int) -> list[str]:
    """One row per site: what it does at each step, how often it is computed, its longest reuse in a row."""
    if not sites:
        return []
    width = max(len(site) for site in sites)
    ruler = "".join(f"{i:<5}" for i in range(0, steps, 5))[: max(steps, 5)]
    lines = [
        "",
        "C compute, - reuse; reuse = the longest run of reused steps",
        f"{'step':<{width}}  {ruler:<{steps}}  computed  reuse",
    ]
    for site, row in sites.items():
        longest = max(map(len, row.split("C")))
        lines.append(f"{site:<{width}}  {row}  {row.count('C'):>8}  {longest:>5}")
    return lines
