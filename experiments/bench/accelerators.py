"""What accelerators can do at best, by their makers' data sheets: the roofs that kernels are measured against."""

import dataclasses

from kernels_pallas.catalogue import Case, Cost


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


def _tpu(name: str, bfloat16: float, bandwidth: float) -> Accelerator:
    # A product in float32 is six in bfloat16, of parts of the operands.
    return Accelerator(name, bfloat16, bfloat16 / 6, bandwidth)


# By `device_kind`, as JAX gives it.
ACCELERATORS = {
    "TPU v5 lite": _tpu("TPU v5e", 197e12, 819e9),
    "TPU v5": _tpu("TPU v5p", 459e12, 2765e9),
    "TPU v6 lite": _tpu("TPU v6e", 918e12, 1640e9),
    "NVIDIA A100-SXM4-80GB": Accelerator("A100 SXM 80 GB", 312e12, 19.5e12, 2039e9),
    "NVIDIA H100 80GB HBM3": Accelerator("H100 SXM", 989e12, 67e12, 3352e9),
    "NVIDIA H200": Accelerator("H200", 989e12, 67e12, 4800e9),
}
