"""Rounding weights to a grid: each to its nearest value, or with the error fed back (GPTQ, arXiv 2210.17323).

A kernel W [in, out] is rounded row by row, one row an input. What a row's error does to the layer's outputs is made up
for, as far as it can be, by the rows that are still to come: with H the Gram matrix of the inputs and U upper
triangular, H^-1 = U^T U,

    q_j = round(w_j),   e_j = (w_j - q_j) / U_jj,   w_k -= U_jk e_j   for k > j

which minimises tr (W - Q)^T H (W - Q) over the later rows, whose value in the end is sum_j |e_j|^2. That is greedy: a
grid that cuts off much of what was added can do worse than rounding to nearest. Rows are rounded in blocks: within one
they are updated at once, behind it by one product.

A grid is a function of a row and its parameters (scale, zero), which are fitted for each output and each group of
inputs. So one loop serves uniform grids, code books and the ternary grid alike.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.errors import UserError

PyTree = Any

BLOCK = 128  # rows, as in the paper


class Grid(Protocol):
    """The values that weights may take. Implementations are hashable; parameters are pytrees of arrays [..., out]."""

    def fit(self, w: jax.Array) -> PyTree:
        """w [group, out] -> the parameters of the group, leaves [out]. Rows of zeros behind w change nothing."""

    def encode(self, w: jax.Array, fitted: PyTree) -> jax.Array:
        """w [out] -> codes int32[out] of the nearest values."""

    def decode(self, codes: jax.Array, fitted: PyTree) -> jax.Array:
        """Codes [out] -> values [out]."""


class Affine(struct.PyTreeNode):
    """Value = scale * (code - zero). A zero need not be an integer, and a scale may be negative."""

    scale: jax.Array
    zero: jax.Array


class Scale(struct.PyTreeNode):
    """Value = scale * (what the code stands for)."""

    scale: jax.Array


class Ends(struct.PyTreeNode):
    """The two values of the ternary grid beside 0: low <= 0 <= high."""

    low: jax.Array
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Equidistant values, codes 0 ... 2^bits - 1 as `research.nn.quantized` packs them.

    symmetric: the largest weight has the last code, and zero is 2^(bits-1). Otherwise codes span the range of the group
    and 0, which has a code of its own. store: the dtype that scales are stored in; weights are rounded to the grid of
    the stored scale. Raises UserError for bits outside 2 ... 8.
    """

    bits: int
    symmetric: bool = False
    store: str = "float32"

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise UserError(f"bits={self.bits}: uniform grids have 2 to 8 bits")

    def fit(self, w: jax.Array) -> Affine:
        if self.symmetric:
            middle = 2 ** (self.bits - 1)
            scale = self._stored(jnp.max(jnp.abs(w), axis=0) / (middle - 1))
            return Affine(scale, jnp.full_like(scale, middle))
        least, most = jnp.minimum(jnp.min(w, axis=0), 0), jnp.maximum(jnp.max(w, axis=0), 0)
        scale = self._stored((most - least) / (2**self.bits - 1))
        return Affine(scale, jnp.clip(jnp.round(-least / scale), 0, 2**self.bits - 1))

    def encode(self, w: jax.Array, fitted: Affine) -> jax.Array:
        codes = jnp.round(w / fitted.scale + fitted.zero)
        return jnp.clip(codes, 0, 2**self.bits - 1).astype(jnp.int32)

    def decode(self, codes: jax.Array, fitted: Affine) -> jax.Array:
        return fitted.scale * (codes - fitted.zero)

    def _stored(self, scale: jax.Array) -> jax.Array:
        return _nonzero(scale.astype(self.store).astype(scale.dtype))


@dataclasses.dataclass(frozen=True)
class CodeBook:
    """Ascending values within [-1, 1] times the group's largest weight: `research.nn.normal_float.code_book` is one."""

    values: tuple[float, ...]
    store: str = "float32"

    def __post_init__(self) -> None:
        if len(self.values) < 2 or list(self.values) != sorted(set(self.values)):
            raise UserError("a code book has at least two values, in ascending order")

    def fit(self, w: jax.Array) -> Scale:
        largest = jnp.max(jnp.abs(w), axis=0)
        return Scale(_nonzero(largest.astype(self.store).astype(w.dtype)))

    def encode(self, w: jax.Array, fitted: Scale) -> jax.Array:
        values = np.asarray(self.values)
        bounds = jnp.asarray((values[1:] + values[:-1]) / 2, w.dtype)
        return jnp.searchsorted(bounds, w / fitted.scale).astype(jnp.int32)

    def decode(self, codes: jax.Array, fitted: Scale) -> jax.Array:
        return fitted.scale * jnp.asarray(self.values, fitted.scale.dtype)[codes]


