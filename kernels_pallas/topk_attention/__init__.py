"""The slots of a cache whose keys a query scores highest."""

from kernels_pallas.common import Unsupported
from kernels_pallas.topk_attention.api import topk_attention

__all__ = ["Unsupported", "topk_attention"]
