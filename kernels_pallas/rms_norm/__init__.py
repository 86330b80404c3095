"""RMSNorm and its gradient, on a CPU."""

from kernels_pallas.common import Unsupported
from kernels_pallas.rms_norm.api import rms_norm

__all__ = ["Unsupported", "rms_norm"]
