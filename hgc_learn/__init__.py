"""Learned cache schedules for ControlNet pipelines."""

__version__ = "0.1.0"
