"""Benchmarks against the peers, with the same weights or the same architecture."""
