"""Consecutive groups of rows, each times a matrix of its own: the product of a mixture of experts."""

from kernels_pallas.common import Unsupported
from kernels_pallas.grouped_matmul.api import grouped_matmul

__all__ = ["Unsupported", "grouped_matmul"]
