"""LQ-LoRA against rounding alone and GPTQ, at equal bytes: before any update, and after as many of the factors.

All arms freeze every projection of the shipped model in NormalFloat of 2 or 3 bits, GPTQ's in its uniform grid, and
train factors of the same rank on sums in sentences. QLoRA and GPTQ begin with a product of 0, LQ-LoRA with what
rounding left.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.adapting import (
    BATCH,
    LENGTH,
    centre,
    dataset,
    nats,
    rows,
    shipped,
    start,
    tune,
    two_panels,
    updates,
    values,
)
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.adapters.lora import LoRA, flat, tree
from research.adapters.lq_lora import LQLoRA
from research.compression.rounding import Uniform, feed_back
from research.nn.accounting import count_bytes
from research.nn.normal_float import BlockNormal
from research.nn.quantized import Quantized
from research.training.observe import collect_grams

BITS = (2, 3)
RANK, STEPS = 16, 24
RATES = (5e-4, 2e-3, 8e-3)  # factors that begin at 0 want a larger one than those that don't
GROUP, BLOCK = 64, 64
PLAIN = LoRA(rank=RANK)
CALIBRATION = 32  # rows of 64 tokens


def frozen(how: str, bits: int, seed: int) -> Any:
    """The parameters that an arm begins with."""
    quantizer = BlockNormal(bits, group=GROUP, block=BLOCK)
    if how == "QLoRA":
        return start(LoRA(rank=RANK, quantizer=quantizer), seed)
    if how == "GPTQ + LoRA":
        return with_gptq(start(PLAIN, seed), bits, seed)
    fisher = dataset("builtin", "train", seed) if how == "LQ-LoRA, Fisher" else None
    return start(
        LQLoRA(rank=RANK, candidates=(quantizer,), steps=4, fisher=fisher, samples=CALIBRATION), seed
    )


def with_gptq(params: Any, bits: int, seed: int) -> Any:
    """Kernels rounded with fed-back errors, a group of 256 inputs having a scale in float16 and a zero in a byte."""
    base, adapter = flat(params["base"]), flat(params["adapter"])
    batches = dataset("builtin", "train", seed).batches(0, 8)
    calibration = [next(batches) for _ in range(CALIBRATION // 8)]
    grams = collect_grams(shipped().model, shipped().params, calibration, lambda path: path in adapter)
    kernels = {}
    for path in adapter:
        gram = jnp.asarray(grams[path].mean(), jnp.float32)
        found = feed_back(base.pop(path), gram, Uniform(bits, store="float16"), 256)
        scale, zero = found.fitted.scale.astype(jnp.float16), found.fitted.zero.astype(jnp.uint8)
        kernels[path] = Quantized.from_codes(found.codes, scale, zero, bits)
    return {**params, "base": tree(base), "fixed": {**params["fixed"], "kernel": tree(kernels)}}


def run(how: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """By bits: nats of the model's own text before any update, nats of sums before and after."""
    model = shipped().model
    own, sums = rows("builtin", "validation", 32), rows("arithmetic", "validation", 32)
    batches = updates("arithmetic", STEPS, seed)
    measured: dict[str, Any] = {"own text": [], "sums before": [], "sums after": [], "megabytes": []}
    for place, bits in enumerate(BITS):
        progress((place + 0.1) / len(BITS), f"{bits} bits")
        params = frozen(how, bits, seed)
        measured["own text"].append(float(nats(model, PLAIN, params, own)))
        measured["sums before"].append(float(nats(model, PLAIN, params, sums)))
        measured["megabytes"].append(count_bytes(params["fixed"]["kernel"]) / 1e6)
        measured["sums after"].append(best_of_rates(params, batches, sums, seed))
    size = count_bytes({name: part for name, part in params.items() if name != "fixed"}) + count_bytes(
        params["fixed"]["kernel"]
    )
    return measured | {"budget": len(RATES) * STEPS * BATCH * LENGTH, "bytes": size}


def best_of_rates(params: Any, batches: Any, sums: Any, seed: int) -> float:
    """Nats of sums after the updates, at the best learning rate."""
    model, key = shipped().model, jax.random.key(seed)
    tuned = (tune(model, PLAIN, params, batches, rate, key)[0] for rate in RATES)
    return min(float(nats(model, PLAIN, one, sums)) for one in tuned)


