"""The kernels against the roofline of the accelerator that is present.

Every case of the catalogue is timed as its users call it, and beside it the plain reference where the device can
compile and hold it. The fraction is the time that the case takes at least, by its FLOPs and bytes and the device's data
sheet, over the time that it took. A CPU has few kernels: there mostly the references run, at the small sizes of the
catalogue, against this machine's measured peaks. What cannot run is reported as such.

Calls follow one another inside one program, each waiting for the last, so that what the host takes to start one does
not count.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.accelerators import ACCELERATORS, Accelerator
from experiments.bench.peak import matmul_flops, memory_bandwidth
from kernels_pallas.catalogue import Case, Kernel, kernels
from kernels_pallas.common import Implementation

TURN = 0.1  # seconds that a turn takes at least


@dataclasses.dataclass(frozen=True)
class Row:
    """Seconds a call, of every round; or why there are none."""

    kernel: str
    case: str
    implementation: str
    dtype: str
    flops: float
    bytes: float
    roofline: float | None = None
    bound: str | None = None
    seconds: tuple[float, ...] = ()
    error: str | None = None

    @property
    def fraction(self) -> float | None:
        if self.roofline is None or not self.seconds:
            return None
        return self.roofline / statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"fraction": self.fraction}

    def cells(self) -> list[str]:
        """Of the page's table."""
        roof = "-" if self.roofline is None else f"{1e6 * self.roofline:.3g} ({self.bound})"
        need = [f"{self.flops / 1e9:.3g}", f"{self.bytes / 1e6:.3g}", roof]
        if self.error:
            return [self.kernel, self.case, self.implementation, *need, f"**failed**: {self.error}", "-"]
        took = f"{1e6 * statistics.median(self.seconds):.4g}"
        share = "-" if self.fraction is None else f"{100 * self.fraction:.0f}%"
        return [self.kernel, self.case, self.implementation, *need, took, share]


@dataclasses.dataclass(frozen=True)
class Report:
    """All rows of a device."""

    device: str
    roof: Accelerator | None
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        roof = None if self.roof is None else dataclasses.asdict(self.roof)
        return {"device": self.device, "roof": roof, "rows": [row.as_dict() for row in self.rows]}


def run(rounds: int = 5, report: Callable[[str], None] = print) -> Report:
    """Measures everything that the default device can run, and reports a line for each number."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    if on_cpu:
        flops, bandwidth = matmul_flops(), memory_bandwidth()
        roof = Accelerator("this CPU, measured", flops, flops, bandwidth)
        report(
            "a CPU has no Pallas kernels: its own where there are some, and the plain references, at small sizes"
        )
    else:
        roof = ACCELERATORS.get(device.device_kind)
        if roof is None:
            report(f"{device.device_kind}: no peaks known, so no rooflines")
    rows = []
    for kernel in kernels():
        for case, implementation in _runs(kernel, device.platform):
            row = _row(kernel, case, implementation, roof, rounds)
            report("  ".join(row.cells()))
            rows.append(row)
    return Report(device.device_kind, roof, rows)


def _runs(kernel: Kernel, platform: str) -> Iterator[tuple[Case, Implementation]]:
    """What is measured of a kernel on a platform: its own implementation where there is one, and the reference."""
    for_cpu_alone = kernel.implementations == ("cpu",)
    if for_cpu_alone and platform != "cpu":
        return
    for case in (kernel.small,) if platform == "cpu" and not for_cpu_alone else kernel.cases:
        if platform in kernel.implementations:
            yield case, platform
        yield case, "reference"


def _row(kernel: Kernel, case: Case, implementation: str, roof: Accelerator | None, rounds: int) -> Row:
    cost = kernel.cost(case)
    row = Row(kernel.name, case.title, implementation, case.sizes["dtype"], cost.flops, cost.bytes)
    if roof is not None:
        row = dataclasses.replace(row, roofline=roof.roofline(cost, case), bound=roof.bound(cost, case))
    try:
        arguments = jax.jit(lambda key: kernel.make(key, **case.sizes))(jax.random.key(0))
        return dataclasses.replace(row, seconds=_time(kernel.call(case, implementation), arguments, rounds))
    except Exception as error:  # noqa: BLE001, part of the result: the compiler's refusal, or no memory
        return dataclasses.replace(row, error=str(error).strip().partition("\n")[0][:200])


def _time(function: Callable[..., Any], arguments: tuple[Any, ...], rounds: int) -> tuple[float, ...]:
    """Seconds a call, for every round."""
    leaves, structure = jax.tree.flatten(arguments)
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    fed = min(floating, key=lambda i: leaves[i].size)
    outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))

    @jax.jit
    def repeated(calls: int, nothing: jax.Array, leaves: list[jax.Array], outputs: Any) -> Any:
        def once(_: Any, carry: Any) -> Any:
            leaves, outputs = carry
            # 0 times what the last call gave is added, which the compiler cannot know: it must make every call, whole.
            last = jax.tree.leaves(outputs)[0].ravel()[0].astype(jnp.float32)
            leaves = list(leaves)
            leaves[fed] = leaves[fed] + (nothing * last).astype(leaves[fed].dtype)
            return leaves, function(*structure.unflatten(leaves))

        return jax.lax.fori_loop(0, calls, once, (leaves, outputs))[1]

    def turn(calls: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(repeated(calls, jnp.zeros(()), leaves, outputs))
        return time.perf_counter() - start

    turn(1)  # compiles
    calls = max(1, round(TURN / max(turn(2) / 2, 1e-7)))
    return tuple(turn(calls) / calls for _ in range(rounds))


def page(report: Report, machine: dict[str, Any], versions: dict[str, str]) -> str:
    """docs/results/kernels/<device>.md."""
    made = ", ".join(f"{name} {value}" for part in (machine, versions) for name, value in part.items())
    roof = report.roof
    command = f"`python -m experiments.bench kernels --record`: {made}."
    lines = [f"# Kernels on {report.device}", "", command, ""]
    if roof is not None and report.device == "cpu":
        lines += [
            "**No Pallas kernel ran here**: a CPU has none. Rows called cpu are its own kernels, the others the plain",
            f"references, float32, against this machine's measured {roof.float32 / 1e9:.0f} GFLOP/s and",
            f"{roof.bandwidth / 1e9:.1f} GB/s. They say what a CPU's user gets, nothing about the Pallas kernels,",
            "whose third tier of verification, a device, is open.",
            "Operands this small stay in the processor's cache, so a call can be faster than memory; with other",
            "programs running (see the load), times are no better than a hint.",
        ]
    elif roof is not None:
        lines += [
            f"Third tier of verification: times on the device. The roofline is that of its data sheet, {roof.name}:",
            f"{roof.bfloat16 / 1e12:.0f} TFLOP/s in bfloat16, {roof.float32 / 1e12:.0f} in float32 and"
            f" {roof.bandwidth / 1e9:.0f} GB/s.",
        ]
    else:
        lines.append(
            "Third tier of verification: times on the device, whose peaks are not in the table of rooflines."
        )
    lines += [
        "",
        "| kernel | case | implementation | GFLOP | MB | roofline (us) | time (us) | reached |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(cell.replace("|", "/") for cell in row.cells()) + " |" for row in report.rows),
        "",
        "Times are medians of rounds, in each of which calls follow one another in one program.",
    ]
    return "\n".join(lines) + "\n"


def write(report: Report, machine: dict[str, Any], versions: dict[str, str], folder: Path) -> Path:
    """Writes the page of the device and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.device.lower().replace(' ', '_')}.md"
    path.write_text(page(report, machine, versions), encoding="utf-8")
    return path
