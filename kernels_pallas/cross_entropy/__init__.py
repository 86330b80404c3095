"""Cross-entropy of logits over a vocabulary and its gradient, on a CPU."""

from kernels_pallas.common import Unsupported
from kernels_pallas.cross_entropy.api import cross_entropy

__all__ = ["Unsupported", "cross_entropy"]
