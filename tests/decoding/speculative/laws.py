"""The enumerated law of a Markov chain, for drafters that write with a model of their own."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.decoding import engine as engines

from ..test_verify import START, TABLE, TABLES, VOCAB, MarkovModel

LENGTH, ROWS = 4, 40_000
MIXED = TABLES["mixed"]


class Markov(MarkovModel):
    """A chain over `VOCAB` tokens that can be a target and a draft model; its hidden states are its logits."""

    vocab_size, max_length = VOCAB, 64


TARGET = Markov(TABLE)


def run(
    proposer: Any,
    params: Any,
    verifier: Any,
    *,
    target: Markov = TARGET,
    length: int = LENGTH,
    rows: int = ROWS,
) -> engines.State:
    """The state after `length` tokens in each of `rows` rows that begin with START."""
    engine = engines.Engine(target, proposer, verifier, capacity=length + 2 * proposer.levels)

    @jax.jit
    def whole(params, seed, ones):
        weights, ends = engines.Weights((), params, ()), jnp.zeros((0,), jnp.int32)
        keys = engines.row_keys(seed, jnp.arange(rows), 1)
        state = engine.prefill(weights, START * ones[:, None], ones, length * ones, keys, ends)
        return engine.decode(weights, state, jnp.zeros((rows,), bool), jnp.int32(10 * length), ends)

    state = whole(params, 0, np.ones((rows,), np.int32))
    assert np.all(np.asarray(state.count) == length)
    return state


def distance(state: engines.State, table: jax.Array = TABLE, length: int = LENGTH) -> float:
    """Total variation between the outputs and the law of plain sampling; sampling noise alone gives 0.02."""
    table = np.asarray(table, np.float64)
    strings = list(itertools.product(range(VOCAB), repeat=length))
    law = [np.prod([table[a, b] for a, b in zip((START, *s[:-1]), s, strict=True)]) for s in strings]
    tokens = np.asarray(state.tokens)[:, :length]
    numbers = tokens @ VOCAB ** np.arange(length - 1, -1, -1)
    return 0.5 * np.abs(np.bincount(numbers, minlength=len(law)) / len(tokens) - law).sum()
