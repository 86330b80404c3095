"""decoupleQ: integers and floats of a uniform grid as two blocks of unknowns (arXiv 2404.12759).

A kernel becomes w = s c + z, with integers c of -2^(b-1) ... 2^(b-1) - 1 and floating s, z for each output and group of
inputs. With H = X^T X / T + 0.01 mean(diag) I of the layer's inputs, for each output by itself,

    minimise (w - w0)^T H (w - w0)   over c with s, z fixed (GPTQ), and over s, z with c fixed:
    (D^T H D) [s; z] = D^T H w0,     D = [c by groups | 1 by groups]      in float64

in turns; each side's answer is taken by an output only where its error falls. The zero z is a float of its own: it is
not rounded to an integer, and nothing is read off the range of the weights again. It begins with min-max grids that
contain 0, by rounding and by GPTQ, and before the first turn the range is clipped to what rounds best under H.

Blocks in sequence, and in a block the kernels of one input together (query, key, value; output; gate, up; down), each
with H from the block as compressed so far. Then the integers are frozen and all s, z and norms of the block are tuned:
its outputs should be those of the original block on the same inputs, which come from the compressed blocks before it.

Errors are always those of s and z as they are stored. A symmetric grid has z = 0: the paper's code spans the largest
magnitude m of a group by s = 2 m / (2^b - 1), and solves for s alone. The integers are GPTQ's, as in the paper's
language models, or those of `Projected` gradient descent, as in its image models.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.compression.baselines import clip_parts
from research.compression.blocks import (
    SELECT,
    Notes,
    Walk,
    check_array,
    each,
    kernels_at,
    plain,
    replace,
    through,
)
from research.compression.chain import PyTree, Subject
from research.compression.rounding import Affine, Uniform, feed_back
from research.errors import UserError
from research.nn.packed import check_bits, check_group
from research.nn.quantized import Quantized
from research.nn.transformer import Stream
from research.training.observe import Batch, real_tokens
from research.training.paths import named_leaves

DAMP = 0.01  # of H, in the paper's code
RETRIES = (0.01, 0.1, 1.0, 10.0, 100.0)  # of the factorisation
EPS = 1e-5  # of Adam that moves weights, H having a mean diagonal of 1
STOP = 1e-4  # the share of outputs below which improvements are not worth another turn
SOLVED = 1 << 23  # float64s of the systems that are solved together


@dataclasses.dataclass(frozen=True)
class Projected:
    """Integers by projected gradient descent on (w - w0)^T H (w - w0), w within the ends of its grid.

    `first` steps of Adam for all weights; then, inputs of the largest moment first, an input is rounded to nearest,
    and `between` steps move those still to come (the code's `round_fn=train`). rate: a step's, in units of weights.
    """

    first: int = 50
    between: int = 50
    rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.first < 0 or self.between < 0 or not self.rate > 0:
            raise UserError(
                f"Projected takes steps of at least 0 and a positive rate, not first={self.first}, "
                f"between={self.between}, rate={self.rate}"
            )

    def solve(
        self, w: np.ndarray, hessian: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int
    ) -> np.ndarray:
        """The codes uint8[in, out] of w [in, out] on the grid of scale and zero [groups, out]."""
        arrays = (jnp.asarray(part, jnp.float32) for part in (w, hessian, scale, zero))
        return np.asarray(_projected(self, bits, *arrays)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class DecoupleQ:
    """Integers, then floats, in turns; then all floats of a block together.

    Args:
        turns: how often integers are solved for at most, GPTQ at the beginning included; 1 is GPTQ where that beats
            rounding. The paper's max_iter_num.
        clips: parts of the range that are tried before the first turn.
        epochs: of tuning each block; 0: none. rate: its learning rate, of Adam with betas 0.9 and 0.99.
        store: what s and the zero, 2^(b-1) - z / s in units of codes, are stored in.
        symmetric: z = 0, of which nothing is stored.
        solver: of the integers; None: GPTQ.
    """

    bits: int = 2
    group: int | None = None
    turns: int = 4
    clips: int = 160
    epochs: int = 4
    rate: float = 1e-5
    store: str = "float16"
    symmetric: bool = False
    solver: Projected | None = None
    select: str = SELECT

    name: ClassVar[str] = "decoupleq"
    needs_data: ClassVar[bool] = True
    needs_compressed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        clip_parts(self.clips)
        if self.turns < 1 or self.epochs < 0 or not self.rate >= 0:
            raise UserError(
                f"decoupleq takes turns of at least 1, epochs and a rate of at least 0, not turns={self.turns}, "
                f"epochs={self.epochs}, rate={self.rate}"
            )

    def compress(self, subject: Subject) -> tuple[PyTree, list[str]]:
        walk, notes = Walk(subject.model, subject.params, subject.batches, self.select), Notes()
        params = dict(subject.params)
        before, after = [], []
        for key_ in jax.random.split(subject.key, walk.layers):
            name = walk.name
            subject.tell(f"{self.name}: block {walk.index + 1} of {walk.layers}")
            block, grids = params[name], {}
            for stage in walk.stages(block):
                grams = walk.grams(block, stage)
                notes.unseen(name, grams)
                for path, kernel in kernels_at(block, stage).items():
                    check_array(self.name, f"{name}/{path}", kernel)
                    try:
                        grids[path] = self.solve(np.asarray(kernel), grams[path].mean())
                    except UserError as error:
                        raise UserError(f"{name}/{path}: {error}") from None
                block = replace(block, {path: grids[path].kernel() for path in stage})
            if self.epochs and grids:
                block, loss = tune(
                    walk,
                    subject.original[name],
                    block,
                    grids,
                    self.bits,
                    self.epochs,
                    self.rate,
                    key_,
                    self.symmetric,
                )
                before.append(loss[0])
                after.append(loss[-1])
            params[name] = replace(
                block, {path: grid.packed(self.bits, self.symmetric) for path, grid in grids.items()}
            )
            walk.advance(params[name])
        if before:
            shares = ", ".join(f"{b / a:.3f}" for a, b in zip(before, after, strict=True))
            notes.found[f"squared error of the outputs after tuning, of that before: {shares}"] = ["blocks"]
        return params, notes.lines()

    def solve(self, w: np.ndarray, gram: np.ndarray) -> "Stored":
        """w [..., in, out] and the means gram [..., in, in] of its inputs -> the grid and its integers."""

        def one(w: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, ...]:
            shape = self.bits, self.group, self.turns, self.clips, self.store
            found = decouple(w, gram, *shape, symmetric=self.symmetric, solver=self.solver)[0]
            return found.codes, found.scale, found.zero

        return Stored(*each(one, np.asarray(w, np.float64), gram))


@dataclasses.dataclass(frozen=True)
class Stored:
    """w = scale (code - zero): codes uint8[..., in, out] of 0 ... 2^b - 1, scale and zero [..., groups, out]."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray

    def kernel(self) -> jax.Array:
        """float32[..., in, out]."""
        return jnp.asarray(_values(self.codes, self.scale.astype(np.float32), self.zero.astype(np.float32)))

    def packed(self, bits: int, symmetric: bool = False) -> Quantized:
        zero = None if symmetric else jnp.asarray(self.zero)
        return Quantized.from_codes(jnp.asarray(self.codes), jnp.asarray(self.scale), zero, bits)


def decouple(
    w: np.ndarray,
    gram: np.ndarray,
    bits: int,
    group: int | None,
    turns: int,
    clips: int,
    store: str = "float32",
    *,
    symmetric: bool = False,
    solver: Projected | None = None,
) -> tuple[Stored, list[np.ndarray]]:
    """Steps 1 to 3 for one kernel w float64[in, out]: the grid, and the errors [out] after every step that was accepted
    or not, which never rise."""
    inputs = w.shape[0]
    group = check_group(inputs, group)
    size = np.trace(gram) / inputs
    # An input that saw nothing has no say: then all are alike, and weights are rounded to nearest.
    hessian = gram + DAMP * size * np.eye(inputs) if size > 0 else np.eye(inputs)
    steps: list[np.ndarray] = []

    def better(best: Stored | None, other: Stored) -> Stored:
        error = _error(w, hessian, other)
        wins = np.ones(w.shape[1], bool) if best is None else error < steps[-1]
        steps.append(error if best is None else np.where(wins, error, steps[-1]))
        if best is None:
            return other
        return Stored(
            *(np.where(wins, new, old) for new, old in zip(_parts(other), _parts(best), strict=True))
        )

    ends = _ends(w, group, symmetric)

    def spanning(part: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale, shift = _range(ends, part, bits)
        return _rounded(scale, 0 * shift if symmetric else shift, bits, store)

    def fitting(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _rounded(*floats(w, hessian, codes, group, bits, symmetric), bits, store)

    def integers(scale: np.ndarray, zero: np.ndarray) -> Stored:
        solve = _gptq if solver is None else solver.solve
        return Stored(solve(w, hessian, scale, zero, bits), scale, zero)

    scale, zero = spanning(1.0)
    best = better(None, _nearest(w, scale, zero, bits))
    best = better(best, integers(scale, zero))
    for turn in range(turns - 1):
        reached = steps[-1]
        scale, zero = best.scale, best.zero
        if turn == 0:
            errors = [_error(w, hessian, _nearest(w, *spanning(part), bits)) for part in clip_parts(clips)]
            part = np.asarray(clip_parts(clips))[np.argmin(errors, axis=0)]
            scale, zero = fitting(_nearest(w, *spanning(part), bits).codes)
        best = better(best, integers(scale, zero))
        best = better(best, Stored(best.codes, *fitting(best.codes)))
        if np.mean(steps[-1] < reached) < STOP:
            break
    return best, steps


def floats(
    w: np.ndarray, hessian: np.ndarray, codes: np.ndarray, group: int, bits: int, symmetric: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The s and z [groups, out] of the least error for integers codes [in, out]: step 3c, float64.

    symmetric: z is 0, and of one group s = w0^T H c / c^T H c. Where all integers of a group are equal (symmetric:
    0), s and z can't be told apart: 1 % of the mean diagonal is added there.
    """
    inputs, outputs = w.shape
    groups = inputs // group
    owner = np.arange(inputs) // group
    ones = (owner[:, None] == np.arange(groups)).astype(np.float64)  # [in, groups]
    by_group = hessian @ ones  # [in, groups]
    between = ones.T @ by_group  # [groups, groups]
    target = hessian @ w  # [in, out]
    signed = codes.astype(np.float64) - 2 ** (bits - 1)
    unknowns = groups if symmetric else 2 * groups
    solution = np.zeros((2 * groups, outputs))
    width = max(SOLVED // max(4 * groups * groups, inputs * groups), 1)
    for at in range(0, outputs, width):
        c = signed[:, at : at + width]
        count = c.shape[1]
        split = c.reshape(groups, group, count)
        # D = [c by groups | ones by groups]: the four quarters of D^T H D.
        weighted = np.stack(
            [hessian[:, owner == b] @ c[owner == b] for b in range(groups)]
        )  # [groups, in, n]
        squares = np.einsum("bagn,agn->nab", weighted.reshape(groups, groups, group, count), split)
        own = target[:, at : at + width].reshape(groups, group, count)
        right = np.einsum("agn,agn->na", split, own)
        if symmetric:
            system, equal = squares, (split == 0).all(1).any(0)
        else:
            mixed = np.einsum("agn,agb->nab", split, by_group.reshape(groups, group, groups))
            system = np.empty((count, unknowns, unknowns))
            system[:, :groups, :groups] = squares
            system[:, :groups, groups:] = mixed
            system[:, groups:, :groups] = mixed.swapaxes(1, 2)
            system[:, groups:, groups:] = between
            right = np.concatenate([right, own.sum(1).T], axis=1)
            equal = (split.max(1) == split.min(1)).any(0)
        ridge = 0.01 * np.einsum("nii->n", system) / unknowns
        system += np.where(equal, np.where(ridge > 0, ridge, 1.0), 0.0)[:, None, None] * np.eye(unknowns)
        solution[:unknowns, at : at + width] = np.linalg.solve(system, right[..., None])[..., 0].T
    return solution[:groups], solution[groups:]


def tune(
    walk: Walk,
    original: PyTree,
    block: PyTree,
    grids: dict[str, Stored],
    bits: int,
    epochs: int,
    rate: float,
    key: jax.Array,
    symmetric: bool = False,
) -> tuple[PyTree, list[float]]:
    """Step 4: s and z of all `grids`, which are replaced there, and the norms, by Adam on single sequences; symmetric
    grids have no z.

    The floats that are kept are those of the epoch with the least error over all sequences, which may be the beginning.
    Returns the block and the errors before and after, means of squares.
    """
    wanted = walk.outputs(original)
    rows = _rows([(stream, place, out.x) for (stream, place), out in zip(walk.inputs(), wanted, strict=True)])
    start = plain(block)
    middle = 2 ** (bits - 1)
    codes = {path: jnp.asarray(grid.codes.astype(np.int8) - middle) for path, grid in grids.items()}
    scales = {path: jnp.asarray(grid.scale, jnp.float32) for path, grid in grids.items()}
    shifts = {
        path: scales[path] * (middle - jnp.asarray(grid.zero, jnp.float32)) for path, grid in grids.items()
    }
    norms = kernels_at(start, [path for path in named_leaves(start) if path.endswith("norm/scale")])
    free = {"scale": scales, "shift": {} if symmetric else shifts, "norm": norms}
    state, count = _adam(rate).init(free), jax.tree.leaves(rows)[0].shape[0]
    measure = lambda free: float(_mean_error(walk.block, free, codes, start, rows))  # noqa: E731
    best, first = free, measure(free)
    least = first
    for own in jax.random.split(key, epochs):
        order = jax.random.permutation(own, count)
        free, state = _epoch(walk.block, rate, free, state, codes, start, rows, order)
        if (error := measure(free)) < least:
            best, least = free, error
    for path, grid in grids.items():
        scale, zero = np.asarray(best["scale"][path], np.float64), grid.zero
        if not symmetric:
            zero = middle - np.asarray(best["shift"][path], np.float64) / scale
        grids[path] = Stored(grid.codes, scale.astype(grid.scale.dtype), zero.astype(grid.zero.dtype))
    return replace(block, best["norm"]), [first, least]


@functools.partial(jax.jit, static_argnums=0)
def _epoch(
    block: nn.Module,
    rate: float | jax.Array,
    free: PyTree,
    state: PyTree,
    codes: PyTree,
    start: PyTree,
    rows: Any,
    order: jax.Array,
) -> tuple[PyTree, PyTree]:
    def step(carry: tuple[PyTree, PyTree], row: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
        free, state = carry
        gradient = jax.grad(_row_error, argnums=1)(
            block, free, codes, start, jax.tree.map(lambda x: x[row], rows)
        )
        updates, state = _adam(rate).update(gradient, state, free)
        return (optax.apply_updates(free, updates), state), None

    return jax.lax.scan(step, (free, state), order)[0]


@functools.partial(jax.jit, static_argnums=0)
def _mean_error(block: nn.Module, free: PyTree, codes: PyTree, start: PyTree, rows: Any) -> jax.Array:
    return jnp.mean(jax.lax.map(lambda row: _row_error(block, free, codes, start, row), rows))


def _row_error(block: nn.Module, free: PyTree, codes: PyTree, start: PyTree, row: Any) -> jax.Array:
    """The mean square, over tokens and channels of one sequence, of what the block's outputs are off."""
    stream, place, wanted = row
    kernels = {path: _spread(free["scale"][path], c) * c for path, c in codes.items()}
    kernels |= {path: kernels[path] + _spread(shift, codes[path]) for path, shift in free["shift"].items()}
    out = through(block, replace(start, kernels | free["norm"]), stream, place).x
    real = real_tokens(place)[..., None]
    return jnp.sum(jnp.where(real, jnp.square(out - wanted), 0)) / jnp.maximum(
        jnp.sum(real) * out.shape[-1], 1
    )


def _adam(rate: float | jax.Array) -> optax.GradientTransformation:
    return optax.adamw(rate, 0.9, 0.99, eps=2e-5, weight_decay=1e-6)


def _rows(batches: list[tuple[Stream, Batch, jax.Array]]) -> Any:
    """Batches [B, T, ...] -> single sequences, leaves [rows, 1, T, ...]."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:, None], *batches)


def _spread(fitted: Any, codes: Any) -> Any:
    """[..., groups, out] -> [..., in, out]."""
    repeat = np.repeat if isinstance(fitted, np.ndarray) else jnp.repeat
    return repeat(fitted, codes.shape[-2] // fitted.shape[-2], axis=-2)


def _values(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    return _spread(scale, codes) * (codes.astype(scale.dtype) - _spread(zero, codes))


def _parts(stored: Stored) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return stored.codes, stored.scale, stored.zero


def _error(w: np.ndarray, hessian: np.ndarray, stored: Stored) -> np.ndarray:
    """(w - w0)^T H (w - w0) of every output, float64; infinite where the grid has no width or is not finite."""
    scale, zero = stored.scale.astype(np.float64), stored.zero.astype(np.float64)
    usable = (np.isfinite(scale) & np.isfinite(zero) & (scale != 0)).all(0)
    difference = np.where(usable, _values(stored.codes, scale, np.where(usable, zero, 0)) - w, 0)
    return np.where(usable, np.sum(difference * (hessian @ difference), axis=0), np.inf)


def _ends(w: np.ndarray, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest weight of every group, 0 among them, or both as far from it: [groups, out] each."""
    split = w.reshape(-1, group, w.shape[1])
    if symmetric:
        most = np.abs(split).max(1)
        return -most, most
    return np.minimum(split.min(1), 0), np.maximum(split.max(1), 0)


def _range(
    ends: tuple[np.ndarray, np.ndarray], part: float | np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """s and z of the grid that spans a part of the range; s = 1 where all weights are 0."""
    least, most = (part * end for end in ends)
    scale = (most - least) / (2**bits - 1)
    return np.where(scale > 0, scale, 1.0), least + np.where(scale > 0, scale, 1.0) * 2 ** (bits - 1)


def _rounded(scale: np.ndarray, shift: np.ndarray, bits: int, store: str) -> tuple[np.ndarray, np.ndarray]:
    """s and z -> scale and zero, in units of codes of 0 ... 2^b - 1, as they are stored."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = scale.astype(jnp.dtype(store))
        return scale, (2 ** (bits - 1) - shift / scale.astype(np.float64)).astype(jnp.dtype(store))


def _nearest(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> Stored:
    wide = [_spread(x.astype(np.float64), w) for x in (scale, zero)]
    codes = np.clip(np.round(w / wide[0] + wide[1]), 0, 2**bits - 1)
    return Stored(codes.astype(np.uint8), scale, zero)


def _gptq(w: np.ndarray, hessian: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """Integers for s and z by GPTQ, inputs of the largest moment first."""
    fitted = Affine(jnp.asarray(scale, jnp.float32), jnp.asarray(zero, jnp.float32))
    arrays = jnp.asarray(w, jnp.float32), jnp.asarray(hessian, jnp.float32)
    group = w.shape[0] // scale.shape[0]
    for damp in RETRIES:
        rounded = feed_back(*arrays, Uniform(bits), group, fitted, damp=damp, order=True)
        if not rounded.nearest.any():
            break
    return np.asarray(rounded.codes).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _projected(
    solver: Projected, bits: int, w: jax.Array, hessian: jax.Array, scale: jax.Array, zero: jax.Array
) -> jax.Array:
    places = jnp.argsort(-jnp.diag(hessian), stable=True)
    hessian = (hessian / jnp.mean(jnp.diag(hessian)))[places][:, places]
    grid, wanted = Uniform(bits), w[places]
    fitted = Affine(*(_spread(part, w)[places] for part in (scale, zero)))
    ends = [grid.decode(code, fitted) for code in (0, 2**bits - 1)]
    low, high = jnp.minimum(*ends), jnp.maximum(*ends)  # a scale may be negative
    adam = optax.adam(solver.rate, eps=EPS)
    number = jnp.arange(w.shape[0])[:, None]

    def descend(
        first: jax.Array | int, count: int, carry: tuple[jax.Array, PyTree]
    ) -> tuple[jax.Array, PyTree]:
        """`count` steps of the weights from input `first` on."""

        def step(_: jax.Array, carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
            w, state = carry
            updates, state = adam.update(hessian @ (w - wanted), state)
            return jnp.where(number >= first, jnp.clip(w + updates, low, high), w), state

        return jax.lax.fori_loop(0, count, step, carry)

    def one(j: jax.Array, carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
        w, state = carry
        own = jax.tree.map(lambda part: part[j], fitted)
        w = w.at[j].set(grid.decode(grid.encode(w[j], own), own))
        return descend(j + 1, solver.between, (w, state))

    with jax.default_matmul_precision("highest"):
        carry = descend(0, solver.first, (wanted, adam.init(wanted)))
        w, _ = jax.lax.fori_loop(0, w.shape[0] - 1, one, carry)
    return jnp.zeros(w.shape, jnp.int32).at[places].set(grid.encode(w, fitted))
