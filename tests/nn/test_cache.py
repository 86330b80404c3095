"""Caches hold what was appended: against a record of tokens kept in Python lists."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.cache import Cache, DenseCache, RingCache
from research.nn.cpu_kernels import without_cpu_kernels

SLOTS, CAPACITY, ROWS = 4, 16, 3

# One program a shape instead of one an operation.
commit, rollback, select = map(jax.jit, (Cache.commit, Cache.rollback, Cache.select))
read = jax.jit(lambda layer, length: layer.read(length))


def fresh(numbers):
    """Rows whose value says which they are: key = number, value = -number. numbers [B][P] -> [B, 1, P, 1]."""
    key = np.asarray(numbers, np.float32)[:, None, :, None]
    return key, -key


def contents(layer, length):
    """Per row, {index of the token: its key} of the valid slots; values must agree with the keys."""
    key, value, index, valid = map(np.asarray, read(layer, length))
    np.testing.assert_array_equal(key, -value)
    return [
        {int(i): float(k) for i, k, v in zip(index[b], key[b, 0, :, 0], valid[b], strict=True) if v}
        for b in range(key.shape[0])
    ]


def empty(kind, rows=ROWS):
    size = SLOTS if kind is RingCache else CAPACITY
    return Cache((kind.empty(rows, size, 1, 1, jnp.float32),), np.zeros(rows, np.int32))


def test_the_slots_of_a_ring():
    layer = RingCache.empty(3, 4, 1, 1, jnp.float32)
    _, _, index, valid = map(np.asarray, read(layer, np.asarray([6, 2, 0])))
    # Six tokens: 4 and 5 came round to slots 0 and 1. Two tokens: slots 2 and 3 are still empty.
    assert index[0].tolist() == [4, 5, 2, 3] and index[1, :2].tolist() == [0, 1]
    assert valid.tolist() == [[True] * 4, [True, True, False, False], [False] * 4]


def test_more_rows_than_slots_leave_the_last_ones():
    rows = np.arange(18).reshape(3, 6)
    cache = commit(empty(RingCache), (fresh(rows),), None, np.asarray([6, 5, 2]))
    # Row 0 keeps tokens 2..5 of 0..5, row 1 tokens 1..4 of 6..10, row 2 has two.
    assert contents(cache.layers[0], cache.length) == [
        {2: 2, 3: 3, 4: 4, 5: 5},
        {1: 7, 2: 8, 3: 9, 4: 10},
        {0: 12, 1: 13},
    ]


def test_the_sinks_of_a_ring_stay():
    rows = np.arange(24).reshape(3, 8)
    cache = Cache((RingCache.empty(3, 5, 1, 1, jnp.float32, sinks=2),), np.zeros(3, np.int32))
    cache = commit(cache, (fresh(rows),), None, np.asarray([8, 4, 1]))
    # Row 0: sinks 0 and 1, then the newest three of 2..7; row 1 has filled two of the ring's three slots.
    held = contents(cache.layers[0], cache.length)
    assert held == [{0: 0, 1: 1, 5: 5, 6: 6, 7: 7}, {0: 8, 1: 9, 2: 10, 3: 11}, {0: 16}]
    cache = rollback(cache, np.asarray([7, 1, 0]))
    cache = commit(cache, (fresh(rows[:, :2] + 100),), None, np.asarray([2, 2, 2]))
    held = contents(cache.layers[0], cache.length)
    assert {i: held[0][i] for i in (0, 1, 6, 7, 8)} == {0: 0, 1: 1, 6: 6, 7: 100, 8: 101}
    assert held[1:] == [{0: 8, 1: 108, 2: 109}, {0: 116, 1: 117}]


@pytest.mark.parametrize("kind", [DenseCache, RingCache])
def test_appends_roll_backs_and_selection_follow_a_record(kind):
    """Random commits of up to 6 rows (more than the ring has) with unequal counts, and small roll-backs."""
    rng = np.random.default_rng(0)
    cache, record, newest = empty(kind), [[] for _ in range(ROWS)], [0] * ROWS
    number = 0
    for step in range(12):
        if step % 4 == 3:
            back = rng.integers(0, 3, ROWS)
            lengths = [max(len(r) - int(k), 0) for r, k in zip(record, back, strict=True)]
            cache = rollback(cache, np.asarray(lengths))
            record = [r[: max(len(r) - int(k), 0)] for r, k in zip(record, back, strict=True)]
        else:
            size = 6 if step == 1 else 2
            count = rng.integers(0, size + 1, ROWS)
            rows = number + np.arange(ROWS * size).reshape(ROWS, size)
            number += rows.size
            cache = commit(cache, (fresh(rows),), None, count)
            record = [r + rows[b, : count[b]].tolist() for b, r in enumerate(record)]
            newest = [max(n, len(r)) for n, r in zip(newest, record, strict=True)]
        assert cache.length.tolist() == [len(r) for r in record]
        held = contents(cache.layers[0], cache.length)
        for b, tokens in enumerate(record):
            # What a ring has overwritten is gone: all but the last SLOTS of the longest it has been.
            first = 0 if kind is DenseCache else max(newest[b] - SLOTS, 0)
            assert {i: k for i, k in held[b].items() if i >= first} == dict(enumerate(tokens[first:], first))
            if newest[b] == len(tokens):
                assert min(held[b], default=first) == first
    chosen = select(cache, np.asarray([2, 0, 2, 2]))
    assert chosen.length.tolist() == [len(record[b]) for b in (2, 0, 2, 2)]
    assert contents(chosen.layers[0], chosen.length) == [
        contents(cache.layers[0], cache.length)[b] for b in (2, 0, 2, 2)
    ]


@pytest.mark.parametrize("kind", [DenseCache, RingCache])
def test_a_path_picks_the_rows_of_an_accepted_branch(kind):
    cache = commit(empty(kind, 2), (fresh([[10, 11], [20, 21]]),), None, np.asarray([2, 1]))
    drafted = fresh([[30, 31, 32, 33], [40, 41, 42, 43]])
    cache = commit(cache, (drafted,), np.asarray([[0, 2], [0, 3]]), np.asarray([2, 1]))
    assert cache.length.tolist() == [4, 2]
    # Row 0 keeps nodes 0 and 2; row 1 node 0 alone.
    assert contents(cache.layers[0], cache.length) == [{0: 10, 1: 11, 2: 30, 3: 32}, {0: 20, 1: 40}]


@pytest.mark.parametrize("kernels", [True, False])
def test_many_rows_are_written_like_few(kernels):
    """Without kernels the dense cache writes more than 16 rows by a scatter."""
    way = contextlib.nullcontext() if kernels else without_cpu_kernels()
    commit = jax.jit(lambda cache, *rest: cache.commit(*rest))  # traced anew
    rows = np.arange(40).reshape(20, 2)
    count = np.asarray([1, 2] * 10)
    with way:
        cache = commit(empty(DenseCache, 20), (fresh(rows),), None, count)
        cache = commit(cache, (fresh(rows + 100),), None, count)
    # A row with one token: its second fresh row was written behind the end and covered by the next append.
    held = contents(cache.layers[0], cache.length)
    assert held[0] == {0: 0, 1: 100} and held[1] == {0: 2, 1: 3, 2: 102, 3: 103}


def test_roll_back_never_lengthens_and_the_cache_keeps_its_dtype():
    cache = commit(empty(DenseCache, 2), (fresh([[1, 2], [3, 4]]),), None, np.asarray([2, 1]))
    assert rollback(cache, np.asarray([1, 9])).length.tolist() == [1, 1]
    half = Cache((DenseCache.empty(1, 4, 1, 1, jnp.bfloat16),), np.zeros(1, np.int32))
    assert commit(half, (fresh([[1]]),), None, np.asarray([1])).layers[0].key.dtype == jnp.bfloat16
