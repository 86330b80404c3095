"""Attention over positions that are divided among devices: keys and values travel in a ring (arXiv 2310.01889).

Device i of the mesh axis `seq` holds queries, keys and values of positions i T/n ... (i + 1) T/n - 1. In n turns it
meets every block of keys; after each it passes the block on. Of the blocks met so far it keeps, for every query, the
largest score m, the sum l of exp(score - m), and the sum o of exp(score - m) v (equations of the online softmax):

    m' = max(m, max_j s_j)    l' = l e^(m - m') + sum_j e^(s_j - m')    o' = o e^(m - m') + sum_j e^(s_j - m') v_j

and o / l is attention, exactly. No device ever holds more than its own positions and one block of the others'. The
backward pass computes the scores of a block again (`jax.checkpoint`).
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research.errors import UserError
from research.nn.attention_kernels import (
    NEGATIVE,
    AttentionKernel,
    AutoAttention,
    cap,
    group_mask,
    group_queries,
)
from research.nn.masks import Full, MaskRule

BATCH, HEADS, POSITIONS = ("data", "fsdp", "expert"), "tensor", "seq"


@dataclasses.dataclass(frozen=True)
class RingAttention:
    """For meshes whose axis `seq` is above 1; elsewhere `alone` computes it.

    Batch and heads stay divided as they are. Every block of keys is computed, also those that a causal rule masks
    whole, so causal attention costs twice what it must. Raises `UserError` where positions, or heads under `tensor`,
    are no multiple of the axis, and for rules that differ between heads under `tensor`.
    """

    divides_positions: ClassVar[bool] = True  # what a trainer asks where its mesh has `seq`

    alone: AttentionKernel = AutoAttention()

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        rule: MaskRule,
        *,
        segments: jax.Array | None,
        prefix: jax.Array | None,
        scale: float,
        softcap: float | None,
    ) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        turns = dict(mesh.shape).get(POSITIONS, 1)
        numbers = dict(scale=scale, softcap=softcap)
        if turns == 1:
            return self.alone(query, key, value, rule, segments=segments, prefix=prefix, **numbers)
        _check(query, key, rule, dict(mesh.shape))
        batch = (
            BATCH if query.shape[0] % _size(mesh, BATCH) == 0 else None
        )  # a model is initialised with one row
        rows = PartitionSpec(batch, HEADS, POSITIONS, None)
        if segments is None:
            segments = jnp.ones((query.shape[0], query.shape[2]), jnp.int32)
        if prefix is None:
            prefix = jnp.zeros((query.shape[0],), jnp.int32)
        ring = functools.partial(_ring, rule=rule, turns=turns, **numbers)
        return jax.shard_map(
            ring,
            mesh=mesh,
            in_specs=(rows, rows, rows, PartitionSpec(batch, POSITIONS), PartitionSpec(batch)),
            out_specs=rows,
            check_vma=False,
        )(query, key, value, segments, prefix)


def _size(mesh: Any, axes: tuple[str, ...]) -> int:
    shape, size = dict(mesh.shape), 1
    for name in axes:
        size *= shape.get(name, 1)
    return size


def _check(query: jax.Array, key: jax.Array, rule: MaskRule, sizes: dict[str, int]) -> None:
    turns, parts = sizes[POSITIONS], sizes.get(HEADS, 1)
    if query.shape[2] % turns:
        raise UserError(
            f"RingAttention: {query.shape[2]} positions are no multiple of the mesh's seq={turns}"
        )
    if query.shape[1] % parts or key.shape[1] % parts:
        raise UserError(
            f"RingAttention: {query.shape[1]} heads over {key.shape[1]} key heads are no multiple of tensor={parts}"
        )
    if (
        parts > 1
        and jax.eval_shape(lambda i: rule.allowed(i, i, None), jnp.zeros((1, 1), jnp.int32)).shape[1] > 1
    ):
        raise UserError(f"RingAttention: the rule {rule} differs between heads, which tensor={parts} divides")


def _ring(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    prefix: jax.Array,
    *,
    rule: MaskRule,
    turns: int,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """One device's part. query [B, H, t, d], key and value [B, Hkv, t, d], segments [B, t] of its own positions."""
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    grouped = group_queries(query, kv_heads)  # [B, Hkv, G t, d]
    mine = jax.lax.axis_index(POSITIONS)
    positions = jnp.arange(length)[None]
    onward = [(i, (i + 1) % turns) for i in range(turns)]

    def scores_of(key: jax.Array, other: jax.Array, source: jax.Array) -> jax.Array:
        """Masked scores [B, Hkv, G t, t] of the block that came from device `source`."""
        numbers = (((3,), (3,)), ((0, 1), (0, 1)))
        scores = jax.lax.dot_general(grouped, key, numbers, preferred_element_type=jnp.float32)
        scores = cap(scores * scale, softcap).reshape(batch, kv_heads, heads // kv_heads, length, length)
        mask = (segments[:, None, :, None] == other[:, None, None, :]) & (other[:, None, None, :] > 0)
        if not isinstance(rule, Full):
            own, theirs = mine * length + positions, source * length + positions
            mask = mask & rule.allowed(own, theirs, prefix)
        return jnp.where(group_mask(mask, heads, kv_heads), scores, NEGATIVE).reshape(
            *grouped.shape[:3], length
        )

    @jax.checkpoint
    def meet(
        sums: tuple[jax.Array, ...], key: jax.Array, value: jax.Array, other: jax.Array, turn: jax.Array
    ) -> tuple:
        largest, total, out = sums
        scores = scores_of(key, other, (mine - turn) % turns)
        higher = jnp.maximum(largest, scores.max(-1))
        weights, kept = jnp.exp(scores - higher[..., None]), jnp.exp(largest - higher)
        numbers = (((3,), (2,)), ((0, 1), (0, 1)))
        found = jax.lax.dot_general(
            weights.astype(value.dtype), value, numbers, preferred_element_type=jnp.float32
        )
        return higher, total * kept + weights.sum(-1), out * kept[..., None] + found

    def turn(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        sums, block = carry
        sums = meet(sums, *block, number)
        return (sums, jax.lax.ppermute(block, POSITIONS, onward)), None

    shape = grouped.shape[:3]
    sums = (jnp.full(shape, NEGATIVE, jnp.float32), jnp.zeros(shape), jnp.zeros((*shape, dim), jnp.float32))
    (sums, block), _ = jax.lax.scan(turn, (sums, (key, value, segments)), jnp.arange(turns - 1))
    _, total, out = meet(sums, *block, jnp.int32(turns - 1))  # nobody waits for the last block
    return (out / total[..., None]).astype(query.dtype).reshape(batch, heads, length, dim)
