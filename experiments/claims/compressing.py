"""What the claims about compressed weights share: the model that ships, held-out text, and what a chain costs."""

import functools
import math
from typing import Any

import jax
import numpy as np

from research.compression.blocks import SELECT, kernels_at, plain, selected
from research.compression.chain import Chain, Method
from research.data.text import TokenDataset
from research.language import BASE
from research.nn.weights import stored_bits
from research.training.evaluators import means
from research.training.model_directory import Loaded
from research.training.task import LanguageModelling
from research.training.workdir import load_model

LENGTH, ROWS, TOKENS = 512, 16, 8192
OTHER = "arithmetic"  # a source of another domain than that of the model, Python code


@functools.cache
def base() -> Loaded:
    return load_model(BASE)


@functools.cache
def held_out(source: str) -> dict[str, np.ndarray]:
    data = TokenDataset(source, "validation", LENGTH, base().tokenizer, shuffle=False)
    return data.take(np.arange(ROWS))


@functools.cache
def unseen(length: int, count: int, seed: int) -> dict[str, np.ndarray]:
    """`count` rows of the code that no training or calibration sees, others for every seed."""
    data = TokenDataset("builtin", "test", length, str(BASE), shuffle=False)
    return data.take(np.arange(count) + count * seed)


@functools.cache
def _program() -> Any:
    return jax.jit(LanguageModelling(base().model).evaluate)


def loss(params: Any, source: str = "builtin") -> float:
    """Nats a token of held-out text, with kernels multiplied out."""
    return means(_program()(plain(params), held_out(source)), "claim")["loss"]


def compress(
    methods: tuple[Method, ...],
    seed: int,
    params: Any = None,
    original: Any = None,
    sources: str = "builtin",
    tokens: int = TOKENS,
) -> Any:
    """What a chain makes of the base model, or of `params`."""
    chain = Chain(methods, sources, tokens, LENGTH, seed=seed)
    batches = chain.batches(base().model, base().tokenizer) if chain.needs_data else []
    *_, last = chain.run(base().model, base().params if params is None else params, batches, original)
    return last.params


def costs(params: Any) -> dict[str, float]:
    """budget: bits a weight of the kernels of blocks; bytes: of the whole model."""
    kernels = kernels_at(params, selected(params, SELECT))
    count = sum(math.prod(kernel.shape) for kernel in kernels.values())
    return {"budget": stored_bits(kernels) / count, "bytes": stored_bits(params) // 8}
