"""The dense product of many rows and its gradients, for training on a CPU."""

from kernels_pallas.common import Unsupported
from kernels_pallas.matmul.api import matmul

__all__ = ["Unsupported", "matmul"]
