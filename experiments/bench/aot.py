"""Compiles every Pallas kernel, decoders that use them, and a step divided by FSDP, for accelerators that are not here.

    make aot                                       everything, for TPU v5e, TPU v6e and H100
    python -m experiments.bench.aot ssd            one kernel again (also: decoder, fsdp); other rows of the page stay
    python -m experiments.bench.aot --targets=h100

The second tier of verification: the compilers of the devices take the kernels whole, with their limits of memory,
layouts and registers, and say what memory a program needs. No kernel is run, so nothing is said about numbers (the
tests see to those, in Pallas' interpreter) or speed. Needs `pip install -e '.[aot]'`, which `make aot` does in an
environment of its own. The page is docs/results/kernels/aot.md, its numbers are beside it in aot.json.
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from experiments.systems import ROOT
from research.errors import UserError, nearest

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "h100": "1x1x1"}
DECODER, FSDP = "decoder", "fsdp"
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "flax")
FOLDER = ROOT / "docs/results/kernels"

PROGRAM = cli.Program(__doc__, arguments="KERNEL | decoder | fsdp ...")
TARGETS = PROGRAM.define(
    flags.DEFINE_list, "targets", ",".join(TOPOLOGIES), "Devices to compile for: v5e, v6e, h100."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What the compiler said of a case: sizes in bytes, or an error. flops and moved are the compiler's own count of
    what is outside of kernels; for a TPU, of the bytes of kernels too."""

    target: str
    kernel: str
    case: str
    seconds: float
    arguments: int | None = None
    outputs: int | None = None
    temporary: int | None = None
    code: int | None = None
    flops: float | None = None
    moved: float | None = None
    error: str | None = None
    sends: str | None = None  # the collectives of a program of several devices


def main(arguments: list[str]) -> None:
    """Compiles what was named, everything by default, and writes the page."""
    import jax

    from kernels_pallas.catalogue import kernels

    jax.config.update("jax_platforms", "cpu")
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # what was compiled for absent devices can't be loaded
    known = (*(kernel.name for kernel in kernels()), DECODER, FSDP)
    _check(arguments, known, "no kernel")
    _check(TARGETS.value, tuple(TOPOLOGIES), "--targets: no target")
    made = versions()
    rows = {row_key(row): row for row in _read(made)}
    devices = {target: find_device(target) for target in TARGETS.value}
    found = (
        (target, *program)
        for name in (name for name in known if name in (arguments or known))
        for target, device in devices.items()
        for program in programs(name, device.platform)
    )
    made_rows = itertools.chain(
        (compile_for(target, devices[target], *program) for target, *program in found),
        (compile_fsdp(target) for target in devices if FSDP in (arguments or known)),
    )
    for row in made_rows:
        rows[row_key(row)] = row
        print(
            f"{row.target} {row.kernel}, {row.case}: {row.error or 'compiled'} ({row.seconds:.1f} s)",
            flush=True,
        )
        write(rows.values(), made, known)  # every time: the next one may be one that ends the process
    failed = sum(row.error is not None for row in rows.values())
    print(f"{len(rows)} programs, {failed} failed: {FOLDER / 'aot.md'}")


