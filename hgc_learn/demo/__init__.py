"""The demonstration: its teacher and what made it, drawn scenes, and the way from training to pictures."""

from pathlib import Path

TEACHER_DIR = Path(__file__).parent / "teacher"
"""Pipeline folder."""
