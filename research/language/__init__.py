"""Whole language models and their tasks."""

from pathlib import Path

BASE = Path(__file__).parent / "base"
"""The model directory that ships: a small MatLM trained on Python's standard library."""
