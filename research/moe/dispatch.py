"""Dispatch: how tokens travel to their experts and back.

A dispatch is made from a `Routing` and turns tokens into a *buffer*, one array whose rows are grouped by expert.
Elementwise functions apply to a buffer as to any array; what an expert multiplies goes through `dot` and `bias`,
which know the grouping. So a layer of experts is written once:

    hidden = dispatch.dot(dispatch.scatter(x), up)          # up [E, D, F]
    y = dispatch.combine(dispatch.dot(act(hidden), down), routing.gate)

and the backends differ in nothing but speed, memory, and what `capacity` drops:

    dense     every expert over every token: the oracle, E / k times the work
    capacity  [E, C, width]: a fixed number of slots an expert; what does not fit is dropped, first choices last
    sorted    rows sorted by expert: nothing is dropped, and next to no work is wasted; on a CPU without kernels, as
              many rows of every expert come first and then what is left of each

N tokens, k choices of each, E experts, P = k N pairs (token, choice). Padding (`routing.mask`) travels nowhere,
and comes back as 0.
"""

import functools
import math
from typing import Literal, Protocol, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from kernels_pallas.common import target_platform
from research.errors import UserError, nearest
from research.moe.grouped import Groups, PallasGroupedDot, every_expert, grouped_dot, in_one_call
from research.moe.losses import load
from research.moe.routing import Routing
from research.nn import weights
from research.nn.cpu_kernels import use_cpu_kernels
from research.nn.weights import Kernel

Backend = Literal["auto", "dense", "capacity", "sorted"]
BACKENDS = get_args(Backend)
# Rows of an expert, on average. With 4 to 32, blocks took 0.65 to 1.22 times the time of `SortedDispatch.make`.
BLOCKS_FROM = 64
LEFT_OVER = 1 / 4  # of all rows, how many at most may be outside of the blocks
_LARGE = 1 << 16  # numbers in picked rows, from where on a kernel for CPUs pays


class Dispatch(Protocol):
    """The contract. A buffer [..., width] has leading axes of the backend's own."""

    counts: jax.Array  # f32[E], choices of real tokens that fell on each expert
    dropped: jax.Array  # f32[], how many of them found no place

    def scatter(self, x: jax.Array) -> jax.Array:
        """x [N, width] -> buffer: every token once for each of its choices."""

    def scatter_slots(self, x: jax.Array) -> jax.Array:
        """x [N, k, width], a row for every choice -> buffer."""

    def dot(self, buffer: jax.Array, kernel: Kernel) -> jax.Array:
        """Buffer [..., in] times its experts' kernels [E, in, out] -> buffer [..., out]."""

    def bias(self, buffer: jax.Array, bias: jax.Array) -> jax.Array:
        """Buffer [..., width] plus its experts' bias [E, width]."""

    def gather_slots(self, buffer: jax.Array) -> jax.Array:
        """Buffer -> [N, k, width], not combined; 0 for what was dropped and for padding."""

    def combine(self, buffer: jax.Array, gate: jax.Array) -> jax.Array:
        """Buffer -> [N, width]: the sum over the choices, weighed by gate [N, k]."""


def make_dispatch(
    routing: Routing,
    backend: Backend = "auto",
    capacity_factor: float | None = None,
    grouped_dot: PallasGroupedDot | None = None,
    blocks: bool = True,
    dtype: jnp.dtype = jnp.float32,
) -> Dispatch:
    """The dispatch of a routing.

    capacity_factor: of `capacity`, see `expert_capacity`. "auto" is `capacity` where a factor is given, else
    `sorted`. grouped_dot: the Pallas kernel in the place of `grouped_dot`, of `sorted`. blocks: `sorted` may lay rows
    out in blocks on a CPU; experts in panels gain nothing from them. dtype: of the rows; float32 ones have a kernel on
    most CPUs, and then no blocks. Raises `UserError` for an unknown backend, a factor that is not positive, a factor
    for a backend that drops nothing, or a grouped product for one that has none.
    """
    check_dispatch(backend, capacity_factor, grouped_dot)
    if backend == "auto":
        backend = "sorted" if capacity_factor is None else "capacity"
    if backend == "capacity":
        return CapacityDispatch.make(routing, capacity_factor)
    if backend == "dense":
        return DenseDispatch.make(routing)
    tokens, k = routing.index.shape
    many = tokens * k >= BLOCKS_FROM * routing.num_experts
    kernel = dtype == jnp.float32 and use_cpu_kernels()
    if blocks and many and not kernel and grouped_dot is None and target_platform() == "cpu":
        return SortedDispatch.make_blocks(routing)
    return SortedDispatch.make(routing).replace(grouped_dot=grouped_dot)


