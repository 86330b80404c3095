"""silu(gate) * up, what gated feed-forward layers compute between their products, for training on a CPU."""

from kernels_pallas.common import Unsupported
from kernels_pallas.silu_product.api import silu_product

__all__ = ["Unsupported", "silu_product"]
