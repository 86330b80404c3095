"""Pallas kernels, one folder each: a reference in plain jnp, TPU and GPU paths, and the api that dispatches.

Nothing here imports `research`.
"""