def whole(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """The same in float32."""
    model = shipped().model
    own, sums = rows("builtin", "validation", 32), rows("arithmetic", "validation", 32)
    params = start(PLAIN, seed)
    before = [float(nats(model, PLAIN, params, batch)) for batch in (own, sums)]
    after = best_of_rates(params, updates("arithmetic", STEPS, seed), sums, seed)
    return {
        "own text": [before[0]] * len(BITS),
        "sums before": [before[1]] * len(BITS),
        "sums after": [after] * len(BITS),
        "megabytes": [count_bytes(flat(params["base"])) / 1e6] * len(BITS),
        "budget": len(RATES) * STEPS * BATCH * LENGTH,
        "bytes": count_bytes(params["base"]) + count_bytes(params["adapter"]),
    }


ROUNDED = ("QLoRA", "GPTQ + LoRA", "LQ-LoRA", "LQ-LoRA, Fisher")


def judge(results: Results) -> tuple[str, str]:
    """Holds where, with every seed, LQ-LoRA with Fisher beats both baselines, on its own text before any update and on
    sums after them, at 2 bits and at 3: four comparisons, of which all must hold for "yes" and half for "partly"."""
    held, told = 0, []
    for measure in ("own text", "sums after"):
        best = np.minimum(*(values(results, arm, measure) for arm in ("QLoRA", "GPTQ + LoRA")))
        gap = values(results, "LQ-LoRA, Fisher", measure) - best
        held += int((gap < 0).all(axis=0).sum())
        for place, bits in enumerate(BITS):
            means = {arm: values(results, arm, measure)[:, place].mean() for arm in ("float32", *ROUNDED)}
            told.append(
                f"{measure} at {bits} bits: " + ", ".join(f"{arm} {x:.3f}" for arm, x in means.items())
            )
    verdict = "yes" if held == 4 else "partly" if held >= 2 else "no"
    return verdict, "Nats per token, " + "; ".join(told) + "."


def figure(results: Results, path: Path) -> None:
    """Nats by bits, before and after."""
    with two_panels(path, (10, 4)) as panels:
        for axis, measure, title in zip(
            panels,
            ("own text", "sums after"),
            ("Own text, before any update", f"Sums, after {STEPS} updates"),
            strict=True,
        ):
            for number, arm in enumerate(("float32", *ROUNDED)):
                mean, error = centre(values(results, arm, measure))
                axis.bar(np.arange(len(BITS)) + 0.16 * number, mean, 0.15, yerr=error, label=arm)
            axis.set(title=title, ylabel="nats per token")
            axis.set_xticks(np.arange(len(BITS)) + 0.32, [f"{bits} bits" for bits in BITS])
        panels[1].legend(fontsize=8)


CLAIM = Claim(
    system="lq_lora",
    paper="arXiv 2311.12023, abstract and table 2",
    statement="LQ-LoRA outperforms QLoRA and GPTQ-LoRA at equal size, and the more so the fewer bits, in aggressive "
    "quantization below 3 bits.",
    setting="The shipped base model of 7.3M parameters, its 42 projections in 2 and 3 bits: NormalFloat with a scale "
    f"of 8 bits for {GROUP} weights, GPTQ a float16 scale and a zero of 8 bits for 256, which is 2 % fewer bytes. "
    f"Rank {RANK}, {STEPS} updates of {BATCH} x {LENGTH} tokens of generated sums with Adam, each arm at the best of "
    f"the rates {', '.join(map(str, RATES))}, two seeds; Fisher and GPTQ see {CALIBRATION} rows of the model's own "
    "training text. 32 held-out rows of each.",
    measures={
        "own text": f"nats/token before any update, at {BITS} bits",
        "sums before": "nats/token",
        "sums after": "nats/token, at the best rate",
        "megabytes": "of the frozen kernels",
    },
    budget="training tokens",
    arms={
        "float32": Arm(whole, "LoRA on the base as it is"),
        **{
            arm: Arm(functools.partial(run, arm), what)
            for arm, what in {
                "QLoRA": "NormalFloat, factors begin with a product of 0",
                "GPTQ + LoRA": "a uniform grid with fed-back errors, factors begin with a product of 0",
                "LQ-LoRA": "NormalFloat and factors in four turns at most",
                "LQ-LoRA, Fisher": "the same, weighted by the Fisher of the model's own text",
            }.items()
        },
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
