"""Activations times weights of 8, 4 or 2 bits, which are dequantized in the tile."""

from kernels_pallas.common import Unsupported
from kernels_pallas.quantized_matmul.api import quantized_matmul
from kernels_pallas.quantized_matmul.packing import Packed, dequantize, pack, unpack

__all__ = ["Packed", "Unsupported", "dequantize", "pack", "quantized_matmul", "unpack"]