@dataclasses.dataclass(frozen=True)
class Ternary:
    """0 and the least and the largest weight (arXiv 2310.16795, section 3.1): codes 0, 1 (least) and 2 (largest).

    An end is taken beyond half of it. -1 and 1 where all weights are 0.
    """

    def fit(self, w: jax.Array) -> Ends:
        low, high = jnp.minimum(jnp.min(w, axis=0), 0), jnp.maximum(jnp.max(w, axis=0), 0)
        empty = (low == 0) & (high == 0)
        return Ends(jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high))

    def encode(self, w: jax.Array, fitted: Ends) -> jax.Array:
        return jnp.where(w > fitted.high / 2, 2, jnp.where(w < fitted.low / 2, 1, 0)).astype(jnp.int32)

    def decode(self, codes: jax.Array, fitted: Ends) -> jax.Array:
        return jnp.where(codes == 2, fitted.high, jnp.where(codes == 1, fitted.low, 0.0))


class Rounded(struct.PyTreeNode):
    """A rounded kernel.

    codes int32[..., in, out]; fitted: the grid's parameters, leaves [..., groups, out]: input i has i // group.
    error [..., out]: the damped quadratic error of each output. nearest bool[...]: the Gram matrix could not be
    factored, and its kernel was rounded to nearest.
    """

    codes: jax.Array
    fitted: PyTree
    error: jax.Array
    nearest: jax.Array
    group: int = struct.field(pytree_node=False)

    def values(self, grid: Grid) -> jax.Array:
        """The kernel [..., in, out] that the codes stand for."""
        return grid.decode(self.codes, _spread(self.fitted, self.codes.shape[-2], self.group))


@functools.partial(jax.jit, static_argnames=("grid", "group"))
def fit(w: jax.Array, grid: Grid, group: int | None = None) -> PyTree:
    """w [..., in, out] -> the grid's parameters of every `group` inputs (None: all), leaves [..., groups, out].

    The last group is smaller where `group` does not divide the inputs. Raises UserError for a group below 1.
    """
    inputs, outputs = w.shape[-2:]
    group = _group(inputs, group)
    if w.ndim > 2:
        return jax.vmap(lambda w: fit(w, grid, group))(w)
    w = jnp.pad(w, ((0, -inputs % group), (0, 0)))
    return jax.vmap(grid.fit)(w.reshape(-1, group, outputs))


@functools.partial(jax.jit, static_argnames=("grid", "group"))
def round_to_nearest(
    w: jax.Array, grid: Grid, group: int | None = None, fitted: PyTree | None = None
) -> Rounded:
    """Every weight of w [..., in, out] to the nearest value, by `fitted`, default that of `fit`. error: |w - q|^2."""
    group = _group(w.shape[-2], group)
    fitted = fit(w, grid, group) if fitted is None else fitted
    spread = _spread(fitted, w.shape[-2], group)
    codes = grid.encode(w, spread)
    error = jnp.sum(jnp.square(w - grid.decode(codes, spread)), axis=-2)
    return Rounded(codes, fitted, error, jnp.ones(w.shape[:-2], bool), group)


