"""Pairs sorted by expert, and rows picked, weighed and summed on a CPU: by hand and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import cpu_rows


def whole(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def test_pairs_by_hand():
    # Three tokens with two choices, the second one padding. Expert 0: first choice of token 2 (pair 4), second of token
    # 0 (pair 1); expert 2: first choice of token 0 (pair 0), second of token 2 (pair 5).
    index, mask = np.int32([[2, 0], [0, 2], [0, 2]]), np.array([True, False, True])
    slots, pairs, counts = cpu_rows.sort_pairs(index, mask, 3, 7)
    assert pairs.tolist() == [4, 1, 0, 5, 6, 6, 6] and counts.tolist() == [2, 0, 2]
    assert slots.tolist() == [[2, 1], [7, 7], [0, 3]]


@pytest.mark.parametrize(
    "tokens, k, experts, room", [(1, 1, 1, 0), (50, 3, 7, 5), (300, 2, 64, 0), (40, 1, 2, 99)]
)
def test_pairs_against_numpy(tokens: int, k: int, experts: int, room: int):
    draw = np.random.default_rng(tokens)
    index, mask = draw.integers(0, experts, (tokens, k)).astype(np.int32), draw.random(tokens) < 0.8
    total = tokens * k
    slots, pairs, counts = jax.jit(cpu_rows.sort_pairs, static_argnums=(2, 3))(
        index, mask, experts, total + room
    )
    keys = np.where(mask[:, None], index, experts).T.ravel()  # first choices first
    order = np.argsort(keys, kind="stable")[: mask.sum() * k]
    order = order % tokens * k + order // tokens
    wanted = np.full(total + room, total)
    wanted[: len(order)] = order
    assert np.array_equal(pairs, wanted)
    inverse = np.full(total, total + room)
    inverse[order] = np.arange(len(order))
    assert np.array_equal(slots, inverse.reshape(tokens, k))
    assert np.array_equal(counts, np.bincount(index[mask].ravel(), minlength=experts))


WIDTHS = [1, 7, 16, 70, 333]


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_of_weighed_rows(width: int, lanes: int):
    # 130 results: more than two pieces. An index outside of the rows adds nothing, also where it is the first or all.
    rows, weights = whole((40, width)), whole((130, 3), 1)
    index = np.random.default_rng(2).integers(-3, 43, (130, 3)).astype(np.int32)
    index[7], index[8, 0] = 40, -1
    there = (index >= 0) & (index < 40)
    wanted = (np.where(there, weights, 0)[..., None] * rows[np.clip(index, 0, 39)]).sum(1)
    assert np.array_equal(cpu_rows.weighted_rows(rows, index, weights, lanes), wanted)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("width", WIDTHS)
def test_their_gradient(width: int, lanes: int):
    tokens, k, slots = 70, 2, 150
    pairs = np.full(slots, tokens * k, np.int32)
    places = np.random.default_rng(0).permutation(slots)[:130]  # ten pairs have no slot, twenty slots no pair
    pairs[places] = np.random.default_rng(1).permutation(tokens * k)[:130]
    rows, weights, dy = whole((slots, width)), whole((tokens, k), 1), whole((tokens, width), 2)
    rows[pairs == tokens * k] = np.nan  # nobody reads them
    d_rows, d_weights = cpu_rows.weighted_rows_gradient(rows, weights, pairs, dy, lanes)
    wanted_rows, wanted_weights = np.zeros((slots, width)), np.zeros(tokens * k)
    for slot, pair in enumerate(pairs):
        if pair < tokens * k:
            wanted_rows[slot] = weights.ravel()[pair] * dy[pair // k]
            wanted_weights[pair] = rows[slot] @ dy[pair // k]
    assert np.array_equal(d_rows, wanted_rows)
    assert np.array_equal(d_weights, wanted_weights.reshape(tokens, k))


def test_under_vmap():
    rows, index, weights = (
        whole((2, 9, 5)),
        np.int32([[[0, 8], [3, 3]], [[9, 1], [2, 0]]]),
        whole((2, 2, 2), 1),
    )
    found = jax.jit(jax.vmap(cpu_rows.weighted_rows))(rows, index, weights)
    for y, x, i, w in zip(found, rows, index, weights, strict=True):
        assert np.array_equal(y, cpu_rows.weighted_rows(jnp.asarray(x), i, w))
