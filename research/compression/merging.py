"""DARE, and merging the fine-tuned models of one base (arXiv 2311.03099).

What fine-tuning changed, delta_t = theta_t - theta_base, is redundant: with probability p each element is dropped and
the others are divided by 1 - p (equation 2),

    delta~ = (1 - m) * delta / (1 - p),   m ~ Bernoulli(p),

so that the expectation of every linear output stays. The differences of several models, dropped or not, are merged:

    average           theta_base + mean_t delta_t
    task arithmetic   theta_base + scale * sum_t delta_t                                         (arXiv 2212.04089)
    TIES              theta_base + scale * (mean of the trimmed deltas that agree in sign)       (arXiv 2306.01708)
    Fisher            theta_base + sum_t F_t delta_t / sum_t F_t, element by element             (arXiv 2111.09832)
    RegMean           theta_base + (sum_t G_t)^-1 sum_t G_t delta_t, G_t = X_t^T X_t             (arXiv 2212.09849)

"DARE then TIES" has several definitions; this is the paper's own (MergeLM): the whole of TIES, with its trimming over
all parameters together, after DARE. Others trim tensor by tensor, or not at all.

A model is a tree of arrays. What is merged are `Difference`s, {path: float32 array}, subtracted and rescaled in float32
whatever the models' dtype. A tied embedding is one leaf of the tree and merged once.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from research.errors import UserError
from research.nn.weights import Weight
from research.training.observe import Gram
from research.training.paths import compile_pattern

PyTree = Any
Difference = dict[str, jax.Array]
Dropping = Literal["random", "random_unscaled", "magnitude"]


def difference(
    tuned: PyTree, base: PyTree, exclude: Sequence[str] = (), name: str = "the model"
) -> Difference:
    """tuned - base in float32, of every parameter whose path none of the patterns `exclude` is found in.

    name: what messages call the tuned model. Raises UserError for trees that differ, with the path and both shapes,
    structured weights, and a pattern that is found nowhere or in all paths.
    """
    wanted, found = _flat(base, "the base"), _flat(tuned, name)
    for path in sorted(wanted.keys() | found.keys()):
        if path not in found or path not in wanted:
            here, there = ("the base", name) if path in wanted else (name, "the base")
            shape = tuple((wanted | found)[path].shape)
            raise UserError(
                f"{path} {shape} of {here} is not in {there}: only models of one base can be merged"
            )
        if wanted[path].shape != found[path].shape:
            raise UserError(
                f"{path} is {tuple(found[path].shape)} in {name} and {tuple(wanted[path].shape)} in the base: only "
                "models of one base can be merged"
            )
    excluded = [compile_pattern(pattern, "exclude") for pattern in exclude]
    for pattern in excluded:
        if not any(pattern.search(path) for path in wanted):
            raise UserError(f"exclude: {pattern.pattern!r} matches none of the {len(wanted)} parameters")
    paths = [path for path in wanted if not any(pattern.search(path) for pattern in excluded)]
    if not paths:
        raise UserError("exclude: every parameter is excluded, nothing is left to merge")
    return _subtract({path: found[path] for path in paths}, {path: wanted[path] for path in paths})


def add(base: PyTree, change: Difference, scale: float = 1.0) -> PyTree:
    """base + scale * change in float32, in the base's dtypes. Elements that do not change keep their bits, and so do
    parameters that `change` does not have."""
    flat = traverse_util.flatten_dict(dict(base), sep="/")
    changed = _add({path: flat[path] for path in change}, change, scale)
    return traverse_util.unflatten_dict(flat | changed, sep="/")


def drop(change: Difference, rate: float, key: jax.Array, how: Dropping = "random") -> Difference:
    """A share `rate` of the elements set to 0.

    "random" is DARE: each element by a draw of its own, the others divided by 1 - rate. "random_unscaled" does not
    divide (the paper's DropOnly). "magnitude" drops the int(rate * size) smallest of every tensor, without dividing.
    key: each tensor draws from its own split of it; models need different keys, or their masks coincide. A rate of 0
    changes nothing, one of 1 leaves nothing. Raises UserError for a rate outside [0, 1].
    """
    _check_share("drop", rate)
    if rate == 0:
        return change
    if how == "magnitude":
        return {path: jnp.asarray(_drop_smallest(np.asarray(value), rate)) for path, value in change.items()}
    keep = 1.0 - rate
    return _drop(change, key, keep, 1.0 / keep if how == "random" and rate < 1 else 1.0)


def dropped(
    tuned: PyTree,
    base: PyTree,
    rate: float,
    key: jax.Array,
    how: Dropping = "random",
    exclude: Sequence[str] = (),
) -> PyTree:
    """One fine-tuned model with a share of its difference dropped, theta~ = theta_base + delta~.

    A rate of 0 gives the bits of `tuned`; dropped elements have those of `base`. Raises UserError as `difference`.
    """
    change = difference(tuned, base, exclude)
    if rate == 0:
        _check_share("drop", rate)
        flat = traverse_util.flatten_dict(dict(base), sep="/")
        own = traverse_util.flatten_dict(dict(tuned), sep="/")
        return traverse_util.unflatten_dict(flat | {path: own[path] for path in change}, sep="/")
    return add(base, drop(change, rate, key, how))


def average(changes: Sequence[Difference]) -> Difference:
    """The mean."""
    return _combine(_some(changes), 1.0 / len(changes))


def task_arithmetic(changes: Sequence[Difference], scale: float = 1.0) -> Difference:
    """scale times the sum."""
    return _combine(_some(changes), scale)


def ties(changes: Sequence[Difference], scale: float = 1.0, trim: float = 0.8) -> Difference:
    """Trim, elect signs, and average what agrees (TIES), as MergeLM has it.

    All parameters of a model are one vector: elements below its int(trim * size)-th smallest magnitude become 0. The
    sign of an element is that of the sum over models, or that of most other elements where the sum is 0; models of
    that sign are averaged. Where `trim` is below the share that was dropped, its threshold is 0 and nothing is trimmed.

    Raises UserError for `trim` outside [0, 1).
    """
    _check_share("trim", trim, open_end=True)
    trimmed = [_trim(change, _threshold(change, trim)) for change in _some(changes)]
    return _elect(trimmed, scale)


def fisher(changes: Sequence[Difference], fishers: Sequence[Mapping[str, np.ndarray]]) -> Difference:
    """Each element weighted by the model's empirical Fisher (`collect_fisher`), which is divided by its norm over all
    kernels, as in MergeLM, and at least 1e-6. Parameters without one are averaged."""
    _check_paths(changes, fishers)
    merged = average(changes)
    norms = [np.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in f.values())) for f in fishers]
    for path in fishers[0].keys() & merged.keys():
        weights = [np.maximum(f[path] / norm, 1e-6) for f, norm in zip(fishers, norms, strict=True)]
        total = sum(w * np.asarray(change[path]) for w, change in zip(weights, changes, strict=True))
        merged[path] = jnp.asarray(total / sum(weights), jnp.float32)
    return merged


def regmean(
    changes: Sequence[Difference], grams: Sequence[Mapping[str, Gram]], off_diagonal: float = 0.9
) -> Difference:
    """The kernels whose outputs are nearest to those of each model on its own inputs; G_t as `collect_grams` has them,
    off-diagonals scaled, solved in float64. Parameters without a Gram matrix are averaged.

    Raises UserError for a factor outside [0, 1), and where the sum of the Gram matrices is singular nevertheless.
    """
    _check_share("off_diagonal", off_diagonal, open_end=True)
    _check_paths(changes, grams)
    merged = average(changes)
    for path in grams[0].keys() & merged.keys():
        shrunk = [_shrink(gram[path].total.astype(np.float64), off_diagonal) for gram in grams]
        right = sum(g @ np.asarray(c[path], np.float64) for g, c in zip(shrunk, changes, strict=True))
        try:
            merged[path] = jnp.asarray(np.linalg.solve(sum(shrunk), right), jnp.float32)
        except np.linalg.LinAlgError:
            raise UserError(
                f"{path}: some of its inputs were 0 throughout, so RegMean has no solution"
            ) from None
    return merged


def _flat(tree: PyTree, name: str) -> dict[str, jax.Array]:
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    for path, leaf in flat.items():
        if isinstance(leaf, Weight):
            raise UserError(f"{path} is {type(leaf).__name__} in {name}: merge first, compress afterwards")
    return flat


@jax.jit
def _subtract(tuned: dict[str, jax.Array], base: dict[str, jax.Array]) -> Difference:
    return jax.tree.map(lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), tuned, base)


@jax.jit
def _add(base: dict[str, jax.Array], change: Difference, scale: float) -> dict[str, jax.Array]:
    def one(x: jax.Array, d: jax.Array) -> jax.Array:
        return jnp.where(d == 0, x, (x.astype(jnp.float32) + scale * d).astype(x.dtype))

    return jax.tree.map(one, base, change)


@jax.jit
def _drop(change: Difference, key: jax.Array, keep: float, factor: float) -> Difference:
    keys = jax.random.split(key, len(change))
    return {
        path: jnp.where(jax.random.bernoulli(k, keep, change[path].shape), change[path] * factor, 0.0)
        for path, k in zip(sorted(change), keys, strict=True)
    }


def _drop_smallest(value: np.ndarray, rate: float) -> np.ndarray:
    """The int(rate * size) smallest set to 0, the first of equal ones first."""
    order = np.argsort(np.abs(value), axis=None, kind="stable")
    result = value.copy().reshape(-1)
    result[order[: int(rate * value.size)]] = 0
    return result.reshape(value.shape)


@jax.jit
def _combine(changes: Sequence[Difference], scale: float) -> Difference:
    return jax.tree.map(lambda *leaves: scale * functools.reduce(jnp.add, leaves), *changes)


def _threshold(change: Difference, trim: float) -> float:
    """The int(trim * size)-th smallest magnitude of all elements; 0 for none."""
    magnitudes = np.concatenate([np.abs(np.asarray(x)).ravel() for x in change.values()])
    count = int(trim * magnitudes.size)
    return float(np.partition(magnitudes, count - 1)[count - 1]) if count else 0.0


@jax.jit
def _trim(change: Difference, threshold: float) -> Difference:
    return jax.tree.map(lambda x: jnp.where(jnp.abs(x) >= threshold, x, 0.0), change)


@jax.jit
def _elect(changes: Sequence[Difference], scale: float) -> Difference:
    signs = jax.tree.map(lambda *leaves: jnp.sign(functools.reduce(jnp.add, leaves)), *changes)
    majority = jnp.sign(sum(jnp.sum(sign) for sign in signs.values()))

    def merge(sign: jax.Array, *leaves: jax.Array) -> jax.Array:
        stacked = jnp.stack(leaves)
        agree = stacked * jnp.where(sign == 0, majority, sign) > 0
        total = jnp.sum(jnp.where(agree, stacked, 0.0), axis=0)
        return scale * total / jnp.maximum(jnp.sum(agree, axis=0), 1)

    return jax.tree.map(merge, signs, *changes)


def _shrink(gram: np.ndarray, factor: float) -> np.ndarray:
    return factor * gram + (1 - factor) * gram * np.eye(gram.shape[-1])


def _some(changes: Sequence[Difference]) -> list[Difference]:
    changes = list(changes)
    if not changes:
        raise UserError("there is no model to merge")
    for change in changes[1:]:
        if change.keys() != changes[0].keys():
            path = sorted(change.keys() ^ changes[0].keys())[0]
            raise UserError(f"{path} is merged of some models and excluded of others")
    return changes


def _check_paths(changes: Sequence[Difference], observed: Sequence[Mapping[str, Any]]) -> None:
    if len(changes) != len(observed):
        raise UserError(f"{len(changes)} models, and {len(observed)} observed: each has its own data")
    if any(found.keys() != observed[0].keys() for found in observed):
        raise UserError("different kernels were observed of different models")


def _check_share(name: str, value: float, open_end: bool = False) -> None:
    if not 0 <= value <= 1 or (open_end and value == 1):
        raise UserError(
            f"{name}={value} is not in [0, 1{')' if open_end else ']'}: it is the share, not a percentage"
        )
