"""Grouped matrix product: consecutive rows of one array, each group with the kernel of its expert.

`lax.ragged_dot` is this product on TPU and GPU. On CPU it computes every group for every row. Many float32 rows have a
kernel there, forward and backward (`kernels_pallas.grouped_matmul.cpu_training`); for others the loops below take its
place. What they are made for was measured, on two cores:

- Equally many rows of every expert, in blocks: one batched product of all experts, as fast as a dense layer's. The
  products of one expert are too small for two cores, and what copies rows in and out of loops is a fifth of the time.
- Many rows otherwise (training): experts one after the other, each over its rows in pieces of `PIECE` and then of
  `tile`. A loop over tiles alone, which fetches the kernel every time, takes 1.4 times as long.
- Few rows (decoding): only the experts that have rows, their kernels in blocks of 128 KiB. Such a block is copied
  within the processor's cache, so that a kernel is read from memory once, at the speed of a dense product; copied
  as a whole it takes twice as long. Time does not depend on the number of experts.
- Inference: kernels in panels (`research.nn.panels`), which a kernel for CPUs multiplies at any number of rows.

The last tile of an expert runs into the rows of the next one. What it leaves there is overwritten when it is the
next one's turn, so groups need not begin at a multiple of anything.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.common import target_platform
from kernels_pallas.grouped_matmul import Unsupported, grouped_matmul
from research.errors import UserError
from research.nn import weights
from research.nn.cpu_kernels import use_cpu_kernels
from research.nn.panels import StackedPanels
from research.nn.weights import Kernel

PIECE = 512  # rows
BLOCK = 128 * 1024  # bytes
# From where on the kernel for CPUs pays: rows, rows of an expert on average, and multiply-adds.
_ROWS, _OF_AN_EXPERT, _PRODUCTS = 48, 4, 1 << 17


class Groups(struct.PyTreeNode):
    """Which rows of a buffer belong to which expert.

    The buffer has R regions, and each expert a run of consecutive rows in each: start, size int32[R, E], from the
    beginning of the region. What belongs to no expert, at least the last tile - 1 rows of a region that is not `even`,
    must be 0, and so must its cotangent.

    R is 1, or 2 where there is a `block`. Then the first region has E * block rows. Where `even`, bool[], the run of
    expert e begins there at e * block, a multiple of the tile; what an expert has beyond `block` rows is in the second.
    Otherwise that is empty.
    """

    start: jax.Array
    size: jax.Array
    even: jax.Array | None = None
    block: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def sorted(cls, size: jax.Array) -> "Groups":
        """The first size[0] rows belong to expert 0, the next size[1] to expert 1, and so on; size int32[E]."""
        return cls((jnp.cumsum(size) - size)[None], size[None])

    @property
    def num_experts(self) -> int:
        return self.size.shape[1]

    def regions(self, x: jax.Array) -> list[jax.Array]:
        """x [S, ...] cut into its regions."""
        behind = self.num_experts * self.block
        return [x[:behind], x[behind:]] if self.block else [x]

    def blocks(self, x: jax.Array) -> jax.Array:
        """The first region [E * block, ...] -> [E, block, ...]."""
        return x.reshape(self.num_experts, self.block, *x.shape[1:])

    def starts(self) -> jax.Array:
        """`start` from the beginning of the buffer."""
        return self.start + jnp.asarray([[0], [self.num_experts * self.block]][: len(self.start)])

    def experts(self, rows: int) -> jax.Array:
        """The expert of each of `rows` rows, int32[rows]; E for those of none."""
        start, row = self.starts(), jnp.arange(rows)[:, None, None]
        mine = (start <= row) & (row < start + self.size)  # [S, R, E]
        return jnp.min(jnp.where(mine, jnp.arange(self.num_experts), self.num_experts), axis=(1, 2))


def grouped_dot(rows: jax.Array, kernel: Kernel, groups: Groups, tile: int = 1) -> jax.Array:
    """rows [S, in] times kernel [E, in, out] -> [S, out] in the dtype of rows, accumulated in float32. Rows of no
    expert become 0. Without gradient for `StackedPanels`."""
    if isinstance(kernel, StackedPanels):
        return panels_dot(rows, kernel, groups)
    if target_platform() != "cpu" and isinstance(kernel, jax.Array):
        kernel, sizes = kernel.astype(rows.dtype), groups.size[0]
        return jax.lax.ragged_dot(rows, kernel, sizes, preferred_element_type=jnp.float32).astype(rows.dtype)
    if in_one_call(rows, kernel, groups):
        # Imported here: only programs that run on a CPU need LLVM.
        from kernels_pallas.grouped_matmul import cpu_training

        return cpu_training.grouped_dot(rows, kernel, groups.start[0], groups.size[0])
    return _product(rows, kernel, groups, tile)


def in_one_call(rows: jax.Array, kernel: Kernel, groups: Groups) -> bool:
    """Whether these rows, not in blocks, are multiplied by the kernel for CPUs."""
    if groups.block or not isinstance(kernel, jax.Array) or not rows.dtype == kernel.dtype == jnp.float32:
        return False
    experts, inputs, outputs = kernel.shape
    count = rows.shape[0]
    many = count >= max(_ROWS, _OF_AN_EXPERT * experts) and count * inputs * outputs >= _PRODUCTS
    return many and use_cpu_kernels()


def panels_dot(
    rows: jax.Array, kernel: StackedPanels, groups: Groups, gate: StackedPanels | None = None
) -> jax.Array:
    """`grouped_dot` of kernels in panels; with a gate silu(rows gate) * (rows kernel)."""
    # Imported here: only programs that have panels need LLVM.
    from kernels_pallas.grouped_matmul.cpu import grouped_panels

    starts, sizes = groups.starts().reshape(-1), groups.size.reshape(-1)
    out = grouped_panels(
        rows.astype(jnp.float32),
        kernel.panels,
        starts,
        sizes,
        kernel.outputs,
        None if gate is None else gate.panels,
    )
    return out.astype(rows.dtype)


@dataclasses.dataclass(frozen=True)
class PallasGroupedDot:
    """`grouped_dot` by the Pallas kernel, of whatever rows belong to no expert.

    Args:
        implementation: "auto" takes the kernel of the backend.
        interpret: run the kernel in Pallas' interpreter, anywhere and slowly.

    Raises:
        UserError: when called, where the kernel cannot run. Nothing else is run instead.
    """

    implementation: Literal["auto", "tpu", "gpu"] = "auto"
    interpret: bool = False

    def __call__(self, rows: jax.Array, kernel: Kernel, sizes: jax.Array) -> jax.Array:
        try:
            if not isinstance(kernel, jax.Array):
                raise Unsupported(f"a kernel is {type(kernel).__name__}, not an array")
            implementation = None if self.implementation == "auto" else self.implementation
            return grouped_matmul(
                rows, kernel, sizes, implementation=implementation, interpret=self.interpret
            )
        except Unsupported as error:
            raise UserError(f"grouped_dot={self} cannot run: {error}; None runs everywhere") from error


def every_expert(rows: int, groups: Groups, tile: int) -> bool:
    """Whether there are rows enough that all experts will have some. With blocks, tiles are a quarter as large."""
    return rows > (8 if groups.block else 2) * tile * groups.num_experts


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(rows: jax.Array, kernel: Kernel, groups: Groups, tile: int) -> jax.Array:
    by = _by_experts if every_expert(rows.shape[0], groups, tile) else _by_tiles

    def first(x: jax.Array) -> jax.Array:
        def batched(x: jax.Array) -> jax.Array:
            return jax.vmap(weights.dot)(groups.blocks(x), kernel).reshape(x.shape[0], -1)

        return if_even(
            groups, kernel, batched, lambda x: by(x, kernel, groups.start[0], groups.size[0], tile), x
        )

    parts = groups.regions(rows)
    out = [first(parts[0]), *(by(x, kernel, groups.start[1], groups.size[1], tile) for x in parts[1:])]
    return jnp.concatenate(out) if len(out) > 1 else out[0]


def if_even(
    groups: Groups, kernels: Any, blocks: Callable[..., Any], others: Callable[..., Any], *operands: Any
) -> Any:
    """`blocks` of the operands where the first region has blocks of equal size, else `others` of them. Kernels that are
    structured go expert by expert, so that no more than one has to be unpacked at a time."""
    leaves = jax.tree.leaves(kernels, is_leaf=lambda leaf: isinstance(leaf, weights.Weight))
    if not groups.block or any(isinstance(leaf, weights.Weight) for leaf in leaves):
        return others(*operands)
    return jax.lax.cond(groups.even, blocks, others, *operands)


def _product_forward(rows: jax.Array, kernel: Kernel, groups: Groups, tile: int) -> tuple[jax.Array, Any]:
    return _product(rows, kernel, groups, tile), (rows, kernel, groups)


def _product_backward(tile: int, saved: Any, cotangent: jax.Array) -> tuple[jax.Array, Any, None]:
    """Both gradients of a piece of rows at a time. That of the kernel is added up in float32."""
    rows, kernel, groups = saved
    floating, codes, rebuild = _split(kernel)

    def by_pieces(rows: jax.Array, cotangent: jax.Array, run: int, totals: Any) -> tuple[jax.Array, Any]:
        def expert(mine: Any, start: jax.Array, size: jax.Array, d_rows: jax.Array, total: Any) -> Any:
            def piece(at: jax.Array, count: int, own: jax.Array | None, carry: Any) -> Any:
                d_rows, total = carry
                x = jax.lax.dynamic_slice_in_dim(rows, at, count)
                if own is not None:  # rows of the next expert have no part in this one's gradient
                    x = jnp.where(jnp.arange(count)[:, None] < own, x, 0)
                dy = jax.lax.dynamic_slice_in_dim(cotangent, at, count)
                dx, parts = _dot_gradient(x, *mine, rebuild, dy)
                total = [a + b.astype(jnp.float32) for a, b in zip(total, parts, strict=True)]
                return jax.lax.dynamic_update_slice_in_dim(d_rows, dx, at, 0), total

            return pieces(start, size, rows.shape[0], tile, piece, (d_rows, total))

        start, size = groups.start[run], groups.size[run]
        return each_expert(start, size, (floating, codes), expert, jnp.zeros_like(rows), totals)

    def batched(rows: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, Any]:
        gradient = functools.partial(_dot_gradient, codes=codes, rebuild=rebuild)
        dx, totals = jax.vmap(lambda x, mine, dy: gradient(x, mine, dy=dy))(
            groups.blocks(rows), floating, groups.blocks(cotangent)
        )
        return dx.reshape(rows.shape), [total.astype(jnp.float32) for total in totals]

    zeros = [jnp.zeros_like(leaf, dtype=jnp.float32) for leaf in floating]
    parts = list(zip(groups.regions(rows), groups.regions(cotangent), strict=True))
    d_rows, totals = if_even(groups, kernel, batched, lambda x, dy: by_pieces(x, dy, 0, zeros), *parts[0])
    if groups.block:
        d_others, totals = by_pieces(*parts[1], 1, totals)
        d_rows = jnp.concatenate([d_rows, d_others])
    cast = [total.astype(leaf.dtype) for total, leaf in zip(totals, floating, strict=True)]
    nothing = [jnp.zeros(leaf.shape, jax.dtypes.float0) for leaf in codes]
    return d_rows, rebuild(cast, nothing), None


_product.defvjp(_product_forward, _product_backward)


def _by_experts(rows: jax.Array, kernel: Kernel, start: jax.Array, size: jax.Array, tile: int) -> jax.Array:
    def expert(mine: Kernel, start: jax.Array, size: jax.Array, out: jax.Array, total: None) -> Any:
        def piece(at: jax.Array, count: int, own: jax.Array | None, out: jax.Array) -> jax.Array:
            y = weights.dot(jax.lax.dynamic_slice_in_dim(rows, at, count), mine)
            return jax.lax.dynamic_update_slice_in_dim(out, y, at, 0)

        return pieces(start, size, rows.shape[0], tile, piece, out), None

    # Like the rows: inside shard_map, of the mesh axes that they differ over.
    out = jnp.zeros_like(rows, shape=(rows.shape[0], kernel.shape[-1]))
    return each_expert(start, size, kernel, expert, out, None)[0]


def each_expert(
    start: jax.Array, size: jax.Array, kernels: Any, body: Any, carry: Any, totals: Any
) -> tuple[Any, Any]:
    """`body(its kernels, start, size, carry, its totals) -> carry, its totals`, of one expert after the other that has
    rows; leaves of kernels and totals [E, ...]."""
    some = jnp.argsort(size == 0, stable=True)  # these first, in their order

    def expert(i: jax.Array, state: Any) -> Any:
        carry, totals = state
        e = some[i]
        mine, total = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, e, keepdims=False), (kernels, totals)
        )
        carry, total = body(mine, start[e], size[e], carry, total)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=e, axis=0)
        return carry, jax.tree.map(put, totals, total)

    return jax.lax.fori_loop(0, jnp.sum(size > 0), expert, (carry, totals))


def pieces(start: jax.Array, size: jax.Array, most: int, tile: int, body: Any, carry: Any) -> Any:
    """`body(first row, count, own, carry)` over `size` rows, at most `most`, from `start`: as many whole pieces as
    there are, then tiles. Of a tile's rows only `own` are the expert's; None: all."""
    whole = size // PIECE
    if most >= PIECE:
        carry = jax.lax.fori_loop(0, whole, lambda i, c: body(start + i * PIECE, PIECE, None, c), carry)
    done = whole * PIECE
    tiles = -((done - size) // tile)

    def rest(i: jax.Array, carry: Any) -> Any:
        at = done + i * tile
        return body(start + at, tile, size - at, carry)

    return jax.lax.fori_loop(0, tiles, rest, carry)


def _by_tiles(rows: jax.Array, kernel: Kernel, start: jax.Array, size: jax.Array, tile: int) -> jax.Array:
    features = kernel.shape[-1]
    used = -(-size // tile)  # tiles of each expert
    end = jnp.cumsum(used)
    blocks = _block_count(kernel) if isinstance(kernel, jax.Array) else 1
    width = kernel.shape[-2] // blocks
    if blocks > 1:
        kernel = kernel.reshape(-1, width, features)

    def expert_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.sum(end <= i)
        at = start[expert] + (i - (end - used)[expert]) * tile

        def block(b: jax.Array, y: jax.Array) -> jax.Array:
            x = jax.lax.dynamic_slice(rows, (at, b * width), (tile, width))
            mine = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert * blocks + b, keepdims=False), kernel
            )
            return y + (_float32_dot(x, mine) if isinstance(mine, jax.Array) else weights.dot(x, mine))

        y = jax.lax.fori_loop(
            0, blocks, block, jnp.zeros_like(rows, shape=(tile, features), dtype=jnp.float32)
        )
        return jax.lax.dynamic_update_slice_in_dim(out, y.astype(rows.dtype), at, 0)

    out = jnp.zeros_like(rows, shape=(rows.shape[0], features))
    return jax.lax.fori_loop(0, end[-1], expert_tile, out)


def _block_count(kernel: jax.Array) -> int:
    """Into how many equal blocks of rows a kernel [E, in, out] is cut, of about `BLOCK` bytes."""
    width = kernel.shape[1]
    wanted = min(-(-width * kernel.shape[2] * kernel.dtype.itemsize // BLOCK), width)
    return next(count for count in range(wanted, width + 1) if width % count == 0)


def _float32_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _dot_gradient(
    x: jax.Array, floating: Any, codes: Any, rebuild: Any, dy: jax.Array
) -> tuple[jax.Array, Any]:
    """The cotangents of x and of the kernel's floating leaves, from that of their product."""
    kernel = rebuild(floating, codes)
    if not isinstance(kernel, jax.Array):
        return jax.vjp(lambda x, floating: weights.dot(x, rebuild(floating, codes)), x, floating)[1](dy)
    contract = (((1,), (1,)), ((), ()))
    dx = jax.lax.dot_general(dy, kernel.astype(dy.dtype), contract, preferred_element_type=jnp.float32)
    contract = (((0,), (0,)), ((), ()))
    return dx.astype(x.dtype), [jax.lax.dot_general(x, dy, contract, preferred_element_type=jnp.float32)]


def _split(kernel: Kernel) -> tuple[list[jax.Array], list[jax.Array], Any]:
    """-> the leaves of a kernel that have gradients, those that have none (codes), and what joins them again."""
    leaves, structure = jax.tree.flatten(kernel)
    real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def rebuild(floating: Any, codes: Any) -> Any:
        floating, codes = iter(floating), iter(codes)
        return structure.unflatten([next(floating) if f else next(codes) for f in real])

    floating = [leaf for f, leaf in zip(real, leaves, strict=True) if f]
    return floating, [leaf for f, leaf in zip(real, leaves, strict=True) if not f], rebuild


def varying_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """x, typed as differing between devices over the mesh axes that `like` differs over: inside `shard_map`, what a
    loop starts from must be of the type that it makes. `jnp.zeros_like` sees to that by itself."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    return jax.lax.pcast(x, axes, to="varying") if axes else x
