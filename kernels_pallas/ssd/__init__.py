"""The chunk scan and the step of Mamba-2's state-space duality, and all of its mixer between the projections."""

from kernels_pallas.common import Unsupported
from kernels_pallas.ssd.api import mixer, ssd, ssd_step, takes_on_cpu

__all__ = ["Unsupported", "mixer", "ssd", "ssd_step", "takes_on_cpu"]
