r"""What a training run would need on devices that are not here: memory, FLOPs, communication, time, the largest batch.

    python -m experiments.plan --config=configs/matlm.py:paper --topology=v5e:4x4 --config.mesh.fsdp=16 \
        --config.stages.0.accumulate=8
    python -m experiments.plan --config=configs/matlm.py:paper --topology=h100:8 --config.stages.0.accumulate=4
    python -m experiments.plan --config=configs/matlm.py:tiny --topology=v5e:2x2 --compile

Nothing is allocated, and nothing compiled but with --compile: the step of the first stage is traced with its shapes and
shardings, and counted; seconds on a laptop, whatever the size. The time is a roofline (docs/scale.md says of what), not
a measurement. --compile has the compiler of the devices take the step and prints what it says beside it; the compilers
come with `pip install -e '.[aot]'`.

A topology is a chip and how many: v5e:4x4, v5p:2x2x4, v6e:8, v4:2x2x2, a100:8, h100:64, h200:8.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from jax.stages import Compiled

    from research.training.loop import Trainer
    from research.training.planning import Plan
    from research.training.topologies import Topology

PROGRAM = cli.Program(__doc__)
CONFIG = PROGRAM.config_flag()
TOPOLOGY = PROGRAM.define(
    flags.DEFINE_string, "topology", None, "The devices, such as v5e:4x4 or h100:8.", required=True
)
TABLE = PROGRAM.define(flags.DEFINE_boolean, "table", True, "Where each parameter lies.")
COMPILE = PROGRAM.define(flags.DEFINE_boolean, "compile", False, "Also compile the step for the devices.")
JSON = PROGRAM.define(flags.DEFINE_string, "json", None, "Also write every number into this file.")


def main(arguments: list[str]) -> None:
    import jax

    from research.config import build
    from research.errors import UserError
    from research.training.loop import Trainer
    from research.training.partitioning import table
    from research.training.planning import place, plan
    from research.training.topologies import parse_topology

    jax.config.update("jax_platforms", "cpu")
    topology = parse_topology(TOPOLOGY.value)
    trainer = build(CONFIG.load())
    if not isinstance(trainer, Trainer):
        raise UserError(
            f"--config={CONFIG.value} builds a {type(trainer).__name__}, not a Trainer: there is no step to plan"
            + ("; for attention spans: python -m experiments.spans" if hasattr(trainer, "profiles") else "")
        )
    made = plan(trainer, topology)
    if TABLE.value and topology.devices > 1:
        params = place(trainer, topology)[2].params
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        print(table(params, shardings, large=trainer.replicate_below))
    print(describe(made))
    compiled = None
    if COMPILE.value:
        # What was compiled for absent devices can't be loaded again.
        jax.config.update("jax_enable_compilation_cache", False)
        compiled = analysis(compile_for(trainer, topology))
        print(compare(made, compiled))
    if JSON.value is not None:
        write(made, compiled, JSON.value)


def describe(made: "Plan") -> str:
    """The plan in words."""
    from research.training.planning import USABLE
    from research.training.progress import human
    from research.training.topologies import GiB

    chip, costs = made.topology.chip, made.costs
    axes = ", ".join(f"{name}={size}" for name, size in made.mesh.items() if size > 1) or "one device"
    rows = [
        ("parameters", made.parameter_bytes),
        ("optimizer, averages", made.optimizer_bytes),
        ("batch", made.batch_bytes),
        ("activations, gradients", made.activations),
        ("needed at the peak", made.needed),
    ]
    lines = [f"{human(made.parameters)} parameters on {made.topology.devices} x {chip.name}; mesh: {axes}"]
    lines += [f"  {name:24}{size / GiB:10.3f} GiB per device" for name, size in rows]
    room = f"{chip.memory / GiB:.0f} GiB, of which a plan uses {USABLE:.0%}"
    lines.append(f"batch of {made.batch_size}: {'fits' if made.fits else 'DOES NOT FIT'} ({room})")
    lines.append(
        "no batch fits: divide more of the model"
        if made.largest_batch is None
        else f"largest batch that fits: {made.largest_batch}"
    )
    if made.cache is not None:
        lines.append(f"cache of one decoded sequence of full length: {made.cache / GiB:.3f} GiB")
    total = costs.products * made.topology.devices
    lines.append(
        f"a step: {costs.products:.3g} FLOP per device in matrix products, {total:.3g} in all; the model's own: "
        f"{made.model_flops:.3g}"
    )
    if costs.optional:
        lines.append(
            f"  of these {costs.optional:.3g} FLOP in branches that may not be taken: the larger of each is counted"
        )
    lines.append(
        f"  sends {costs.gathered / GiB:.3f} GiB in all-gathers and {costs.reduced / GiB:.3f} GiB in sums per device"
    )
    times = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in made.seconds.items())
    (fast, slow), (high, low) = made.step_seconds, made.mfu
    lines.append(f"  roofline: {times}")
    lines.append(
        f"  at least {1e3 * fast:.4g} ms with communication hidden, {1e3 * slow:.4g} ms with none hidden: "
        f"MFU at most {high:.0%} and {low:.0%}"
    )
    if costs.uncounted:
        lines.append(f"  not counted, or once instead of every turn: {', '.join(sorted(costs.uncounted))}")
    return "\n".join(lines)


def compile_for(trainer: "Trainer", topology: "Topology") -> "Compiled":
    """The first stage's step by the compiler of the devices. Raises `UserError` where there is none."""
    import time

    from experiments.bench.aot import find_topology
    from research.training.topologies import compiler_options

    devices = find_topology(topology.text)
    print(f"tracing the step for {topology.text}", flush=True)
    lowered = trainer.lower_for(devices)
    what = f"{lowered.as_text().count(chr(10))} lines of StableHLO"
    began = time.process_time()
    with told_every(30, f"compiling {what}"):
        compiled = lowered.compile(compiler_options=compiler_options(devices))
    print(f"compiled {what} in {time.process_time() - began:.0f} s of CPU time", flush=True)
    return compiled


