"""List the policies: what writes schedules, with the paper that each comes from.

`hgc_learn schedule POLICY --help` shows the knobs of one.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> None:
    from hgc_learn.policies import POLICIES

    width = max(map(len, POLICIES))
    for name, policy in sorted(POLICIES.items()):
        print(f"{name:<{width}}  {policy.summary}\n{'':<{width}}  {policy.paper}")
