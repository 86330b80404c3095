"""Decoding with weights of fewer bits, on the same weights in float32, bfloat16, 8, 4 and 2 bits, in turns.

A decoder of the Llama family, by default of 40M parameters, whose weights are larger than the processor's cache.
Prompt of 32 tokens, 64 new ones, greedy; every run includes prefill. Kernels are rounded to nearest in groups of 64
inputs (`research.nn.quantized`), the embedding table and the norms stay. The memory column is that of the parameters as
they are held, and beside it what `stored_bits` counts: they must agree.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.decode import PROMPT, random_model
from experiments.bench.shapes import SHAPES, Shape
from experiments.bench.turns import Ratios, take_turns
from research.decoding.generator import Generator
from research.nn.quantized import quantize, quantize_kernels
from research.nn.weights import stored_bits

NEW, GROUP = 64, 64
BATCHES = (1, 8)


@dataclasses.dataclass(frozen=True)
class Row(Ratios):
    """One way of storing the weights beside float32. held_bytes: of the parameters on the device; counted_bytes: what
    `stored_bits` says of them."""

    shape: str
    kind: str
    batch: int
    seconds: tuple[float, ...]
    baseline: tuple[float, ...]
    held_bytes: int
    counted_bytes: int


def run(
    shape: Shape = SHAPES["40M"],
    batches: Sequence[int] = BATCHES,
    rounds: int = 5,
    new_tokens: int = NEW,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Measure every way at every batch, and report a line for each."""
    report(
        f"decoding by bits, {PROMPT} + {new_tokens} tokens, greedy; load {os.getloadavg()[0]:.1f} on "
        f"{os.cpu_count()} cores"
    )
    model, params = random_model(shape, PROMPT + new_tokens)
    kernels = {f"int{bits}": _rounded(params, bits) for bits in (8, 4, 2)}
    trees = {"float32": params, "bfloat16": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), **kernels}
    rows = []
    for batch in batches:
        prompts = np.random.default_rng(0).integers(0, shape.vocab, (batch, PROMPT)).tolist()
        calls = {kind: _decoding(model, tree, kind, prompts, new_tokens) for kind, tree in trees.items()}
        seconds = take_turns(calls, rounds)
        for kind, tree in trees.items():
            counted, rest = divmod(stored_bits(tree), 8)
            sizes = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), counted + bool(rest))
            rows.append(Row(shape.name, kind, batch, seconds[kind], seconds["float32"], *sizes))
            speed = batch * new_tokens / statistics.median(seconds[kind])
            report(
                f"{shape.name} batch {batch} {kind:>8}: {speed:8.0f} tokens/s, {rows[-1].ratio:.2f}x float32 (best "
                f"turns {rows[-1].best_ratio:.2f}x), {sizes[0] / 1e6:.1f} MB"
                + ("" if sizes[0] == sizes[1] else f", COUNTED AS {sizes[1] / 1e6:.1f} MB")
            )
    return rows


def _rounded(params: Any, bits: int) -> Any:
    return quantize_kernels(params, jax.jit(lambda kernel: quantize(kernel, bits, GROUP)))


def _decoding(
    model: Any, params: Any, kind: str, prompts: list[list[int]], new_tokens: int
) -> Callable[[], Any]:
    generator = Generator(model, params, dtype="bfloat16" if kind == "bfloat16" else "float32")
    return lambda: generator.generate(prompts, max_new_tokens=new_tokens)
