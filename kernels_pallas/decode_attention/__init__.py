"""Attention of a few new tokens over a cache: over all its slots, or over listed slots or pages of it."""

from kernels_pallas.attention import Partial, merge
from kernels_pallas.common import Unsupported
from kernels_pallas.decode_attention.api import decode_attention, gather_attention

__all__ = ["Partial", "Unsupported", "decode_attention", "gather_attention", "merge"]
