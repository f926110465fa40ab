"""Policies: everything that writes a schedule, one module each. A module here is found by itself."""

import importlib
import pkgutil

from hgc_learn.policies.registry import POLICIES, Policy, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["POLICIES", "Policy", "register"]