def check_dispatch(
    backend: str, capacity_factor: float | None, grouped_dot: PallasGroupedDot | None = None
) -> None:
    """Raise `UserError` for what `make_dispatch` refuses."""
    if backend not in BACKENDS:
        close = nearest(backend, BACKENDS)
        hint = f"did you mean {close!r}?" if close else f"there are {', '.join(BACKENDS)}"
        raise UserError(f"dispatch={backend!r}: no such backend; {hint}")
    used = "capacity" if backend == "auto" and capacity_factor is not None else backend
    if grouped_dot is not None and used not in ("auto", "sorted"):
        raise UserError(f"grouped_dot={grouped_dot} goes with dispatch='sorted', not {used!r}")
    if capacity_factor is None:
        return
    if not capacity_factor > 0:
        raise UserError(
            f"capacity_factor={capacity_factor}: experts need a capacity above 0; 1.25 is usual, None drops nothing"
        )
    if backend not in ("auto", "capacity"):
        raise UserError(
            f"capacity_factor={capacity_factor}: dispatch={backend!r} drops nothing; use 'capacity'"
        )


def expert_capacity(tokens: int, num_experts: int, k: int, factor: float | None) -> int:
    """Slots of each expert: ceil(factor * k * tokens / E), rounded up to a multiple of 4 and at most `tokens`;
    all `tokens`, so that nothing is dropped, for None."""
    if factor is None:
        return tokens
    # The small number keeps a product such as 1.1 * 10 from rounding up over its own rounding error.
    slots = max(math.ceil(factor * k * tokens / num_experts - 1e-6), 1)
    return min(-(-slots // 4) * 4, tokens)


class DenseDispatch(struct.PyTreeNode):
    """Every expert computes every token, buffer [E, N, width]; a gate matrix [N, E] picks. The oracle."""

    index: jax.Array
    mask: jax.Array
    counts: jax.Array
    dropped: jax.Array

    @classmethod
    def make(cls, routing: Routing) -> "DenseDispatch":
        return cls(routing.index, routing.mask, load(routing), jnp.zeros((), jnp.float32))

    def scatter(self, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (self.counts.shape[0], *x.shape))

    def scatter_slots(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("nke,nkd->end", self._chosen(x.dtype), x)

    def dot(self, buffer: jax.Array, kernel: Kernel) -> jax.Array:
        return batched_dot(buffer, kernel)

    def bias(self, buffer: jax.Array, bias: jax.Array) -> jax.Array:
        return buffer + bias[:, None].astype(buffer.dtype)

    def gather_slots(self, buffer: jax.Array) -> jax.Array:
        return jnp.einsum("nke,end->nkd", self._chosen(buffer.dtype), buffer)

    def combine(self, buffer: jax.Array, gate: jax.Array) -> jax.Array:
        gates = jnp.einsum("nke,nk->ne", self._chosen(jnp.float32), gate)
        return jnp.einsum("ne,end->nd", gates, buffer.astype(jnp.float32)).astype(buffer.dtype)

    def _chosen(self, dtype: jnp.dtype) -> jax.Array:
        chosen = jax.nn.one_hot(self.index, self.counts.shape[0], dtype=dtype)
        return chosen * self.mask[:, None, None]


class _Slots(struct.PyTreeNode):
    """Base of backends whose buffer has a slot for every pair that is computed.

    pair_of_slot int32[S]: n k + j of the pair in each slot, P in an empty one.
    slot_of_pair int32[N, k]: its inverse, S where the pair has no slot.
    """

    pair_of_slot: jax.Array
    slot_of_pair: jax.Array
    counts: jax.Array
    dropped: jax.Array

    def _shape(self, rows: jax.Array) -> jax.Array:
        """Rows [S, width] as a buffer."""
        raise NotImplementedError

    def scatter(self, x: jax.Array) -> jax.Array:
        k = self.slot_of_pair.shape[1]
        return self._shape(_take(x, self.pair_of_slot // k, self.slot_of_pair))

    def scatter_slots(self, x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        return self._shape(_take(flat, self.pair_of_slot, self.slot_of_pair.reshape(-1, 1)))

    def gather_slots(self, buffer: jax.Array) -> jax.Array:
        rows = buffer.reshape(-1, buffer.shape[-1])
        pairs = _take(rows, self.slot_of_pair.reshape(-1), self.pair_of_slot[:, None])
        return pairs.reshape(*self.slot_of_pair.shape, -1)

    def combine(self, buffer: jax.Array, gate: jax.Array) -> jax.Array:
        rows = buffer.reshape(-1, buffer.shape[-1])
        return _combine(rows, gate, self.slot_of_pair, self.pair_of_slot)


class CapacityDispatch(_Slots):
    """C slots an expert, buffer [E, C, width]. All first choices precede all second ones, then tokens in order;
    pairs beyond the C-th of an expert are dropped: their token gets nothing from that expert."""

    @classmethod
    def make(cls, routing: Routing, capacity_factor: float | None = None) -> "CapacityDispatch":
        tokens, k = routing.index.shape
        experts = routing.num_experts
        capacity = expert_capacity(tokens, experts, k, capacity_factor)
        order, counts, start = _sort_pairs(routing)
        place = jnp.arange(capacity)
        filled = place < counts[:, None]
        pairs = jnp.take(order, start[:, None] + place, mode="clip")
        pair_of_slot = jnp.where(filled, pairs, tokens * k).reshape(-1)
        kept = jnp.sum(filled, dtype=jnp.float32)
        counts = counts.astype(jnp.float32)
        return cls(pair_of_slot, _invert(pair_of_slot, tokens, k), counts, jnp.sum(counts) - kept)

    def _shape(self, rows: jax.Array) -> jax.Array:
        buffer = rows.reshape(self.counts.shape[0], -1, rows.shape[-1])
        if jax.sharding.get_abstract_mesh().shape.get("expert", 1) == 1:
            return buffer
        # Each device then gathers tokens for the slots of its own experts, and no device gathers kernels.
        free = PartitionSpec.UNCONSTRAINED
        return jax.lax.with_sharding_constraint(buffer, PartitionSpec("expert", free, free))

    @property
    def groups(self) -> Groups:
        """Which rows of a buffer, flat, are filled."""
        experts = self.counts.shape[0]
        capacity = self.pair_of_slot.shape[0] // experts
        size = jnp.minimum(self.counts, capacity).astype(jnp.int32)
        return Groups((jnp.arange(experts, dtype=jnp.int32) * capacity)[None], size[None])

    def dot(self, buffer: jax.Array, kernel: Kernel) -> jax.Array:
        rows = buffer.reshape(-1, buffer.shape[-1])
        if in_one_call(rows, kernel, self.groups):  # which computes the rows that are filled alone
            return grouped_dot(rows, kernel, self.groups).reshape(*buffer.shape[:2], -1)
        return batched_dot(buffer, kernel)

    def bias(self, buffer: jax.Array, bias: jax.Array) -> jax.Array:
        return buffer + bias[:, None].astype(buffer.dtype)


class SortedDispatch(_Slots):
    """Rows grouped by expert, buffer [S, width]: P and what `grouped_dot` wants beside them. Nothing is dropped.

    groups: which rows are whose. grouped_dot: the Pallas kernel in the place of `grouped_dot`, or None.
    """

    groups: Groups
    tile: int = struct.field(pytree_node=False)
    grouped_dot: PallasGroupedDot | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def make(cls, routing: Routing, tile: int | None = None) -> "SortedDispatch":
        """All rows sorted by expert."""
        tokens, k = routing.index.shape
        pairs = tokens * k
        tile = default_tile(tokens, pairs, routing.num_experts) if tile is None else tile
        slots = pairs + tile - 1
        if use_cpu_kernels():
            slot_of_pair, pair_of_slot, sizes = _sort_by_kernel(routing, slots)
        else:
            order, sizes, _ = _sort_pairs(routing)
            pair_of_slot = _behind(order, jnp.sum(sizes), slots)
            slot_of_pair = _invert(pair_of_slot, tokens, k)
        return cls._of(pair_of_slot, slot_of_pair, sizes, Groups.sorted(sizes), tile)

    @classmethod
    def make_blocks(cls, routing: Routing, tile: int | None = None) -> "SortedDispatch":
        """A block of every expert's first rows, and then the other rows sorted by expert; all rows sorted, where loads
        are so different that more than a quarter of the rows were left over, or of the experts had none.

        Blocks are a tile longer than the mean load, if the tile is of the default sqrt(m) for a mean load of m, rounded
        to a power of two, from 8 to 32.
        """
        tokens, k = routing.index.shape
        pairs, experts = tokens * k, routing.num_experts
        if tile is None:
            tile = 2 ** min(max(round(math.log2(pairs / experts) / 2), 3), 5)
        # The blocks hold all P rows, where these are sorted, and what the last tile of them runs into.
        block = -(-(pairs + tile - 1) // (experts * tile)) * tile
        order, counts, start = _sort_pairs(routing)
        first = jnp.minimum(counts, block)
        others = counts - first
        most = int(LEFT_OVER * pairs)
        even = (jnp.sum(others) <= most) & (4 * jnp.sum(counts == 0) <= experts)
        place = jnp.arange(block)
        blocks = jnp.where(
            place < first[:, None], jnp.take(order, start[:, None] + place, mode="clip"), pairs
        )
        blocks = jnp.where(even, blocks.reshape(-1), _behind(order, jnp.sum(counts), experts * block))
        others = jnp.where(even, others, 0)
        left = Groups.sorted(others)
        row = jnp.arange(most + tile - 1)
        expert = left.experts(len(row))
        beyond = jnp.take(order, (start + block - left.start[0])[expert] + row, mode="clip")
        beyond = jnp.where(expert < experts, beyond, pairs)
        starts = jnp.where(even, jnp.arange(experts) * block, start)
        groups = Groups(jnp.stack([starts, left.start[0]]), jnp.stack([counts - others, others]), even, block)
        pair_of_slot = jnp.append(blocks, beyond)
        return cls._of(pair_of_slot, _invert(pair_of_slot, tokens, k), counts, groups, tile)

    @classmethod
    def _of(cls, pair_of_slot, slot_of_pair, counts, groups: Groups, tile: int) -> "SortedDispatch":
        return cls(
            pair_of_slot, slot_of_pair, counts.astype(jnp.float32), jnp.zeros((), jnp.float32), groups, tile
        )

    def _shape(self, rows: jax.Array) -> jax.Array:
        return rows

    @property
    def in_pieces(self) -> bool:
        """Whether an expert's rows are computed piece by piece, so that a whole FFN can be at once."""
        if self.grouped_dot is not None or target_platform() != "cpu":
            return False
        return every_expert(self.pair_of_slot.shape[0], self.groups, self.tile)

    def dot(self, buffer: jax.Array, kernel: Kernel) -> jax.Array:
        if self.grouped_dot is not None:
            return self.grouped_dot(buffer, kernel, self.groups.size[0])
        return grouped_dot(buffer, kernel, self.groups, self.tile)

    def bias(self, buffer: jax.Array, bias: jax.Array) -> jax.Array:
        expert = self.groups.experts(buffer.shape[0])
        return buffer + _expert_rows(bias, expert).astype(buffer.dtype)


def default_tile(tokens: int, pairs: int, experts: int) -> int:
    """Rows of a tile: about 4 sqrt(m) for a mean load of m rows an expert, which was the fastest of the powers of two
    for m from 4 to 1024, between 8 and 128, but no more than there are tokens. 1 where `lax.ragged_dot` needs none."""
    if target_platform() != "cpu":
        return 1
    return min(2 ** min(max(round(math.log2(4 * math.sqrt(pairs / experts))), 3), 7), tokens)


@jax.custom_vjp
def _expert_rows(table: jax.Array, expert: jax.Array) -> jax.Array:
    """Rows `expert` int32[S] of a table [E, width]; 0 for E. The gradient is a product, not S additions."""
    return jnp.take(table, expert, axis=0, mode="fill", fill_value=0)


def _expert_rows_forward(
    table: jax.Array, expert: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _expert_rows(table, expert), (expert, table)


def _expert_rows_backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None]:
    expert, table = saved
    mine = jax.nn.one_hot(expert, table.shape[0], axis=0, dtype=cotangent.dtype)
    gradient = jnp.matmul(mine, cotangent, preferred_element_type=jnp.float32)
    return gradient.astype(table.dtype), None


_expert_rows.defvjp(_expert_rows_forward, _expert_rows_backward)


def batched_dot(buffer: jax.Array, kernel: Kernel) -> jax.Array:
    """Buffer [E, C, in] times kernel [E, in, out], in the dtype of the buffer, accumulated in float32."""
    return jax.vmap(weights.dot)(buffer, kernel)


def _sort_pairs(routing: Routing) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> order int32[P]: pairs n k + j grouped by expert, within an expert by choice and then by token, and something
    else in the place of padding, last; counts int32[E]; start int32[E] of each expert in the order."""
    tokens, k = routing.index.shape
    experts = routing.num_experts
    if use_cpu_kernels():
        _, order, counts = _sort_by_kernel(routing, tokens * k)
        return order, counts, jnp.cumsum(counts) - counts
    expert = jnp.where(routing.mask[:, None], routing.index, experts).T.reshape(-1)  # first choices first
    order = jnp.argsort(expert, stable=True)
    order = (order % tokens) * k + order // tokens
    counts = jnp.sum(jax.nn.one_hot(expert, experts, dtype=jnp.int32), axis=0)
    return order, counts, jnp.cumsum(counts) - counts


def _sort_by_kernel(routing: Routing, slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> slot_of_pair, pair_of_slot int32[slots], counts int32[E], in the order of `_sort_pairs`."""
    # Imported here: only programs that run on a CPU need LLVM.
    from kernels_pallas.grouped_matmul.cpu_rows import sort_pairs

    return sort_pairs(routing.index, routing.mask, routing.num_experts, slots)


def _behind(order: jax.Array, count: jax.Array, slots: int) -> jax.Array:
    """The first `count` of the P pairs, and P behind them, int32[slots]."""
    padded = jnp.append(order, jnp.full(slots - len(order), len(order), order.dtype))
    return jnp.where(jnp.arange(slots) < count, padded, len(order))


def _invert(pair_of_slot: jax.Array, tokens: int, k: int) -> jax.Array:
    """int32[S] of pairs -> int32[N, k] of slots, S for a pair without one."""
    slots = pair_of_slot.shape[0]
    empty = jnp.full(tokens * k, slots, jnp.int32)
    inverse = empty.at[pair_of_slot].set(
        jnp.arange(slots, dtype=jnp.int32), mode="drop", unique_indices=False
    )
    return inverse.reshape(tokens, k)


# Gradients of gathers add up row after row, which CPUs do one at a time. Each slot has one pair and each pair one slot,
# so the two below gather in both directions.


def _large(rows: jax.Array, index: jax.Array) -> bool:
    """Whether a kernel picks these rows."""
    return rows.dtype == jnp.float32 and index.size * rows.shape[1] >= _LARGE and use_cpu_kernels()


def _sums(rows: jax.Array, index: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    """rows [M, width], index [N, k], gate f32[N, k] or ones -> [N, width], the sums over k; float32."""
    # Imported here: only programs that run on a CPU need LLVM.
    from kernels_pallas.grouped_matmul.cpu_rows import weighted_rows

    return weighted_rows(rows, index, jnp.ones(index.shape, jnp.float32) if gate is None else gate)


@jax.custom_vjp
def _take(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows `index` [S] of x [M, width], 0 beyond M; `inverse` [M, r] says where each row of x went, S: nowhere."""
    if _large(x, index):
        return _sums(x, index[:, None])
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _take_forward(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _take(x, index, inverse), inverse


def _take_backward(inverse: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    if _large(cotangent, inverse):
        return _sums(cotangent, inverse), None, None
    parts = (jnp.take(cotangent, column, axis=0, mode="fill", fill_value=0) for column in inverse.T)
    return functools.reduce(jnp.add, parts), None, None


_take.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def _combine(rows: jax.Array, gate: jax.Array, slot_of_pair: jax.Array, pair_of_slot: jax.Array) -> jax.Array:
    """rows [S, width] of slots, gate f32[N, k] -> [N, width], added up in float32."""
    if _large(rows, slot_of_pair):
        return _sums(rows, slot_of_pair, gate)
    parts = (
        gate[:, j, None] * jnp.take(rows, slot_of_pair[:, j], axis=0, mode="fill", fill_value=0)
        for j in range(gate.shape[1])
    )
    return functools.reduce(jnp.add, parts).astype(rows.dtype)


def _combine_forward(rows, gate, slot_of_pair, pair_of_slot):
    return _combine(rows, gate, slot_of_pair, pair_of_slot), (rows, gate, slot_of_pair, pair_of_slot)


def _combine_backward(saved, cotangent):
    rows, gate, slot_of_pair, pair_of_slot = saved
    if _large(rows, slot_of_pair):
        from kernels_pallas.grouped_matmul.cpu_rows import weighted_rows_gradient

        return *weighted_rows_gradient(rows, gate, pair_of_slot, cotangent), None, None
    k = gate.shape[1]
    of_slot = jnp.take(gate.reshape(-1), pair_of_slot, mode="fill", fill_value=0)
    spread = jnp.take(cotangent, pair_of_slot // k, axis=0, mode="fill", fill_value=0)
    d_rows = (of_slot[:, None] * spread).astype(rows.dtype)
    cotangent = cotangent.astype(jnp.float32)
    d_gate = [
        jnp.sum(cotangent * jnp.take(rows, slot_of_pair[:, j], axis=0, mode="fill", fill_value=0), axis=1)
        for j in range(k)
    ]
    return d_rows, jnp.stack(d_gate, axis=1), None, None


_combine.defvjp(_combine_forward, _combine_backward)