def write(rows: Iterable[Row], made: dict[str, str], known: tuple[str, ...]) -> None:
    """The page and its numbers, in the order of the catalogue."""
    targets = [*TOPOLOGIES]
    ordered = sorted(rows, key=lambda row: (known.index(row.kernel), row.case, targets.index(row.target)))
    record = {
        "date": datetime.date.today().isoformat(),
        "versions": made,
        "rows": [dataclasses.asdict(row) for row in ordered],
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "aot.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "aot.md").write_text(page(record, ordered), encoding="utf-8")


def row_key(row: Row) -> tuple[str, str, str]:
    return row.target, row.kernel, row.case


def _check(names: list[str], known: tuple[str, ...], what: str) -> None:
    for name in names:
        if name not in known:
            found = nearest(name, known)
            raise UserError(f"{what} {name!r}; " + (f"did you mean {found}?" if found else ", ".join(known)))


def _read(made: dict[str, str]) -> list[Row]:
    """The rows that the page has already; none if they were made with other versions."""
    path = FOLDER / "aot.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**row) for row in record["rows"]] if record["versions"] == made else []


def versions() -> dict[str, str]:
    """{package: version}. Raises UserError where a compiler is missing."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"{package} is not installed: run `make aot`, or pip install -e '.[aot]'"
            ) from error
    return found


def find_device(target: str) -> Any:
    """A device of the target, which only its compiler knows."""
    import os

    from jax.experimental import topologies

    if target == "h100":
        facts = (Path(__file__).parent / "h100_sxm.txtpb").read_text(encoding="utf-8")
        options = {"target_config": facts, "topology": TOPOLOGIES[target]}
        return topologies.get_topology_desc("h100", "cuda", **options).devices[0]
    # Or libtpu looks for the machine that it would run on.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost"
    )
    return topologies.get_topology_desc(TOPOLOGIES[target], "tpu").devices[0]


def find_topology(text: str) -> Any:
    """The devices of a topology such as v5e:4x4 or h100:8. Raises UserError where their compiler is missing."""
    import os

    from jax.experimental import topologies

    chip, _, shape = text.partition(":")
    package = "jax-cuda12-plugin" if chip == "h100" else "libtpu"
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"--compile: {package} is not installed; pip install -e '.[aot]'") from error
    if chip == "h100":
        facts = (Path(__file__).parent / "h100_sxm.txtpb").read_text(encoding="utf-8")
        count = math.prod(int(size) for size in shape.split("x"))
        hosts = max(1, count // 8)
        if count > 8 and count % 8:
            raise UserError(f"--compile: {count} of h100 are no whole hosts, which have 8")
        options = {"target_config": facts, "topology": f"1x{hosts}x{count // hosts}"}
        return topologies.get_topology_desc("h100", "cuda", **options).devices
    if chip.startswith("v"):
        os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
        return topologies.get_topology_desc(text, "tpu").devices
    raise UserError(f"--compile: no compiler for {chip}; there are those of TPUs and of h100")


def programs(name: str, platform: str) -> Iterator[tuple[str, str, Callable[..., Any], tuple[Any, ...]]]:
    """(name, case, function, shapes of its arguments) of a kernel or of the decoder."""
    from experiments.bench import aot_decoder
    from kernels_pallas.catalogue import kernels

    implementation = "tpu" if platform == "tpu" else "gpu"
    if name == DECODER:
        for title, function, shapes in aot_decoder.programs(implementation):
            yield DECODER, title, function, shapes
    for kernel in kernels():
        if kernel.name == name and implementation in kernel.implementations:
            for case in kernel.cases:
                yield name, case.title, kernel.call(case, implementation), kernel.shapes(case)


def compile_for(
    target: str, device: Any, name: str, case: str, function: Callable[..., Any], shapes: tuple[Any, ...]
) -> Row:
    """One program, compiled. What goes wrong is part of the result, not an error of this program."""
    import jax
    from jax.sharding import (
        AbstractDevice,
        AbstractMesh,
        SingleDeviceSharding,
        use_abstract_mesh,
    )

    # Parts of the decoder and some lowering rules ask for the chip, which is not the default backend.
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform=device.platform)
    mesh = AbstractMesh((1,), ("device",), abstract_device=abstract)
    place = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)

    def make() -> Any:
        with use_abstract_mesh(mesh):
            return jax.jit(function).trace(*placed).lower().compile()

    return _row(target, name, case, make)[0]


def compile_fsdp(target: str) -> Row:
    """A step of a decoder whose weights are divided over all devices of a small topology, as `experiments.train`
    compiles it. It failed, if the gathering of them is not asynchronous, with products beside it."""
    from experiments.bench.collectives import collectives, told
    from research.training.topologies import compiler_options

    # A GPU's compiler gathers small weights all at once.
    width, chips = (2048, "h100:8") if target == "h100" else (256, TOPOLOGIES[target])
    devices = find_topology(chips)

    def make() -> Any:
        lowered = fsdp_trainer(width, len(devices)).lower_for(devices)
        return lowered.compile(compiler_options=compiler_options(devices))

    case = f"training: a decoder of 2 layers of width {width}, over {len(devices)} devices"
    row, compiled = _row(target, FSDP, case, make)
    if compiled is None:
        return row
    found = collectives(compiled.as_text())
    hidden = [one for one in found if one.kind == "all-gather" and one.products]
    row = dataclasses.replace(row, sends=told(found))
    return row if hidden else dataclasses.replace(row, error="no all-gather has a product beside it")


def fsdp_trainer(width: int, parts: int) -> Any:
    from configs.matlm import decoder
    from research.config import build, of
    from research.data.text import TokenDataset
    from research.training.loop import Trainer
    from research.training.optimizers import adamw, constant
    from research.training.stages import Stage
    from research.training.task import LanguageModelling

    model = decoder(width, num_layers=2, num_heads=width // 128, hidden_dim=4 * width, length=width)
    optimizer = of(adamw, schedule=of(constant, peak=1e-3))
    return build(
        of(
            Trainer,
            task=of(LanguageModelling, model=model),
            data=of(TokenDataset, length=width),
            stages=(of(Stage, name="main", steps=1, batch_size=16, optimizer=optimizer),),
            mesh=dict(fsdp=parts),
        )
    )


def _row(target: str, name: str, case: str, make: Callable[[], Any]) -> tuple[Row, Any]:
    """What the compiler says, and what it made."""
    start = time.perf_counter()
    try:
        compiled = make()
    except Exception as error:  # noqa: BLE001
        lines = str(error).strip().splitlines() or traceback.format_exc().splitlines()[-1:]
        return Row(target, name, case, time.perf_counter() - start, error=lines[0][:300]), None
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    row = Row(
        target,
        name,
        case,
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        cost.get("flops"),
        cost.get("bytes accessed"),
    )
    return row, compiled


def page(record: dict[str, Any], rows: list[Row]) -> str:
    """docs/results/kernels/aot.md."""
    from experiments.bench.accelerators import ACCELERATORS
    from kernels_pallas.catalogue import kernels

    roofs = {
        "v5e": ACCELERATORS["TPU v5 lite"],
        "v6e": ACCELERATORS["TPU v6 lite"],
        "h100": ACCELERATORS["NVIDIA H100 80GB HBM3"],
    }
    cases = {(kernel.name, case.title): (kernel, case) for kernel in kernels() for case in kernel.cases}
    made = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    failed = [row for row in rows if row.error]
    lines = [
        "# Kernels compiled ahead of time",
        "",
        f"`make aot` on {record['date']}, on a CPU, with {made}.",
        "",
        "Second tier of three: the devices' own compilers took these programs, for one chip of TPU v5e and TPU v6e and",
        "for one H100 SXM (described in experiments/bench/h100_sxm.txtpb). **Nothing here was run**: there are no",
        "times, and nothing says that the numbers are right. That is the first tier's part, the tests in Pallas'",
        "interpreters. `fsdp` has no kernel of this project: it is a step on several chips, compiled as training does,",
        "for v6e with options (research/training/topologies.py) without which nothing there is asynchronous.",
        "",
        f"{len(rows)} programs, {len(failed)} failed." if failed else f"{len(rows)} programs, none failed.",
        "",
        "MiB are the compiler's: arguments, results, and what else the program holds in the device's memory. GFLOP and",
        "GB are what the case needs at least, and the bound is the larger of the times that they take by the device's",
        "data sheet. The compilers' own counts, which leave out what is inside of kernels, are in aot.json.",
        "",
        "| kernel | case | target | arguments | results | temporary | GFLOP | GB | bound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row.kernel} | {row.case} | {row.target} |"
        if row.error:
            lines.append(f"{start} **failed**: {row.error.replace('|', '/')} | | | | | |")
            continue
        need = "| | | |"
        if (row.kernel, row.case) in cases:
            kernel, case = cases[row.kernel, row.case]
            cost, roof = kernel.cost(case), roofs[row.target]
            seconds = roof.roofline(cost, case)
            limit = f"{1e6 * seconds:.3g} us, {roof.bound(cost, case)}"
            need = f"| {cost.flops / 1e9:.3g} | {cost.bytes / 1e9:.3g} | {limit} |"
        sizes = " | ".join(f"{size / 2**20:.1f}" for size in (row.arguments, row.outputs, row.temporary))
        lines.append(f"{start} {sizes} {need}")
    if sent := [row for row in rows if row.sends]:
        lines += [
            "",
            "What the programs of several devices send. Asynchronous is what the schedule begins and ends apart;",
            "beside products, what has matrix products in between, or in the operation that moves it on.",
            "",
            *(f"- {row.kernel}, {row.target}: {row.sends}" for row in sent),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PROGRAM.run(main)
