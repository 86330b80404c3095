"""Decoders whose laws can be enumerated: logits are a function of a few numbers about the tokens so far."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.decoding import engine as engines


class Memory(struct.PyTreeNode):
    """The first token of every row, the sum of all, and how many: what such a decoder caches."""

    first: jax.Array
    total: jax.Array
    length: jax.Array

    def commit(self, fresh, path, count):
        rows = fresh if path is None else jnp.take_along_axis(fresh, path, axis=1)
        kept = jnp.where(jnp.arange(rows.shape[1]) < count[:, None], rows, 0)
        first = jnp.where(self.length == 0, rows[:, 0], self.first)
        return Memory(first, self.total + kept.sum(1), self.length + count)


@dataclasses.dataclass(frozen=True, eq=False)
class Recalling:
    """rule(first, total, last), each int32[B, N], -> logits float32[B, N, V] after the token `last`; `total` sums all
    tokens up to it. Prompts have one token, drafts are chains."""

    rule: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    vocab_size: int
    max_length: int = 64

    def init_cache(self, batch, capacity, dtype, margin):
        zero = jnp.zeros((batch,), jnp.int32)
        return Memory(zero, zero, zero)

    def apply(self, variables, tokens, *args, method):
        if method == "prefill":
            logits = self.rule(tokens, tokens, tokens)
            return logits[:, 0], logits, tokens
        cache = args[0]
        first = jnp.broadcast_to(cache.first[:, None], tokens.shape)
        logits = self.rule(first, cache.total[:, None] + jnp.cumsum(tokens, axis=1), tokens)
        return logits, logits, tokens


@dataclasses.dataclass(frozen=True)
class Call:
    """What one call changed: tokens gained int[rows] and the proposer's state before it."""

    gained: np.ndarray
    before: Any


def run(model, proposer, verifier, *, rows, length, start, processors=(), params=()):
    """Decode `length` tokens after the prompt [start], in one program: tokens [rows, length], drafted [rows]."""
    engine, weights, state, ends = _prefilled(
        model, proposer, verifier, rows, length, start, processors, params
    )
    stopped = jnp.zeros((rows,), bool)
    state = jax.jit(engine.decode)(weights, state, stopped, jnp.int32(length), ends)
    assert np.all(np.asarray(state.count) == length)
    return np.asarray(state.tokens)[:, :length], np.asarray(state.drafted)


def calls(model, proposer, verifier, *, rows, length, start, processors=(), params=()):
    """The same, call by call: tokens [rows, length] and what every call did."""
    engine, weights, state, ends = _prefilled(
        model, proposer, verifier, rows, length, start, processors, params
    )
    stopped, done = jnp.zeros((rows,), bool), []
    decode = jax.jit(engine.decode)
    while not np.all(np.asarray(state.done)):
        count, before = np.asarray(state.count), state.proposer
        state = decode(weights, state, stopped, jnp.int32(1), ends)
        done.append(Call(np.asarray(state.count) - count, before))
    return np.asarray(state.tokens)[:, :length], done


def _prefilled(model, proposer, verifier, rows, length, start, processors, params):
    engine = engines.Engine(model, proposer, verifier, capacity=length + proposer.levels + 1)
    weights, ends = engines.Weights(params, (), processors), jnp.zeros((0,), jnp.int32)
    ones = jnp.ones((rows,), jnp.int32)
    keys = engines.row_keys(0, jnp.arange(rows), 1)
    state = jax.jit(engine.prefill)(weights, jnp.full((rows, 1), start), ones, length * ones, keys, ends)
    return engine, weights, state, ends
