"""Attention over positions that are divided among devices: keys and values travel in a ring (arXiv 2310.01889).

Device i of the mesh axis `seq` holds queries, keys and values of positions i T/n ... (i + 1) T/n - 1. Turn by turn it
meets the others' blocks of keys; after each it passes the block on. Of the blocks met so far it keeps, for every query,
the largest score m, the sum l of exp(score - m), and the sum o of exp(score - m) v (equations of the online softmax):

    m' = max(m, max_j s_j)    l' = l e^(m - m') + sum_j e^(s_j - m')    o' = o e^(m - m') + sum_j e^(s_j - m') v_j

and o / l is attention, exactly. The backward pass goes round once more: it computes the scores of a block again from
m and l, and the gradients of keys and values travel with their block, and home at the end. So no device ever holds more
than its own positions and one block of the others', in neither pass.

**What a rule masks whole is not computed.** Positions lie in chunks; pairs of chunks in which no query may see a key
are left out, and so are the turns at the end in which nobody has any left. A causal rule leaves half of the pairs, but
device n - 1 would have twice the work of the average and all wait for it. So the chunks change hands first, to

    device i: chunks i and 2n - 1 - i of 2n    ("zig-zag", a form of striped attention, arXiv 2311.09431)

and every device computes two pairs of four in every turn, and three in the first. See `schedule`. What a rule of
prefixes or steps leaves out depends on the rows: every device asks before each pair, and all turns are made.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from research.errors import UserError
from research.nn.attention_kernels import (
    NEGATIVE,
    PTG,
    PV,
    QK,
    AttentionKernel,
    AutoAttention,
    cap,
    group_mask,
    group_queries,
    head_product,
)
from research.nn.masks import Full, MaskRule

BATCH, HEADS, POSITIONS = ("data", "fsdp", "expert"), "tensor", "seq"

Sums = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class RingAttention:
    """For meshes whose axis `seq` is above 1; elsewhere `alone` computes it.

    Batch and heads stay divided as they are. Raises `UserError` where positions, or heads under `tensor`, are no
    multiple of the axis, and for rules that differ between heads under `tensor`.
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
        parts = dict(mesh.shape).get(POSITIONS, 1)
        numbers = dict(scale=scale, softcap=softcap)
        if parts == 1:
            return self.alone(query, key, value, rule, segments=segments, prefix=prefix, **numbers)
        _check(query, key, rule, prefix, dict(mesh.shape))
        batch = (
            BATCH if query.shape[0] % _size(mesh, BATCH) == 0 else None
        )  # a model is initialised with one row
        rows = PartitionSpec(batch, HEADS, POSITIONS, None)
        if segments is None:
            segments = jnp.ones((query.shape[0], query.shape[2]), jnp.int32)
        asks = rule.by_prefix and prefix is not None
        ring = _Ring(rule, schedule(rule, parts, query.shape[2], asks), **numbers)
        return jax.shard_map(
            functools.partial(_part, ring),
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


def _check(
    query: jax.Array, key: jax.Array, rule: MaskRule, prefix: jax.Array | None, sizes: dict[str, int]
) -> None:
    turns, parts = sizes[POSITIONS], sizes.get(HEADS, 1)
    if query.shape[2] % turns:
        raise UserError(
            f"RingAttention: {query.shape[2]} positions are no multiple of the mesh's seq={turns}"
        )
    if query.shape[1] % parts or key.shape[1] % parts:
        raise UserError(
            f"RingAttention: {query.shape[1]} heads over {key.shape[1]} key heads are no multiple of tensor={parts}"
        )
    place = jnp.zeros((1, 1), jnp.int32)
    if parts > 1 and jax.eval_shape(rule.allowed, place, place, prefix).shape[1] > 1:
        raise UserError(f"RingAttention: the rule {rule} differs between heads, which tensor={parts} divides")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which chunks of positions a device holds during the ring, and which pairs of chunks it computes.

    holders: the chunks of each of n devices, of n c equal ones. seen: [n c][n c], whether any query of one chunk may
    see a key of the other. asks: whether it depends on the rows which of these pairs are computed.
    """

    holders: tuple[tuple[int, ...], ...]
    seen: tuple[tuple[bool, ...], ...]
    asks: bool = False

    @property
    def parts(self) -> int:
        return len(self.holders)

    @property
    def zigzag(self) -> bool:
        """Whether devices hold other positions than before the ring."""
        return self.holders[0] != tuple(range(len(self.holders[0])))

    def pairs(self) -> np.ndarray:
        """int[turns, n]: the pairs that each device computes, at most, when it meets the block of device i - turn."""
        holders, seen = np.array(self.holders), np.array(self.seen)
        device = np.arange(self.parts)
        met = holders[(device - device[:, None]) % self.parts]  # [turn, device, c]
        found = seen[holders[None, :, :, None], met[:, :, None, :]].sum((2, 3))
        return found[: 1 + np.flatnonzero(found.any(1))[-1]]


def schedule(rule: MaskRule, parts: int, length: int, asks: bool = False) -> Schedule:
    """How `parts` devices divide `length` positions under `rule`: the layout in which all wait least for each other.

    Of whole blocks, halves of them in their order, and halves in a zig-zag it is the first whose turns take least, a
    turn as long as the most of any device. Full attention gives blocks, a window halves, a causal rule the zig-zag, and
    so does one that `asks` the rows, where short prefixes or steps are expected.
    """
    layouts = [[(i,) for i in range(parts)]]
    if length // parts % 2 == 0:
        layouts.append([(2 * i, 2 * i + 1) for i in range(parts)])
        layouts.append([(i, 2 * parts - 1 - i) for i in range(parts)])

    def made(holders: list[tuple[int, ...]]) -> Schedule:
        count = parts * len(holders[0])
        size = length // count
        seen = tuple(
            tuple(rule.meets(i * size, j * size, size, None) for j in range(count)) for i in range(count)
        )
        return Schedule(tuple(holders), seen)

    def longest(one: Schedule) -> float:
        return one.pairs().max(1).sum() / len(one.seen) ** 2

    best = min(map(made, layouts), key=longest)
    if not asks:
        return best
    return Schedule(best.holders, ((True,) * len(best.seen),) * len(best.seen), asks)


def _part(
    ring: "_Ring",
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    prefix: jax.Array | None,
) -> jax.Array:
    """One device's part: query [B, H, t, d], key and value [B, Hkv, t, d], segments [B, t] of its own positions."""
    if not ring.schedule.zigzag:
        return _attend(ring, query, key, value, segments, prefix)
    query, key, value = (_spread(x, 2, ring.schedule) for x in (query, key, value))
    return _gather(
        _attend(ring, query, key, value, _spread(segments, 1, ring.schedule), prefix), ring.schedule
    )


def _routes(schedule: Schedule) -> list[list[tuple[int, int]]]:
    """(from, to) of every device's first, and of its second chunk: into the zig-zag. Each way sends each device one."""
    holder = {chunk: device for device, chunks in enumerate(schedule.holders) for chunk in chunks}
    return [[(i, holder[2 * i + k]) for i in range(schedule.parts)] for k in range(2)]


def _spread(x: jax.Array, axis: int, schedule: Schedule) -> jax.Array:
    """Chunks 2i and 2i + 1 -> i and 2n - 1 - i. Of these the even one was somebody's first, the odd one a second."""
    halves = jnp.split(x, 2, axis)
    even, odd = (
        jax.lax.ppermute(half, POSITIONS, way) for half, way in zip(halves, _routes(schedule), strict=True)
    )
    first = jax.lax.axis_index(POSITIONS) % 2 == 0
    return jnp.concatenate([jnp.where(first, even, odd), jnp.where(first, odd, even)], axis)


def _gather(x: jax.Array, schedule: Schedule) -> jax.Array:
    """The reverse of `_spread`, of [B, H, t, d]."""
    low, high = jnp.split(x, 2, 2)
    first = jax.lax.axis_index(POSITIONS) % 2 == 0
    halves = jnp.where(first, low, high), jnp.where(first, high, low)
    back = [[(there, here) for here, there in way] for way in _routes(schedule)]
    return jnp.concatenate(
        [jax.lax.ppermute(half, POSITIONS, way) for half, way in zip(halves, back, strict=True)], 2
    )


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What both passes share. Chunks are [B, heads, s, d], and sums of a chunk of queries [B, Hkv, G s (, d)]."""

    rule: MaskRule
    schedule: Schedule
    scale: float
    softcap: float | None

    def chunks(self, x: jax.Array, axis: int = 2) -> list[jax.Array]:
        return jnp.split(x, len(self.schedule.holders[0]), axis)

    @property
    def turns(self) -> int:
        return len(self.schedule.pairs())

    def onward(self, block: Any, places: int = 1) -> Any:
        parts = self.schedule.parts
        return jax.lax.ppermute(block, POSITIONS, [(i, (i + places) % parts) for i in range(parts)])

    def each(
        self,
        turn: jax.Array,
        size: int,
        prefix: jax.Array | None,
        compute: Callable[..., Any],
        found: Any,
    ) -> Any:
        """found = compute(i, j, place of i, place of j, found) for the pairs that are not masked whole: chunk i of this
        device with chunk j of the block that it meets in this `turn`; chunks of `size` positions."""
        holders, seen = jnp.asarray(self.schedule.holders), np.array(self.schedule.seen)
        mine = jax.lax.axis_index(POSITIONS)
        source = (mine - turn) % self.schedule.parts
        count = len(self.schedule.holders[0])
        for i, j in itertools.product(range(count), repeat=2):
            own, other = holders[mine, i], holders[source, j]
            run = functools.partial(compute, i, j, own, other)
            if self.schedule.asks:
                needed = self.rule.meets(own * size, other * size, size, prefix)
            elif seen.all():
                found = run(found)
                continue
            else:
                needed = jnp.asarray(seen)[own, other]
            found = jax.lax.cond(needed, run, lambda kept: kept, found)
        return found

    def scores(
        self,
        query: jax.Array,
        key: jax.Array,
        own: jax.Array,
        other: jax.Array,
        segments: jax.Array,
        others: jax.Array,
        prefix: jax.Array | None,
    ) -> jax.Array:
        """Masked scores [B, Hkv, G s, s] of chunk `own` of queries and chunk `other` of keys."""
        batch, heads, size, _ = query.shape
        kv_heads = key.shape[1]
        scores = head_product(group_queries(query, kv_heads), key, QK)
        scores = cap(scores * self.scale, self.softcap).reshape(batch, kv_heads, -1, size, size)
        mask = (segments[:, None, :, None] == others[:, None, None, :]) & (others[:, None, None, :] > 0)
        if not isinstance(self.rule, Full):
            places = jnp.arange(size)[None]
            mask = mask & self.rule.allowed(own * size + places, other * size + places, prefix)
        return jnp.where(group_mask(mask, heads, kv_heads), scores, NEGATIVE).reshape(
            batch, kv_heads, -1, size
        )


def _meet(sums: Sums, scores: jax.Array, value: jax.Array) -> Sums:
    """The sums with one more chunk of keys: the equations above."""
    largest, total, out = sums
    higher = jnp.maximum(largest, scores.max(-1))
    weights, kept = jnp.exp(scores - higher[..., None]), jnp.exp(largest - higher)
    found = head_product(weights.astype(value.dtype), value, PV)
    return higher, total * kept + weights.sum(-1), out * kept[..., None] + found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, query, key, value, segments, prefix):
    return _forward(ring, query, key, value, segments, prefix)[0]


def _forward(ring: _Ring, query, key, value, segments, prefix):
    queries, own_segments = ring.chunks(query), ring.chunks(segments, 1)

    def meet(sums: list[Sums], block: Any, turn: jax.Array) -> list[Sums]:
        keys, values, others = ring.chunks(block[0]), ring.chunks(block[1]), ring.chunks(block[2], 1)

        def compute(i, j, own, other, sums):
            scores = ring.scores(queries[i], keys[j], own, other, own_segments[i], others[j], prefix)
            return [*sums[:i], _meet(sums[i], scores, values[j]), *sums[i + 1 :]]

        return ring.each(turn, queries[0].shape[2], prefix, compute, sums)

    def turn(carry: Any, number: jax.Array) -> tuple[Any, None]:
        sums, block = carry
        return (meet(sums, block, number), ring.onward(block)), None

    batch, heads, size, dim = queries[0].shape
    shape = (batch, key.shape[1], heads // key.shape[1] * size)
    none = jnp.full(shape, NEGATIVE, jnp.float32), jnp.zeros(shape), jnp.zeros((*shape, dim), jnp.float32)
    carry = [none] * len(queries), (key, value, segments)
    (sums, block), _ = jax.lax.scan(turn, carry, jnp.arange(ring.turns - 1))
    sums = meet(sums, block, jnp.int32(ring.turns - 1))  # nobody waits for the last block
    parts = [(out / total[..., None]).reshape(queries[0].shape) for _, total, out in sums]
    out = jnp.concatenate(parts, 2).astype(query.dtype)
    return out, (query, key, value, segments, prefix, out, [kept[:2] for kept in sums])


def _backward(ring: _Ring, kept, gradient):
    query, key, value, segments, prefix, out, statistics = kept
    kv_heads = key.shape[1]
    queries, own_segments = ring.chunks(query), ring.chunks(segments, 1)
    grouped = [group_queries(x, kv_heads).astype(jnp.float32) for x in ring.chunks(gradient)]
    outs = [group_queries(x, kv_heads) for x in ring.chunks(out)]
    inner = [(g * o).sum(-1, keepdims=True) for g, o in zip(grouped, outs, strict=True)]

    def meet(found: Any, block: Any, turn: jax.Array) -> Any:
        keys, values, others = ring.chunks(block[0]), ring.chunks(block[1]), ring.chunks(block[2], 1)

        def compute(i, j, own, other, found):
            def scores_of(query, key):
                return ring.scores(query, key, own, other, own_segments[i], others[j], prefix)

            scores, pull = jax.vjp(scores_of, queries[i], keys[j])
            largest, total = (x[..., None] for x in statistics[i])
            weights = jnp.exp(scores - largest) / total
            for_value = head_product(weights.astype(value.dtype), grouped[i].astype(value.dtype), PTG)
            for_weights = head_product(grouped[i].astype(value.dtype), values[j], QK)
            for_query, for_key = pull(weights * (for_weights - inner[i]))
            more = (i, for_query), (j, for_key), (j, for_value)
            return [
                [*sums[:n], sums[n] + new, *sums[n + 1 :]] for sums, (n, new) in zip(found, more, strict=True)
            ]

        return ring.each(turn, queries[0].shape[2], prefix, compute, found)

    def turn(carry: Any, number: jax.Array) -> tuple[Any, None]:
        (for_queries, *travelling), block = carry
        for_queries, *travelling = meet([for_queries, *travelling], block, number)
        return ([for_queries, *ring.onward(travelling)], ring.onward(block)), None

    zeros = [[jnp.zeros(x.shape, jnp.float32) for x in ring.chunks(x)] for x in (query, key, value)]
    carry = zeros, (key, value, segments)
    (found, block), _ = jax.lax.scan(turn, carry, jnp.arange(ring.turns - 1))
    for_queries, *travelling = meet(found, block, jnp.int32(ring.turns - 1))
    if ring.turns > 1:
        travelling = ring.onward(travelling, 1 - ring.turns)  # home
    for_query, for_key, for_value = (jnp.concatenate(x, 2) for x in (for_queries, *travelling))
    return (
        for_query.astype(query.dtype),
        for_key.astype(key.dtype),
        for_value.astype(value.dtype),
        None,
        None,
    )


_attend.defvjp(_forward, _backward)
