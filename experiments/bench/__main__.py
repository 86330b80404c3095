"""Measures speed: this project and its peers in one run, on the same weights, in turns.

    python -m experiments.bench                           everything; drafters and scaling take by far the longest
    python -m experiments.bench train --sizes=1M,6M       training against PyTorch, eager and torch.compile
    python -m experiments.bench decode                    decoding against `generate` of transformers
    python -m experiments.bench assisted                  speculation against assisted generation of transformers
    python -m experiments.bench moe                       a mixture of experts against a dense FFN and transformers
    python -m experiments.bench context                   a decoding step by context: attention, TidalDecode, spans,
                                                          Mamba-2, and Llama of transformers
    python -m experiments.bench ssm                       Mamba-2 against that of transformers
    python -m experiments.bench multimodal                a model that reads images against LLaVA of transformers, and
                                                          planners on a photograph of 12 megapixels
    python -m experiments.bench quant                     decoding with weights of 16, 8, 4 and 2 bits against float32
    python -m experiments.bench scaling --sizes=1M        training on 1, 2, 4 and 8 devices, simulated or real
    python -m experiments.bench startup                   start of a process to its first training step
    python -m experiments.bench drafters --drafters=prompt_lookup,runs/medusa,configs/hydra.py
                                                          drafters on one target; a config is trained first
    python -m experiments.bench costs --drafters=prompt_lookup
                                                          call times by nodes, for generate --drafter=auto
    python -m experiments.bench kernels                   Pallas kernels against the roofline (--record: page in docs)
    python -m experiments.bench peak                      this machine's matrix products and memory

Ratios above 1 mean that this project is faster; in `moe` and `context`, which print shares of a time, it is below
1. They compare medians over alternating turns, and in brackets the best turns, which other programs on the machine
disturb less. Absolute numbers are this machine's; ratios of one run are what to compare. Nothing else should be
running: the load is printed. Peers need `pip install -e '.[parity]'`. What came out on one machine is in
docs/speed.md.
"""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from experiments.bench.shapes import find_shape
from kernels_pallas.cores import cores
from research.errors import UserError, nearest

PARTS = (
    "peak",
    "kernels",
    "train",
    "decode",
    "assisted",
    "moe",
    "context",
    "ssm",
    "multimodal",
    "quant",
    "scaling",
    "startup",
    "costs",
    "drafters",
)
# Flags that some parts alone read.
READ_BY = {
    "sizes": ("train", "scaling"),
    "peers": ("train",),
    "drafters": ("drafters", "costs"),
    "target": ("drafters", "costs"),
    "prompts": ("drafters",),
    "per_kind": ("drafters",),
    "runs": ("drafters",),
    "updates": ("drafters",),
    "dtype": ("drafters",),
    "figure": ("drafters",),
    "record": ("kernels", "drafters"),
}
PEERS = ("eager", "compile")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")

PROGRAM = cli.Program(
    __doc__,
    arguments="peak | kernels | train | decode | assisted | moe | context | ssm | multimodal | quant | scaling | "
    "startup | costs | drafters | all ...",
)
SIZES = PROGRAM.define(
    flags.DEFINE_list, "sizes", "1M,6M,20M", "Models to train: 1M, 6M, 20M, 40M; scaling takes one."
)
ROUNDS = PROGRAM.define(flags.DEFINE_integer, "rounds", 5, "Turns of every contender.", lower_bound=1)
THREADS = PROGRAM.define(flags.DEFINE_integer, "threads", 2, "Threads of every contender.", lower_bound=1)
PEER_FLAG = PROGRAM.define(
    flags.DEFINE_list, "peers", ",".join(PEERS), "PyTorch in training: eager, compile."
)
DRAFTERS = PROGRAM.define(
    flags.DEFINE_list,
    "drafters",
    "prompt_lookup,submodel",
    "What to compare: prompt_lookup, submodel, runs, drafter directories, configs of drafters, or all of these.",
)
TARGET = PROGRAM.define(
    flags.DEFINE_string,
    "target",
    "package:language/base",
    "The model that drafters are compared on; grown:40M is the one that ships, grown to that size without training.",
)
PROMPTS = PROGRAM.define(
    flags.DEFINE_string,
    "prompts",
    None,
    "JSONL with more prompts for drafters: `prompt` or `turns`, `category`.",
)
PER_KIND = PROGRAM.define(flags.DEFINE_integer, "per_kind", 16, "Prompts of every kind.", lower_bound=4)
RUNS = PROGRAM.define(
    flags.DEFINE_string, "runs", "runs/drafters", "Where drafters given as configs are trained and kept."
)
UPDATES = PROGRAM.define(
    flags.DEFINE_integer,
    "updates",
    None,
    "Updates of the longest stage of every drafter that is trained, its other stages in proportion.",
    lower_bound=1,
)
DTYPE = PROGRAM.define(
    flags.DEFINE_enum,
    "dtype",
    "float32",
    "Precision in which drafters are compared.",
    ["float32", "bfloat16"],
)
FIGURE = PROGRAM.define(flags.DEFINE_string, "figure", None, "Draw speed against acceptance into this file.")
RECORD = PROGRAM.define(
    flags.DEFINE_bool,
    "record",
    False,
    "Write the page of kernels on this device, or of drafters (at least those that it has), in docs/results.",
)
JSON = PROGRAM.define(flags.DEFINE_string, "json", None, "Also write every number into this file.")