@functools.partial(jax.jit, static_argnames=("grid", "group", "order", "refit", "block"))
def feed_back(
    w: jax.Array,
    gram: jax.Array,
    grid: Grid,
    group: int | None = None,
    fitted: PyTree | None = None,
    *,
    damp: float = 0.01,
    order: bool = False,
    refit: bool = False,
    block: int = BLOCK,
) -> Rounded:
    """w [..., in, out] rounded with the error fed back, given gram [..., in, in] = X^T X up to a factor.

    In the dtype of w, float32 or float64. Leading axes are mapped over, experts and layers alike.

    Args:
        group: inputs that share parameters; None: all.
        fitted: the parameters, leaves [..., groups, out]; default those of `fit` for w as it is.
        damp: times the mean of the Gram's diagonal is added to its diagonal. Where all is 0, 1 is.
        order: round the inputs of the largest diagonal first.
        refit: fit a group when its first row is rounded, to what the rows before have made of it.
        block: rows to a block, at most; it does not change the result.

    Raises:
        UserError: shapes that do not go together; `refit` with `order`, which scatters a group, or with `fitted`.
    """
    inputs, outputs = w.shape[-2:]
    group = _group(inputs, group)
    if w.dtype not in (jnp.float32, jnp.float64):
        raise UserError(f"errors are fed back in float32 or float64, and the kernel is {w.dtype}")
    if gram.shape != (*w.shape[:-2], inputs, inputs):
        raise UserError(
            f"a kernel {w.shape} takes a Gram matrix {(*w.shape[:-2], inputs, inputs)}, not {gram.shape}"
        )
    if refit and (order or fitted is not None):
        other = "order=True, which scatters the inputs of a group" if order else "parameters that are given"
        raise UserError(f"refit=True fits groups one after the other: not with {other}")
    fitted = fit(w, grid, group) if fitted is None else fitted
    groups = -(-inputs // group)
    for leaf in jax.tree.leaves(fitted):
        if leaf.shape != (*w.shape[:-2], groups, outputs):
            raise UserError(
                f"{groups} groups of {group} inputs take parameters {(*w.shape[:-2], groups, outputs)}, "
                f"not {leaf.shape}"
            )
    one = functools.partial(
        _feed_back, grid=grid, group=group, damp=damp, order=order, refit=refit, block=block
    )
    for _ in range(w.ndim - 2):
        one = jax.vmap(one)
    with jax.default_matmul_precision("highest"):
        return one(w, gram.astype(w.dtype), fitted)


def _damped(gram: jax.Array, damp: float) -> jax.Array:
    """gram [in, in] plus `damp` times the mean of its diagonal; plus 1 where that is 0: then it is the identity."""
    mean = jnp.mean(jnp.diag(gram))
    return gram + jnp.where(mean > 0, damp * mean, 1.0) * jnp.eye(gram.shape[0], dtype=gram.dtype)


def _feed_back(
    w: jax.Array,
    gram: jax.Array,
    fitted: PyTree,
    *,
    grid: Grid,
    group: int,
    damp: float,
    order: bool,
    refit: bool,
    block: int,
) -> Rounded:
    inputs = w.shape[0]
    # Stretches of rows that are fitted together, each of whole blocks.
    stretch = group if refit else inputs
    block = _divisor(stretch, block) if refit else min(block, stretch)
    stretch = -(-stretch // block) * block
    padding = -inputs % stretch
    total = inputs + padding

    gram = _damped(gram, damp)
    places = jnp.argsort(-jnp.diag(gram), stable=True) if order else jnp.arange(inputs)
    factor, nearest = _inverse_factor(gram[places][:, places])
    # Rows of zeros that no other row knows of.
    factor = jnp.pad(factor, ((0, padding), (0, padding))) + jnp.diag(jnp.arange(total) >= inputs).astype(
        w.dtype
    )
    rows = jnp.pad(w[places], ((0, padding), (0, 0)))
    groups = jax.tree.leaves(fitted)[0].shape[0]
    owner = jnp.minimum(jnp.pad(places, (0, padding), constant_values=inputs) // group, groups - 1)

    def row(start: jax.Array, factor: jax.Array, fitted: PyTree, j: jax.Array, carry: Any) -> Any:
        rows, codes, errors = carry
        own = jax.tree.map(lambda leaf: leaf[owner[start + j]], fitted)
        code = grid.encode(rows[j], own)
        error = (rows[j] - grid.decode(code, own)) / factor[j, j]
        error = jnp.where(
            start + j < inputs, error, 0
        )  # a grid need not have the 0 that rows are padded with
        return rows - factor[j][:, None] * error, codes.at[j].set(code), errors.at[j].set(error)

    def one_block(start: jax.Array, fitted: PyTree, carry: Any) -> Any:
        rows, codes, squares = carry
        here = jax.lax.dynamic_slice_in_dim(rows, start, block)
        wide = jax.lax.dynamic_slice_in_dim(factor, start, block)
        within = jax.lax.dynamic_slice_in_dim(wide, start, block, axis=1)
        empty = (here, jnp.zeros(here.shape, jnp.int32), jnp.zeros_like(here))
        _, block_codes, errors = jax.lax.fori_loop(
            0, block, functools.partial(row, start, within, fitted), empty
        )
        behind = jnp.where(jnp.arange(total) >= start + block, wide, 0)
        rows = rows - behind.T @ errors
        codes = jax.lax.dynamic_update_slice_in_dim(codes, block_codes, start, 0)
        return rows, codes, squares + jnp.sum(jnp.square(errors), axis=0)

    def one_stretch(i: jax.Array, carry: Any) -> Any:
        fitted, *carry = carry
        if refit:
            new = grid.fit(jax.lax.dynamic_slice_in_dim(carry[0], i * stretch, stretch))
            fitted = jax.tree.map(lambda leaf, value: leaf.at[i].set(value), fitted, new)
        step = lambda b, carry: one_block(i * stretch + b * block, fitted, carry)  # noqa: E731
        return fitted, *jax.lax.fori_loop(0, stretch // block, step, tuple(carry))

    start = (fitted, rows, jnp.zeros(rows.shape, jnp.int32), jnp.zeros(w.shape[1], w.dtype))
    fitted, _, codes, squares = jax.lax.fori_loop(0, total // stretch, one_stretch, start)
    codes = jnp.zeros(w.shape, jnp.int32).at[places].set(codes[:inputs])
    return Rounded(codes, fitted, squares, nearest, group)


def _inverse_factor(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """U, upper triangular, with gram^-1 = U^T U; the identity and True where there is none in rounding."""
    # With gram = R R^T and R upper triangular, U is the inverse of R: nothing is inverted twice.
    scale = jnp.sqrt(jnp.mean(jnp.diag(gram)))
    lower = jnp.linalg.cholesky(gram[::-1, ::-1] / jnp.square(scale))
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    factor = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)[::-1, ::-1] / scale
    bad = ~jnp.all(jnp.isfinite(factor))
    return jnp.where(bad, identity, factor), bad


def _spread(fitted: PyTree, inputs: int, group: int) -> PyTree:
    """Leaves [..., groups, out] -> [..., in, out]."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, group, axis=-2)[..., :inputs, :], fitted)


def _group(inputs: int, group: int | None) -> int:
    if group is None:
        return inputs
    if group < 1:
        raise UserError(f"group={group}: a group has at least 1 input")
    return min(group, inputs)


def _divisor(of: int, most: int) -> int:
    return next(size for size in range(min(of, most), 0, -1) if of % size == 0)


def _nonzero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)
