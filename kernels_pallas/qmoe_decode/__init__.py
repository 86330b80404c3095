"""Activations times ternary weights that lie in memory as words of a dictionary, decoded in the tile."""

from kernels_pallas.common import Unsupported
from kernels_pallas.qmoe_decode.api import qmoe_matmul
from kernels_pallas.qmoe_decode.coded import Coded, dense

__all__ = ["Coded", "Unsupported", "dense", "qmoe_matmul"]
