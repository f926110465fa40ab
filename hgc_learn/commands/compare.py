"""Compare policies at equal compute on the teacher of a configuration, the knobs of every one tuned alike.

Cells (policy x sampler x budget) that are done are not run again: interrupt it and run the same command to go on.
Those of other weights than the teacher's, or judged by other settings, are refused. Two processes with one thread each
(OMP_NUM_THREADS=1) share the work. Then the report is written: DIR/NAME.json, DIR/NAME.md, DIR/pareto.png and
DIR/grid.png. Run it from the root of the repository.

  hgc_learn compare --config configs/compare/demo.yaml
  hgc_learn compare --config configs/compare/demo.yaml --policies uniform -- --output=runs/compare --report=runs/compare
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="what is compared")
    parser.add_argument("--samplers", nargs="+", metavar="NAME", help="only these samplers of the configuration")
    parser.add_argument("--policies", nargs="+", metavar="NAME", help="only these policies")
    parser.add_argument("--budgets", nargs="+", type=float, metavar="B", help="only these budgets")
    parser.add_argument(
        "--redo", action="store_true", help="run the selected cells again; a second process goes without"
    )
    parser.add_argument(
        "--timing", action="store_true", help="measure wall-clock times of finished cells; leave the machine alone"
    )
    parser.add_argument("--report_only", action="store_true", help="write the report from what is there")
    parser.add_argument(
        "overrides", nargs="*", metavar="-- --KEY=VALUE", help="other values for the configuration, after --"
    )


def run(args: argparse.Namespace) -> None:
    from hgc_learn.comparison.cells import Selection
    from hgc_learn.comparison.config import read_config
    from hgc_learn.comparison.report import write_report
    from hgc_learn.comparison.run import run_comparison
    from hgc_learn.comparison.timing import time_cells

    config = read_config(args.config, args.overrides)
    selection = Selection.of(config, args.samplers, args.policies, args.budgets)
    if args.redo and (args.timing or args.report_only):
        raise ValueError("--redo runs cells again; --timing and --report_only run none. Give one of the three.")
    if args.timing:
        time_cells(config, selection)
    elif not args.report_only:
        run_comparison(config, selection, redo=args.redo)
    write_report(config, command=f"python -m hgc_learn compare --config {args.config}")
