"""Drafters: what proposes tokens for one model call to check. One file per published system."""
