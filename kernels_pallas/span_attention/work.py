"""Which tiles of the score matrix hold something visible, as lists in the order a TPU goes through them."""

from typing import NamedTuple

import numpy as np

FIRST, LAST, PARTIAL = 1, 2, 4  # flags of a tile


class Work(NamedTuple):
    """One entry a tile, int32[n] each.

    head: query head. row: block of queries. column: block of keys. flags: whether it is the first and the last
    tile of its output block, and whether some of its pairs are masked.
    """

    head: np.ndarray
    row: np.ndarray
    column: np.ndarray
    flags: np.ndarray


def tiles(
    windows: tuple[int, ...], sinks: tuple[int, ...], length: int, block_q: int, block_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """bool [H, query blocks, key blocks]: whether a tile has a visible pair, and whether all are visible.

    `length` is a multiple of both blocks.
    """
    window, sink = (np.asarray(x, np.int64)[:, None, None] for x in (windows, sinks))
    low_q = np.arange(0, length, block_q)[:, None]
    low_k = np.arange(0, length, block_k)
    high_q, high_k = low_q + block_q - 1, low_k + block_k - 1
    # The nearest pair of a tile that has pairs on or below the diagonal.
    some = (low_k <= high_q) & ((np.maximum(low_q - high_k, 0) < window) | (low_k < sink))
    # The farthest pair, and the tile's last column, which a sink must reach.
    every = (high_k <= low_q) & ((high_q - low_k < window) | (high_k < sink))
    return some, every


def _listed(some: np.ndarray, every: np.ndarray, group: int | None) -> Work:
    """By query block, or by key block (and key head, of `group` query heads) where `group` is given.

    An output block without tiles gets its first, fully masked, so that something is written there.
    """
    heads, rows, columns = some.shape
    partial = ~every
    if group is None:
        some = some.copy()
        some[..., 0] |= ~some.any(axis=-1)
        head, row, column = np.nonzero(some)
        output = head * rows + row
    else:
        grouped = some.reshape(heads // group, group, rows, columns).transpose(0, 3, 1, 2).copy()
        grouped[:, :, 0, 0] |= ~grouped.any(axis=(2, 3))
        kv_head, column, member, row = np.nonzero(grouped)
        head = kv_head * group + member
        output = kv_head * columns + column
    change = np.diff(output) != 0
    flags = np.append(True, change) * FIRST + np.append(change, True) * LAST
    flags = flags + partial[head, row, column] * PARTIAL
    return Work(*(x.astype(np.int32) for x in (head, row, column, flags)))


def by_query(
    windows: tuple[int, ...], sinks: tuple[int, ...], length: int, block_q: int, block_k: int
) -> Work:
    """Tiles in the order of heads, query blocks, key blocks."""
    return _listed(*tiles(windows, sinks, length, block_q, block_k), None)


def by_key(
    windows: tuple[int, ...], sinks: tuple[int, ...], length: int, block_q: int, block_k: int, kv_heads: int
) -> Work:
    """Tiles in the order of key heads, key blocks, query heads of the key head, query blocks."""
    return _listed(*tiles(windows, sinks, length, block_q, block_k), len(windows) // kv_heads)
