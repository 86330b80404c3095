"""What accelerators can do at best, by their makers' data sheets: the roofs that kernels are measured against."""

import dataclasses

from kernels_pallas.catalogue import Case, Cost
from research.training.topologies import CHIPS


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """FLOP/s of dense matrix products in bfloat16 and float32, bytes/s of its memory."""

    name: str
    bfloat16: float
    float32: float
    bandwidth: float

    def roofline(self, cost: Cost, case: Case) -> float:
        """Seconds that a case takes at least: what its FLOPs take or what its bytes take."""
        flops = self.float32 if case.sizes["dtype"] == "float32" else self.bfloat16
        return max(cost.flops / flops, cost.bytes / self.bandwidth)

    def bound(self, cost: Cost, case: Case) -> str:
        return "memory" if self.roofline(cost, case) <= cost.bytes / self.bandwidth else "compute"


# By `device_kind`, as JAX gives it.
ACCELERATORS = {
    chip.kind: Accelerator(chip.name, chip.bfloat16, chip.float32, chip.bandwidth) for chip in CHIPS.values()
}
