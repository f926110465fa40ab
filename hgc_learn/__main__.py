"""Learned cache schedules for diffusers ControlNet pipelines: the command line.

Every command is a module of `hgc_learn.commands` with a docstring (its help), `add_arguments(parser)` and
`run(args)`. Those modules import nothing heavy at the top, so that a command needs only what it uses.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

from hgc_learn import __version__
from hgc_learn.files import printable

COMMANDS = ["demo", "train", "export", "compare", "policies", "schedule", "macs", "sites", "inspect", "report", "bench"]


class _Parser(argparse.ArgumentParser):
    """Errors are one message, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `args.run` is the function to call."""
    description = (__doc__ or "").partition("\n")[0]
    parser = _Parser(prog="hgc_learn", description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        command: ModuleType = importlib.import_module(f"hgc_learn.commands.{name}")
        doc = command.__doc__ or ""
        subparser = subparsers.add_parser(
            name,
            help=doc.partition("\n")[0],
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""

    def run() -> None:
        args = build_parser().parse_args(argv)
        args.run(args)
        sys.stdout.flush()

    return guarded(run)


def guarded(run: Callable[[], object]) -> int:
    """Runs a program; returns the exit status: 0, 2 for what the user can put right (a ValueError or OSError, a package
    that is not installed), told in one line, or 130 if it was interrupted. With HGC_TRACEBACK=1 in the environment
    errors are raised: for those who look for one in their own module."""
    # Threads that wait by spinning starve each other when something else takes a core: some hundred times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # transformers warns of each image processor that it finds no torchvision for; none is used here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        run()
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as error:  # which says how to go on, if there is a way
        print(": ".join(["hgc_learn: interrupted", *map(str, error.args)]), file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "hgc_learn"):
            raise
        print(
            f"hgc_learn: this needs {package}, which is not installed: pip install '.[train,canny,policies]' "
            "brings all that any command needs.",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError) as error:
        if os.environ.get("HGC_TRACEBACK") == "1":
            raise
        print(f"hgc_learn: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
