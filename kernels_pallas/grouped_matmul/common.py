"""Which tile of rows and which group each step of a kernel works on, and tile sizes.

Groups end anywhere, so a tile at a boundary is visited once for each of its groups (MegaBlocks, arXiv 2211.15841, and
JAX's megablox kernel). The number of steps is static, tiles + groups - 1 at most; those beyond the needed ones do
nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Schedule(NamedTuple):
    """group, weight, tile int32[steps]; offsets int32[groups + 1], the rows where groups begin and the last one ends;
    count int32[1], the steps that are needed. `weight` is the matrix to fetch, also where none is multiplied."""

    group: jax.Array
    weight: jax.Array
    tile: jax.Array
    offsets: jax.Array
    count: jax.Array


def schedule(sizes: jax.Array, rows: int, tile: int, *, gradient: bool) -> Schedule:
    """Steps in the order of rows. The rows behind all groups make a last group E, whose output is 0.

    gradient: for the gradient of the matrices instead: no such group, and empty ones are visited once, as their
    gradient is 0.
    """
    experts = sizes.shape[0]
    tiles = -(-rows // tile)
    ends = jnp.minimum(jnp.cumsum(sizes.astype(jnp.int32)), rows)
    if not gradient:
        ends = jnp.append(ends, rows)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    used = jnp.where(ends > starts, -(-ends // tile) - starts // tile, 1 if gradient else 0)
    last = jnp.cumsum(used)
    step = jnp.minimum(jnp.arange(tiles + experts), last[-1] - 1)
    group = jnp.sum(last <= step[:, None], axis=1, dtype=jnp.int32)
    place = jnp.minimum(starts[group] // tile + step - (last - used)[group], tiles - 1)
    filled = jnp.where(sizes > 0, jnp.arange(experts), 0)
    weight = jnp.minimum(group, jnp.max(filled))
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    return Schedule(*(x.astype(jnp.int32) for x in (group, weight, place, offsets, last[-1:])))


def divisor(size: int, most: int, least: int) -> int | None:
    """The greatest block of at most `most` that divides `size` and is `least` times a power of two; None if there is
    none."""
    block = least
    if size % block:
        return None
    while block * 2 <= most and size % (block * 2) == 0:
        block *= 2
    return block
