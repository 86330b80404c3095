"""Compression: observing a model's layers, rounding and fitting their weights, sharing out a budget of bits."""
