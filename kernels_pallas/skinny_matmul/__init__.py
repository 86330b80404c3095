"""Few rows of activations times weights that lie in panels: the product of decoding, on a CPU."""

from kernels_pallas.common import Unsupported
from kernels_pallas.skinny_matmul.api import panel_columns, skinny_code_matmul, skinny_matmul
from kernels_pallas.skinny_matmul.reference import dequantize, pack, pack_codes, pack_grid, unpack

__all__ = [
    "Unsupported",
    "dequantize",
    "pack",
    "pack_codes",
    "pack_grid",
    "panel_columns",
    "skinny_code_matmul",
    "skinny_matmul",
    "unpack",
]
