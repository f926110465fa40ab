"""The commands of `python -m hgc_learn`, one module each; here is what several of them share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hgc_learn.architectures import Architecture


def add_architecture(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds --arch and --model, of which one may be given."""
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--arch", metavar="NAME", help="a well-known architecture: sd15-controlnet, sdxl, ...")
    source.add_argument("--model", metavar="DIR", help="folder of a diffusers pipeline; only its configs are read")


def named_architecture(args: argparse.Namespace) -> Architecture:
    """The one that --arch or --model names.

    Raises:
        ValueError: an unknown name, or a folder that cannot be used.
    """
    from hgc_learn.architectures import build_architecture, load_architecture

    return build_architecture(args.arch) if args.arch else load_architecture(args.model)
