"""How old the values are that schedules reuse: `python benchmarks/cache_ages.py FILE ...`.

The age of a value is the number of steps since it was computed, by liveness: what is not live at a step is not computed
there, whatever its row says. Only schedules of the demonstration teacher, whose graph it is read with.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from hgc_learn.__main__ import guarded
from hgc_learn.demo import TEACHER_DIR
from hgc_learn.models.architectures import load_architecture
from hgc_learn.models.graph import build_graph
from hgc_learn.plan import compile_plan
from hgc_learn.schedule import HGCSchedule
from hgc_learn.sites import to_lay_open


def ages(path: Path) -> dict[str, list[int]]:
    """By kind of site, the ages of all values that are loaded."""
    schedule = HGCSchedule.load(path)
    architecture = load_architecture(str(TEACHER_DIR))
    graph = build_graph(architecture.unet, architecture.controlnet, to_lay_open(schedule.sites))
    found: dict[str, list[int]] = defaultdict(list)
    for site, row in compile_plan(graph, schedule.sites, schedule.num_steps).ages().items():
        found[site.rpartition(":")[2]] += [age for age in row if age]
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="schedules")
    args = parser.parse_args()
    print("| schedule | kind | loads | mean age | oldest |\n|---|---|---|---|---|")
    for file in args.files:
        for kind, values in sorted(ages(file).items()):
            name = "/".join(file.parts[-3:]).removesuffix(".schedule.json")
            print(f"| {name} | {kind} | {len(values)} | {sum(values) / len(values):.1f} | {max(values)} |")


if __name__ == "__main__":
    sys.exit(guarded(main))
