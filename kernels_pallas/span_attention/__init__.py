"""Causal attention where every head has its own window and its own number of sinks (MoA, arXiv 2406.14909)."""

from kernels_pallas.common import Unsupported
from kernels_pallas.span_attention.api import span_attention, takes_on_cpu

__all__ = ["Unsupported", "span_attention", "takes_on_cpu"]
