"""Objectives: how a router learns, one module each. The command line knows them by the names of their classes."""

from hgc_learn.objectives.base import DEFAULT_SITES, Objective
from hgc_learn.objectives.harmonica import HarmoniCa
from hgc_learn.objectives.l2c import L2C
from hgc_learn.objectives.rollout import Rollout

__all__ = ["DEFAULT_SITES", "L2C", "HarmoniCa", "Objective", "Rollout"]
