"""Grouped matrix product: consecutive rows of one array, each group with the kernel of its expert.

`lax.ragged_dot` is this product on TPU and GPU. On CPU it computes every group for every row, and the loops below
take its place. What they are made for was measured, on two cores:

- Many rows (training): experts one after the other, each over its rows in pieces of `PIECE` and then of `tile`. A
  loop over tiles alone, which fetches the kernel every time, takes 1.4 times as long.
- Few rows (decoding): only the experts that have rows, their kernels in blocks of 128 KiB. Such a block is copied
  within the processor's cache, so that a kernel is read from memory once, at the speed of a dense product; copied
  as a whole it takes twice as long. Time does not depend on the number of experts.

The last tile of an expert runs into the rows of the next one. What it leaves there is overwritten when it is the
next one's turn, so groups need not begin at a multiple of anything.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.common import target_platform
from kernels_pallas.grouped_matmul import Unsupported, grouped_matmul
from research.errors import UserError
from research.nn import weights
from research.nn.weights import Kernel

PIECE = 256  # rows
BLOCK = 128 * 1024  # bytes


def grouped_dot(rows: jax.Array, kernel: Kernel, sizes: jax.Array, tile: int = 1) -> jax.Array:
    """rows [S, in] times kernel [E, in, out] -> [S, out] in the dtype of rows, accumulated in float32.

    The first sizes[0] rows belong to expert 0, the next sizes[1] to expert 1, and so on; sizes int32[E]. The rest,
    at least the last tile - 1 rows, belongs to none; it must be 0, and so must its cotangent, and becomes 0.
    """
    if target_platform() != "cpu" and isinstance(kernel, jax.Array):
        kernel = kernel.astype(rows.dtype)
        return jax.lax.ragged_dot(rows, kernel, sizes, preferred_element_type=jnp.float32).astype(rows.dtype)
    return _product(rows, kernel, sizes, tile)


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


def row_experts(sizes: jax.Array, rows: int) -> jax.Array:
    """The expert of every row, int32[rows]; E for those of none."""
    # How many end before it; jnp.searchsorted fails inside shard_map (jax 0.10).
    return jnp.sum(jnp.cumsum(sizes) <= jnp.arange(rows)[:, None], axis=1, dtype=jnp.int32)


def every_expert(rows: int, experts: int, tile: int) -> bool:
    """Whether there are rows enough that all experts will have some."""
    return rows > 2 * tile * experts


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(rows: jax.Array, kernel: Kernel, sizes: jax.Array, tile: int) -> jax.Array:
    by = _by_experts if every_expert(rows.shape[0], sizes.shape[0], tile) else _by_tiles
    return by(rows, kernel, sizes, tile)


def _product_forward(rows: jax.Array, kernel: Kernel, sizes: jax.Array, tile: int) -> tuple[jax.Array, Any]:
    return _product(rows, kernel, sizes, tile), (rows, kernel, sizes)


def _product_backward(tile: int, saved: Any, cotangent: jax.Array) -> tuple[jax.Array, Any, None]:
    """Both gradients of a piece of rows at a time. That of the kernel is added up in float32."""
    rows, kernel, sizes = saved
    floating, codes, rebuild = _split(kernel)

    def expert(d_rows: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        mine, codes, size, start = xs

        def piece(at: jax.Array, count: int, own: jax.Array | None, carry: Any) -> Any:
            d_rows, total = carry
            x = jax.lax.dynamic_slice_in_dim(rows, at, count)
            if own is not None:  # rows of the next expert have no part in this one's gradient
                x = jnp.where(jnp.arange(count)[:, None] < own, x, 0)
            dy = jax.lax.dynamic_slice_in_dim(cotangent, at, count)
            dx, parts = _dot_gradient(x, mine, codes, rebuild, dy)
            total = [a + b.astype(jnp.float32) for a, b in zip(total, parts, strict=True)]
            return jax.lax.dynamic_update_slice_in_dim(d_rows, dx, at, 0), total

        zeros = [jnp.zeros_like(leaf, dtype=jnp.float32) for leaf in mine]
        return pieces(start, size, rows.shape[0], tile, piece, (d_rows, zeros))

    start = jnp.cumsum(sizes) - sizes
    d_rows, totals = jax.lax.scan(expert, jnp.zeros_like(rows), (floating, codes, sizes, start))
    cast = [total.astype(leaf.dtype) for total, leaf in zip(totals, floating, strict=True)]
    nothing = [jnp.zeros(leaf.shape, jax.dtypes.float0) for leaf in codes]
    return d_rows, rebuild(cast, nothing), None


_product.defvjp(_product_forward, _product_backward)


def _by_experts(rows: jax.Array, kernel: Kernel, sizes: jax.Array, tile: int) -> jax.Array:
    def expert(out: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        mine, size, start = xs

        def piece(at: jax.Array, count: int, own: jax.Array | None, out: jax.Array) -> jax.Array:
            y = weights.dot(jax.lax.dynamic_slice_in_dim(rows, at, count), mine)
            return jax.lax.dynamic_update_slice_in_dim(out, y, at, 0)

        return pieces(start, size, rows.shape[0], tile, piece, out), None

    # Like the rows: inside shard_map, of the mesh axes that they differ over.
    out = jnp.zeros_like(rows, shape=(rows.shape[0], kernel.shape[-1]))
    return jax.lax.scan(expert, out, (kernel, sizes, jnp.cumsum(sizes) - sizes))[0]


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


def _by_tiles(rows: jax.Array, kernel: Kernel, sizes: jax.Array, tile: int) -> jax.Array:
    features = kernel.shape[-1]
    used = -(-sizes // tile)  # tiles of each expert
    end = jnp.cumsum(used)
    start = jnp.cumsum(sizes) - sizes
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
