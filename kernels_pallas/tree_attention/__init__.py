"""Attention of a drafted tree over a cached prefix and over itself."""

from kernels_pallas.tree_attention.api import Unsupported, tree_attention

__all__ = ["Unsupported", "tree_attention"]
