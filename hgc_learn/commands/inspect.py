"""Print what a schedule file holds, or refuse it (exit status 2) with the reason.

The file is read strictly; nothing in it is run and no model is needed. With the model that it was made for (--arch or
--model), sites that nothing reads at a step are shown as such, and what every step keeps of a full one's MACs.

  hgc_learn inspect hgc_schedule.json
  hgc_learn inspect hgc_schedule.json --model path/to/pipeline
"""

from __future__ import annotations

import argparse
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any

from hgc_learn.commands import add_architecture, named_architecture

if TYPE_CHECKING:
    from hgc_learn.models.architectures import Architecture
    from hgc_learn.schedule import HGCSchedule

DEAD = "."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a schedule file, a folder or hub id with one")
    add_architecture(parser, required=False)


def run(args: argparse.Namespace) -> None:
    from hgc_learn.files import printable
    from hgc_learn.schedule import HGCSchedule

    schedule = HGCSchedule.from_pretrained(args.file)
    architecture = named_architecture(args) if args.arch or args.model or args.controlnet_model else None
    print("\n".join(printable(line) for line in describe(schedule, architecture)))


def describe(schedule: HGCSchedule, architecture: Architecture | None = None) -> list[str]:
    """The lines that `inspect` prints.

    Raises:
        ValueError: the schedule is not for this architecture.
    """
    from hgc_learn.plan import COMPUTE

    steps = schedule.num_steps
    guided = "with" if schedule.guidance_scale > 1 else "without"
    timesteps = " ".join(f"{t:g}" for t in schedule.timesteps)
    lines = [
        f"setting    {schedule.scheduler}, {steps} steps, {schedule.height}x{schedule.width} pixels, "
        f"guidance scale {schedule.guidance_scale:g} ({guided} guidance)",
        f"timesteps  {timesteps}",
        *_scheduler(schedule.scheduler_config),
    ]
    lines += _section("model", {name: f"architecture {hash_}" for name, hash_ in schedule.model.architecture.items()})
    lines += _section("producer", schedule.producer)
    lines += _section("macs", {name: f"{value:.4e}" for name, value in schedule.macs.items()})
    lines += [f"{'':<11}{name}: {share}" for name, share in schedule.reductions().items()]
    lines += _section("fidelity", schedule.fidelity)
    kinds = Counter(site.rpartition(":")[2] for site in schedule.sites)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none: every step computes all"
    columns = {tuple(row[i] == COMPUTE for row in schedule.sites.values()) for i in range(steps)}
    lines += [f"sites      {counts}; {len(columns)} different steps"]
    if architecture is None:
        return lines + _site_table(schedule.sites, steps)
    sites, shares = _with_model(schedule, architecture)
    lines += _section("kept", {"per step": " ".join(f"{share:.0%}" for share in shares)})
    return lines + _site_table(sites, steps)


def _scheduler(settings: dict[str, Any]) -> list[str]:
    """Settings of the scheduler, in as few lines as hold them."""
    text = ", ".join(f"{name}={value}" for name, value in settings.items())
    lines = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return [f"{'' if i else 'scheduler':<11}{line}" for i, line in enumerate(lines)]


def _with_model(schedule: HGCSchedule, architecture: Architecture) -> tuple[dict[str, str], list[float]]:
    """The rows with what nothing reads marked, and the share of a full step's MACs that every step keeps, attention
    matmuls not counted."""
    from hgc_learn.plan import compile_plan

    architecture.check(schedule)
    graph, costs = architecture.measure((schedule.height, schedule.width))
    plan = compile_plan(graph, schedule.sites, schedule.num_steps)
    needed = [{*step.run, *step.loaded, graph.guidance} for step in plan.steps]
    rows = {
        site: "".join(code if site in names else DEAD for code, names in zip(row, needed, strict=True))
        for site, row in schedule.sites.items()
    }
    per_step = plan.macs_per_step(costs, num_halves=graph.num_halves(schedule.guidance_scale))
    return rows, [macs / per_step[0] for macs in per_step]


def _section(title: str, entries: dict[str, Any]) -> list[str]:
    return [f"{'' if i else title:<11}{name}: {value}" for i, (name, value) in enumerate(entries.items())]


def _site_table(sites: dict[str, str], steps: int) -> list[str]:
    """One row per site: what it does at each step, how often it is computed, its longest reuse in a row."""
    from hgc_learn.plan import COMPUTE

    if not sites:
        return []
    width = max(len(site) for site in sites)
    ruler = "".join(f"{i:<5}" for i in range(0, steps, 5))[: max(steps, 5)]
    dead = f", {DEAD} needed by nothing" if any(DEAD in row for row in sites.values()) else ""
    lines = [
        "",
        f"C compute, all else reuse{dead}; reuse = the longest run of steps not computed",
        f"{'step':<{width}}  {ruler:<{steps}}  computed  reuse",
    ]
    for site, row in sites.items():
        longest = max(map(len, row.split(COMPUTE)))
        lines.append(f"{site:<{width}}  {row}  {row.count(COMPUTE):>8}  {longest:>5}")
    return lines
