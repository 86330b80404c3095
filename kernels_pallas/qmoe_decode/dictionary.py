"""QMoE's code of ternary matrices: 16 bits for up to 28 weights (arXiv 2310.16795, section 4).

Weights are symbols, 0 for zero, 1 for the row's least and 2 for its greatest value. They are taken as independent, zero
with probability P0 = 0.885. A word is a run of 1 to 14 pairs of symbols; the dictionary has the 65,536 most probable
ones. A prefix of a word is more probable than the word, so it is a word, too: rows are coded by the longest match.

Equally probable words (as many zeros, as many others) lie in descending lexicographic order, and of the last such class
the first ones are taken. Nothing depends on how probabilities round, so the dictionary is the same everywhere;
`fingerprint` is saved with what it coded.
"""

import functools
import hashlib
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

WORDS, PAIRS, P0 = 1 << 16, 14, 0.885
LONGEST = 2 * PAIRS  # weights of a word
BITS = WORDS * 64  # of the table


@functools.cache
def words() -> tuple[np.ndarray, np.ndarray]:
    """The dictionary: symbols uint8[65536, 28], 0 behind a word's end, and pairs uint8[65536] of each word."""
    zero, other = math.log(P0), math.log((1 - P0) / 2)
    classes = [(length, n) for length in range(2, LONGEST + 1, 2) for n in range(length + 1)]
    classes.sort(key=lambda c: -((c[0] - c[1]) * zero + c[1] * other))
    symbols, pairs, left = [], [], WORDS
    for length, n in classes:
        values = _of_class(length, n)[:left]
        digits = values[:, None] // 3 ** np.arange(length - 1, -1, -1) % 3
        symbols.append(np.pad(digits.astype(np.uint8), ((0, 0), (0, LONGEST - length))))
        pairs.append(np.full(len(values), length // 2, np.uint8))
        left -= len(values)
        if not left:
            break
    return np.concatenate(symbols), np.concatenate(pairs)


def _of_class(length: int, others: int) -> np.ndarray:
    """All words of a length with so many symbols that are not 0, as numbers to base 3, descending."""
    places = np.array(list(itertools.combinations(range(length), others)), np.int64)
    signs = np.array(list(itertools.product((1, 2), repeat=others)), np.int64)
    powers = 3 ** (length - 1 - places)
    return np.sort((powers[:, None] * signs[None]).sum(axis=-1).ravel())[::-1]


@functools.cache
def table() -> np.ndarray:
    """uint32[65536, 2], as the paper has it: bits 0 to 3 of both are a word's pairs, and bits 4 + 2k and 5 + 2k of the
    first its symbol k, of the second its symbol 14 + k. 512 KiB."""
    symbols, pairs = words()
    halves = symbols.reshape(-1, 2, PAIRS).astype(np.uint32)
    shifted = halves << np.arange(4, 4 + 2 * PAIRS, 2, dtype=np.uint32)
    return shifted.sum(axis=-1, dtype=np.uint32) | pairs[:, None].astype(np.uint32)


@functools.cache
def fingerprint() -> str:
    """16 hex digits of the table."""
    return hashlib.sha256(table().astype("<u4").tobytes()).hexdigest()[:16]


@functools.cache
def _trie() -> np.ndarray:
    """int32[65537, 9]: node 0 is the root and node i + 1 word i; the node a pair a + 3b leads to, 0 for none."""
    symbols, pairs = words()
    steps = symbols.reshape(-1, PAIRS, 2).astype(np.int64) @ np.array([1, 3])
    # A word's number to base 10 with its pairs as digits 1 to 9, and its prefix's: at most 14 digits.
    there = np.arange(PAIRS) < pairs[:, None]
    names = ((steps + 1) * there * 10 ** np.arange(PAIRS)).sum(axis=1)
    last = steps[np.arange(WORDS), pairs - 1]
    prefixes = names - (last + 1) * 10 ** (pairs.astype(np.int64) - 1)
    order = np.argsort(names)
    found = np.searchsorted(names[order], prefixes)
    parent = np.where(prefixes == 0, 0, order[np.minimum(found, WORDS - 1)] + 1)
    children = np.zeros((WORDS + 1, 9), np.int32)
    children[parent, last] = np.arange(1, WORDS + 1)
    return children


def encode(symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols uint8[rows, width] -> codes uint16[n], row after row, and offsets int32[rows + 1] of the rows.

    The longest match, pair by pair, all rows at once. Rows of odd width end in a 0 of their own.
    """
    rows, width = symbols.shape
    padded = np.pad(symbols, ((0, 0), (0, width % 2)))
    steps = padded.reshape(rows, -1, 2).astype(np.int32) @ np.array([1, 3], np.int32)
    trie, node = _trie(), np.zeros(rows, np.int32)
    emitted = np.full((rows, steps.shape[1] + 1), -1, np.int32)
    for j in range(steps.shape[1]):
        following = trie[node, steps[:, j]]
        done = following == 0
        emitted[done, j] = node[done] - 1
        node = np.where(done, trie[0, steps[:, j]], following)
    emitted[:, -1] = node - 1
    there = emitted >= 0
    offsets = np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32)
    return emitted[there].astype(np.uint16), offsets


def decode(codes: jax.Array, count: jax.Array, rows: int, width: int) -> jax.Array:
    """The first `count` of codes uint16[n] -> symbols uint8[rows, width]. Static shapes, no loop.

    Every row ends with a word of its own, so words lie one behind the other through the whole matrix: each place finds
    the word that covers it by a sum of the beginnings before it.
    """
    even = width + width % 2
    word = jnp.asarray(table())[codes.astype(jnp.int32)]
    length = 2 * (word[:, 0] & 15).astype(jnp.int32)
    length = jnp.where(jnp.arange(codes.shape[0]) < count, length, 0)
    start = jnp.cumsum(length) - length
    begins = (
        jnp.zeros(rows * even, jnp.int32).at[jnp.where(length > 0, start, rows * even)].add(1, mode="drop")
    )
    covering = jnp.cumsum(begins) - 1
    place = jnp.arange(rows * even) - start[covering]
    second = place >= PAIRS
    half = jnp.where(second, word[covering, 1], word[covering, 0])
    shift = 4 + 2 * (place - PAIRS * second)
    symbols = (half >> shift.astype(jnp.uint32)) & 3
    return symbols.astype(jnp.uint8).reshape(rows, even)[:, :width]
