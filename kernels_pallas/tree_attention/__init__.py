"""Attention of a drafted tree over a cached prefix and over itself."""

from kernels_pallas.common import Unsupported
from kernels_pallas.tree_attention.api import tree_attention

__all__ = ["Unsupported", "tree_attention"]
