"""Few rows of activations times weights that lie in panels: the product of decoding, on a CPU."""

from kernels_pallas.common import Unsupported
from kernels_pallas.skinny_matmul.api import panel_columns, skinny_matmul
from kernels_pallas.skinny_matmul.reference import pack, unpack

__all__ = ["Unsupported", "pack", "panel_columns", "skinny_matmul", "unpack"]