def main(arguments: list[str]) -> None:
    """Runs the parts named, in the order of PARTS."""
    chosen = select(arguments)
    for flag, parts in READ_BY.items():
        if PROGRAM.values[flag].present and not chosen.intersection(parts):
            raise UserError(f"--{flag}: read by {' and '.join(parts)}, not by {', '.join(sorted(chosen))}")
    for flag in (SIZES, DRAFTERS):
        if not flag.value:
            raise UserError(f"--{flag.name}=: it names nothing to measure")
    shapes = [find_shape(name) for name in SIZES.value]
    if "scaling" in chosen and "train" not in chosen and SIZES.present and len(shapes) > 1:
        raise UserError(f"--sizes={','.join(SIZES.value)}: scaling measures one size")
    for peer in PEER_FLAG.value:
        if peer not in PEERS:
            found = nearest(peer, PEERS)
            hint = f"did you mean {found}?" if found else f"there are {', '.join(PEERS)}"
            raise UserError(f"--peers: no peer {peer!r}; {hint}")
    for flag, file in (("json", JSON.value), ("figure", FIGURE.value)):
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise UserError(f"--{flag}={file}: its folder does not exist")
        if file is not None and Path(file).is_dir():
            raise UserError(f"--{flag}={file}: a folder; name a file")
    limit_threads(THREADS.value)
    record: dict[str, Any] = {"machine": machine(), "versions": versions()}
    print(", ".join(f"{name} {value}" for part in record.values() for name, value in part.items()))
    for part in PARTS:
        if part in chosen:
            record[part] = measure(part, shapes)
    if JSON.value is not None:
        Path(JSON.value).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"numbers: {JSON.value}")


def select(arguments: list[str]) -> set[str]:
    """The parts that were named; all of them if none was."""
    for name in arguments:
        if name not in (*PARTS, "all"):
            found = nearest(name, (*PARTS, "all"))
            hint = f"did you mean {found}?" if found else f"there are {', '.join(PARTS)} and all"
            raise UserError(f"no benchmark {name!r}; {hint}")
    return set(PARTS) if not arguments or "all" in arguments else set(arguments)


def measure(part: str, shapes: list[Any]) -> Any:
    """Runs one part and returns its numbers."""
    if part == "train":
        from experiments.bench import train

        rows = train.run(shapes, PEER_FLAG.value, ROUNDS.value, THREADS.value)
        return [row.as_dict() for row in rows]
    if part == "decode":
        from experiments.bench import decode

        return [row.as_dict() for row in decode.run(rounds=ROUNDS.value)]
    if part == "assisted":
        from experiments.bench import assisted

        return [row.as_dict() for row in assisted.run(rounds=ROUNDS.value)]
    if part == "moe":
        from experiments.bench import moe

        return [row.as_dict() for row in moe.run(rounds=ROUNDS.value)]
    if part == "context":
        from experiments.bench import context

        return [row.as_dict() for row in context.run(rounds=ROUNDS.value)]
    if part == "ssm":
        from experiments.bench import ssm

        return [row.as_dict() for row in ssm.run(rounds=ROUNDS.value)]
    if part == "multimodal":
        from experiments.bench import multimodal

        return [row.as_dict() for row in multimodal.run(rounds=ROUNDS.value)]
    if part == "quant":
        from experiments.bench import quant

        return [row.as_dict() for row in quant.run(rounds=ROUNDS.value)]
    if part == "scaling":
        from experiments.bench import scaling

        return [row.as_dict() for row in scaling.run(shapes[0].name, rounds=ROUNDS.value)]
    if part == "kernels":
        from experiments.bench import kernels
        from experiments.systems import ROOT

        report = kernels.run(rounds=ROUNDS.value)
        if RECORD.value:
            print(f"page: {kernels.write(report, machine(), versions(), ROOT / 'docs/results/kernels')}")
        return report.as_dict()
    if part == "costs":
        from experiments.bench import costs

        return costs.run(TARGET.value, DRAFTERS.value, rounds=ROUNDS.value)
    if part == "drafters":
        from experiments.bench import drafters, drafters_page

        found = drafters.run(
            DRAFTERS.value,
            TARGET.value,
            PROMPTS.value,
            RUNS.value,
            PER_KIND.value,
            dtype=DTYPE.value,
            figure=FIGURE.value,
            updates=UPDATES.value,
            rounds=ROUNDS.value,
            replaces=drafters_page.FOLDER if RECORD.value else None,
        )
        if RECORD.value:
            settings = {"machine": machine(), "versions": versions()}
            settings |= {"target": TARGET.value, "dtype": DTYPE.value, "prompts of a kind": PER_KIND.value}
            settings["updates of a drafter"] = UPDATES.value or "as in its config"
            settings["turns of each"] = ROUNDS.value
            if PROMPTS.value is not None:
                settings["more prompts"] = Path(PROMPTS.value).name
            print(f"page: {drafters_page.write(found, settings)}")
        return found.as_dict()
    if part == "startup":
        from experiments.bench import startup

        return startup.run(rounds=ROUNDS.value).as_dict()
    from experiments.bench.peak import matmul_flops, memory_bandwidth

    flops, bandwidth = matmul_flops(), memory_bandwidth()
    print(f"matrix product {flops / 1e9:.0f} GFLOP/s (float32), memory {bandwidth / 1e9:.1f} GB/s")
    return {"matmul_flops": flops, "memory_bandwidth": bandwidth}


def limit_threads(threads: int) -> None:
    """Gives every library here and in child processes `threads` threads. Before jax or torch is imported.

    Raises UserError if the machine lends this process fewer cores.
    """
    if threads > cores():
        raise UserError(f"--threads={threads}: this process may use {cores()} cores")
    os.environ["NPROC"] = str(threads)  # XLA on CPU
    os.environ["OMP_NUM_THREADS"] = str(threads)  # torch


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, memory, load, date."""
    described = {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()}
    return described | {
        "load": round(os.getloadavg()[0], 1),
        "threads": THREADS.value,
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """The processor's name as the system gives it."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """{package: version} of those that are installed, and Python's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    PROGRAM.run(main)
