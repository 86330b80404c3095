"""The chunk scan and the step of Mamba-2's state-space duality."""

from kernels_pallas.common import Unsupported
from kernels_pallas.ssd.api import ssd, ssd_step

__all__ = ["Unsupported", "ssd", "ssd_step"]