def analysis(compiled: "Compiled") -> dict[str, Any]:
    """What the compiler says of what it made."""
    from experiments.bench.collectives import collectives, told

    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "flops": (compiled.cost_analysis() or {}).get("flops"),
        "collectives": told(collectives(compiled.as_text())),
    }


@contextlib.contextmanager
def told_every(seconds: float, what: str) -> Iterator[None]:
    """Says now and then, and for how long, that something is still going on."""
    import threading
    import time

    began, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(seconds):
            print(f"{what} for {time.monotonic() - began:.0f} s", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def compare(made: "Plan", compiled: dict[str, Any]) -> str:
    """The compiler's analysis beside the plan's."""
    from research.training.topologies import GiB

    held = made.parameter_bytes + made.optimizer_bytes + made.batch_bytes
    flops = compiled["flops"]
    counted = (
        "no count of FLOP, which GPUs' compiler does not give"
        if flops is None
        else f"{flops:.3g} FLOP per device, loops once"
    )
    return "\n".join(
        [
            "the compiler's own analysis (the plan's in brackets):",
            f"  arguments {compiled['arguments'] / GiB:.3f} GiB ({held / GiB:.3f})",
            f"  temporary {compiled['temporary'] / GiB:.3f} GiB ({made.activations / GiB:.3f})",
            f"  {counted} ({made.costs.products:.3g})",
            f"  collectives: {compiled['collectives']}",
        ]
    )


def write(made: "Plan", compiled: dict[str, Any] | None, path: str) -> None:
    """All numbers as JSON."""
    import dataclasses
    import json
    from pathlib import Path

    costs = dataclasses.asdict(made.costs) | {"uncounted": sorted(made.costs.uncounted)}
    numbers = {
        "topology": made.topology.text,
        "mesh": made.mesh,
        "batch_size": made.batch_size,
        "parameters": made.parameters,
        "bytes": {
            "parameters": made.parameter_bytes,
            "optimizer": made.optimizer_bytes,
            "batch": made.batch_bytes,
            "activations": made.activations,
            "cache": made.cache,
        },
        "costs": costs,
        "model_flops": made.model_flops,
        "largest_batch": made.largest_batch,
        "seconds": made.seconds,
        "step_seconds": made.step_seconds,
        "mfu": made.mfu,
        "compiled": compiled,
    }
    Path(path).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    PROGRAM.run(main)
