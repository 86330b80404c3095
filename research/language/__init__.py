"""Whole language models and their tasks."""
