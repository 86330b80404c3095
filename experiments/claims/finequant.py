"""FineQuant against one scale for each output, and against groups of one size for all matrices.

Two models: the one that ships, whose weights have hardly an outlier, and the same function with an outlier planted in
every matrix that reads another one's channels alone: a row of `down` and of `output` times 30, and the channel that is
its input by 1/30. Weights alone decide, so that the seeds are those of the rows.
"""

import functools
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claims import compressing
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.compression.baselines import RoundToNearest
from research.compression.blocks import replace
from research.compression.chain import Method
from research.compression.finequant import FineQuant

FACTOR = 30.0
SETS = ("as trained", "with outliers")


def planted(params: Any, seed: int) -> Any:
    """The same function, with a row of every `output` and `down` kernel `FACTOR` times as large."""
    rng = np.random.default_rng(seed)
    params = dict(params)
    for name in [name for name in params if name.startswith("layer_")]:
        block = params[name]
        changed = {}
        for module, producer, consumer in (("attention", "value", "output"), ("mlp", "up", "down")):
            wide, reads = block[module][producer]["kernel"], block[module][consumer]["kernel"]
            row = int(rng.integers(reads.shape[0]))
            changed[f"{module}/{producer}/kernel"] = wide.at[:, row].divide(FACTOR)
            changed[f"{module}/{consumer}/kernel"] = reads.at[row].multiply(FACTOR)
        params[name] = replace(block, changed)
    return params


def run(
    method: Method | None, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    losses, bits = [], []
    for number, params in enumerate((compressing.base().params, planted(compressing.base().params, seed))):
        progress(number / 2, SETS[number])
        if method is not None:
            params = compressing.compress((method,), seed, params)
        losses.append(compressing.loss(params))
        bits.append(compressing.costs(params)["budget"])
    return {"loss": losses, "bits": bits, "budget": bits[1], "bytes": compressing.costs(params)["bytes"]}


def excess(results: Results, arm: str, place: int) -> float:
    pairs = zip(results[arm]["loss"], results["float32"]["loss"], strict=True)
    return statistics.fmean(mine[place] - exact[place] for mine, exact in pairs)


def bits(results: Results, arm: str, place: int) -> float:
    return statistics.fmean(found[place] for found in results[arm]["bits"])


def judge(results: Results) -> tuple[str, str]:
    """Yes, if at 3 and at 4 bits, of what one scale an output loses on the model with outliers, adaptive groups lose at
    most half, and no more than groups of one size that take at least as many bits; and on the model as trained at most
    0.005 nats more than one scale an output. Partly, if the first holds at both; else no."""
    halved = all(
        excess(results, f"int{b} adaptive", 1) <= 0.5 * excess(results, f"int{b} per output", 1)
        for b in (3, 4)
    )
    others = ("groups of 128", "groups of 64")
    equal = all(
        excess(results, f"int{b} adaptive", 1) <= excess(results, f"int{b} {other}", 1)
        for b in (3, 4)
        for other in others
        if bits(results, f"int{b} {other}", 1) >= bits(results, f"int{b} adaptive", 1)
    )
    harmless = all(
        excess(results, f"int{b} adaptive", 0) <= excess(results, f"int{b} per output", 0) + 0.005
        for b in (3, 4)
    )
    said = []
    for place, name in enumerate(SETS):
        for b in (4, 3):
            found = {kind: f"int{b} {kind}" for kind in KINDS}
            parts = ", ".join(
                f"{excess(results, arm, place):+.3f} ({kind}, {bits(results, arm, place):.2f} bits)"
                for kind, arm in found.items()
            )
            said.append(f"int{b}, {name}: nats a token above float32 {parts}")
    verdict = "yes" if halved and equal and harmless else "partly" if halved else "no"
    return verdict, "; ".join(said) + "."


def figure(results: Results, path: Path) -> None:
    """Loss above float32 against bits, one panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    styles = {"per output": "o", "groups of 128": "s", "groups of 64": "^", "adaptive": "*"}
    for place, (axes, name) in enumerate(zip(panels, SETS, strict=True)):
        for b, colour in ((4, "C0"), (3, "C1")):
            for kind, marker in styles.items():
                axes.plot(
                    bits(results, f"int{b} {kind}", place),
                    max(excess(results, f"int{b} {kind}", place), 1e-4),
                    marker,
                    color="C3" if kind == "adaptive" else colour,
                    markersize=12 if kind == "adaptive" else 7,
                    label=f"int{b}, {kind}",
                )
        axes.set(xlabel="bits a weight", ylabel="nats a token above float32", yscale="log", title=name)
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


KINDS = {
    "per output": lambda b: RoundToNearest(b, symmetric=True),
    "groups of 128": lambda b: RoundToNearest(b, 128, symmetric=True),
    "groups of 64": lambda b: RoundToNearest(b, 64, symmetric=True),
    "adaptive": lambda b: FineQuant(b, smallest=64),
}

CLAIM = Claim(
    system="finequant",
    paper="arXiv 2308.09723, abstract",
    statement="A heuristic approach that uses only the model weights of a pre-trained model, with an adaptive "
    "granularity of quantization, achieves minimal accuracy loss with int4 weights.",
    setting="The 7.3M-parameter model that ships, all kernels of its blocks in symmetric int4 and int3 with 16-bit "
    "scales, no data; held-out Python code, 16 rows of 512 tokens. As trained, and with one row of every output and "
    "down projection 30 times as large, which leaves the function as it is; three seeds of such rows. The rule by "
    "which a matrix finds its groups is a reconstruction.",
    measures={
        "loss": "nats a token, as trained and with outliers",
        "bits": "bits a weight of the kernels, likewise",
    },
    budget="bits a weight of the kernels, with outliers",
    arms={
        "float32": Arm(functools.partial(run, None), "not compressed"),
        **{
            f"int{b} {kind}": Arm(functools.partial(run, make(b)), what)
            for b in (4, 3)
            for (kind, make), what in zip(
                KINDS.items(),
                (
                    "one scale for each output",
                    "a scale for every 128 inputs of all matrices",
                    "a scale for every 64 inputs of all matrices",
                    "FineQuant: each matrix has groups as fine as its ranges ask for, 64 at least",
                ),
                strict=True,
            )
        },
    },
    judge=judge,
    figure=figure,
)
