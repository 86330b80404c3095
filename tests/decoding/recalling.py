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
    engine = _engine(model, proposer, verifier, length)

    @jax.jit
    def whole(weights, seed, ones):
        state, stopped, ends = _prefilled(engine, weights, seed, ones, length, start)
        return engine.decode(weights, state, stopped, jnp.int32(length), ends)

    state = whole(engines.Weights(params, (), processors), 0, np.ones((rows,), np.int32))
    assert np.all(np.asarray(state.count) == length)
    return np.asarray(state.tokens)[:, :length], np.asarray(state.drafted)


def calls(model, proposer, verifier, *, rows, length, start, processors=(), params=()):
    """The same, call by call: tokens [rows, length] and what every call did."""
    engine, weights, done = (
        _engine(model, proposer, verifier, length),
        engines.Weights(params, (), processors),
        [],
    )

    @jax.jit
    def first(weights, seed, ones):
        return _prefilled(engine, weights, seed, ones, length, start)

    state, stopped, ends = first(weights, 0, np.ones((rows,), np.int32))
    decode, one = jax.jit(engine.decode), np.int32(1)
    while not np.all(np.asarray(state.done)):
        count, before = np.asarray(state.count), state.proposer
        state = decode(weights, state, stopped, one, ends)
        done.append(Call(np.asarray(state.count) - count, before))
    return np.asarray(state.tokens)[:, :length], done


def _engine(model, proposer, verifier, length):
    return engines.Engine(model, proposer, verifier, capacity=length + proposer.levels + 1)


def _prefilled(engine, weights, seed, ones, length, start):
    """The state after the prompts, which rows are stopped, and the tokens that end a row; ones int32[rows]."""
    ends, keys = jnp.zeros((0,), jnp.int32), engines.row_keys(seed, jnp.arange(ones.shape[0]), 1)
    state = engine.prefill(weights, start * ones[:, None], ones, length * ones, keys, ends)
    return state, ones < 0, ends
