"""The demonstration: its teacher, drawn scenes and what judges pictures of them, the way from training to pictures."""

from pathlib import Path

TEACHER_DIR = Path(__file__).parent / "teacher"
"""Pipeline folder."""
