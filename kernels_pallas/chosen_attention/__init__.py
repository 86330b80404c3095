"""Attention that chooses tokens by their scores, and attention over the chosen alone, on a CPU."""

from kernels_pallas.chosen_attention.api import listed_attention, select_attention
from kernels_pallas.common import Unsupported

__all__ = ["Unsupported", "listed_attention", "select_attention"]
