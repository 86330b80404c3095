"""Nested and dynamic models: one set of weights, several sizes."""
