"""One weighted low-rank fit, for compensation, adapters and decompositions alike.

    minimise over rank(L) = r    | A^T (W - L) diag(b) |_F      W [in, out], A [in, k], b [out]

Weighted by A, the best L is the truncated singular value decomposition of A^T W diag(b) with the weights undone
(Eckart-Young). A comes from the Gram matrix G = X^T X of the layer's inputs: A A^T = G makes it the error of the
outputs X W (EoRA, arXiv 2410.21271), A A^T = G^2 is CorDA's (2406.05223), diagonal weights are LQ-LoRA's
(2311.12023), none PiSSA's (2404.02948). On the host in float64.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.nn.weights import LowRank

# Weights and eigenvalues that float32 sums could not tell from 0, relative to the largest and to each term.
_EPS = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True, eq=False)
class Root:
    """A of the fit and what undoes it: forward A^T [k, in], back [in, k], with A^T back = 1.

    unseen: directions of the inputs that are left out, in - k. condition: the largest over the smallest eigenvalue
    kept.
    """

    forward: np.ndarray
    back: np.ndarray
    unseen: int
    condition: float

    @property
    def note(self) -> str | None:
        """One line where the Gram matrix was singular, else None."""
        if not self.unseen:
            return None
        width = self.forward.shape[1]
        return (
            f"the Gram matrix is singular: in {self.unseen} of {width} directions the inputs are 0 to rounding, and "
            "nothing is fitted there; give more calibration tokens or a ridge"
        )


def root(gram: np.ndarray, power: Literal["root", "whole"] = "root", ridge: float = 0.0) -> Root:
    """The weighting by gram [in, in]: A A^T = gram ("root") or gram^2 ("whole").

    ridge: times the mean of the diagonal is added to it first. Eigenvalues below in * 1.2e-7 of the largest are
    rounding of float32 sums, and their directions are left out: `Root.note` says so.

    Raises:
        UserError: the matrix is not square and symmetric, not finite, 0, or has an eigenvalue clearly below 0.
    """
    gram = np.asarray(gram, np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise UserError(f"a Gram matrix is [in, in], not {gram.shape}")
    if not np.isfinite(gram).all():
        raise UserError("the Gram matrix is not finite")
    width, largest = len(gram), np.abs(gram).max()
    if largest == 0:
        raise UserError("the Gram matrix is 0: its layer saw no tokens, and there is nothing to weigh by")
    if np.abs(gram - gram.T).max() > 1e-4 * largest:
        raise UserError("the Gram matrix is not symmetric")
    gram = (gram + gram.T) / 2 + ridge * np.trace(gram) / width * np.eye(width)
    values, vectors = np.linalg.eigh(gram)
    cut = values[-1] * width * _EPS
    if values[0] < -cut:
        raise UserError(f"a Gram matrix has no eigenvalue below 0, and this one {values[0]:.3g}")
    kept = values > cut
    values, vectors = values[kept], vectors[:, kept]
    weight = np.sqrt(values) if power == "root" else values
    return Root(
        weight[:, None] * vectors.T, vectors / weight, width - len(values), float(values[-1] / values[0])
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """down float64[in, rank] times up [rank, out], each with the square roots of the singular values.

    values float64[min(k, out)]: all singular values of the weighted matrix, descending. chosen: those of the factors.
    """

    down: np.ndarray
    up: np.ndarray
    values: np.ndarray
    chosen: slice

    @property
    def error(self) -> float:
        """The weighted norm of what is left: the root of the sum of the squares of the values not chosen."""
        squares = np.square(self.values)
        return float(np.sqrt(max(squares.sum() - squares[self.chosen].sum(), 0.0)))

    def product(self) -> np.ndarray:
        return self.down @ self.up

    def weight(self, dtype: jnp.dtype = jnp.float32) -> LowRank:
        """As a structured weight."""
        return LowRank(jnp.asarray(self.down, dtype), jnp.asarray(self.up, dtype))


def low_rank(
    w: np.ndarray,
    rank: int,
    inputs: Root | np.ndarray | None = None,
    outputs: np.ndarray | None = None,
    which: Literal["top", "bottom"] = "top",
) -> Fit:
    """The components of w [in, out] of the largest ("top": the best fit) or smallest ("bottom") singular values.

    inputs: a `Root`, weights [in], or None; outputs: weights [out] or None. Weights below 1.2e-7 of their largest count
    as that. Where a `Root` leaves so many directions out that there are fewer than `rank` values, factors end in zeros.

    Raises:
        UserError: rank below 1 or above that of a matrix of this shape; weights of another shape, negative, not finite
            or all 0; w not finite.
    """
    w = np.asarray(w, np.float64)
    if w.ndim != 2 or not np.isfinite(w).all():
        raise UserError(f"a low-rank fit is of one finite matrix [in, out]; this one is {w.shape}")
    _check_rank(rank, w.shape)
    forward, back = _sides(inputs, w.shape[0], "inputs")
    weigh, unweigh = (None, None) if outputs is None else _diagonal(outputs, w.shape[1], "outputs")
    weighted = forward(w) if weigh is None else forward(w) * weigh
    left, values, right = np.linalg.svd(weighted, full_matrices=False)
    count = min(rank, len(values))
    chosen = slice(0, count) if which == "top" else slice(len(values) - count, len(values))
    root_values = np.sqrt(values[chosen])
    down = np.zeros((w.shape[0], rank))
    up = np.zeros((rank, w.shape[1]))
    down[:, :count] = back(left[:, chosen] * root_values)
    up[:count] = root_values[:, None] * right[chosen]
    return Fit(down, up if unweigh is None else up * unweigh, values, chosen)


def alternate(
    w: np.ndarray,
    rank: int,
    quantize: Callable[[np.ndarray], np.ndarray],
    steps: int,
    inputs: Root | np.ndarray | None = None,
    outputs: np.ndarray | None = None,
    first: Literal["low_rank", "quantized"] = "low_rank",
    error: Callable[[np.ndarray], float] = lambda residual: float(np.linalg.norm(residual)),
) -> tuple[np.ndarray, Fit, list[float]]:
    """w ~ quantized + low rank by fitting each to what the other leaves, `steps` times at most.

    first: "low_rank" starts from quantized = 0 (LQ-LoRA, arXiv 2311.12023), "quantized" from low rank = 0 (LoftQ,
    2310.08659). quantize(w) -> the values of the quantized w. error(residual): what is watched. Stops where it no
    longer falls. Returns quantized [in, out] and the fit of the best step, and the errors of all.

    Raises:
        UserError: steps below 1; as `low_rank`.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: at least 1")
    w = np.asarray(w, np.float64)
    fit, quantized, best, errors = None, np.zeros_like(w), None, []
    for _ in range(steps):
        if first == "low_rank":
            fit = low_rank(w - quantized, rank, inputs, outputs)
            quantized = np.asarray(quantize(w - fit.product()), np.float64)
        else:
            quantized = np.asarray(quantize(w if fit is None else w - fit.product()), np.float64)
            fit = low_rank(w - quantized, rank, inputs, outputs)
        errors.append(error(w - quantized - fit.product()))
        if best is not None and not errors[-1] < min(errors[:-1]):
            break
        best = quantized, fit
    return *best, errors


def _check_rank(rank: int, shape: tuple[int, int]) -> None:
    if not 1 <= rank <= min(shape):
        raise UserError(f"rank={rank}: a matrix of {shape[0]} by {shape[1]} has ranks 1 to {min(shape)}")


def _sides(inputs: Root | np.ndarray | None, width: int, name: str) -> tuple[Callable, Callable]:
    """A^T from the left, and what undoes it."""
    if inputs is None:
        return (lambda w: w), (lambda w: w)
    if isinstance(inputs, Root):
        if inputs.forward.shape[1] != width:
            raise UserError(
                f"{name}: a Gram matrix of {inputs.forward.shape[1]} inputs, for a matrix of {width}"
            )
        return (lambda w: inputs.forward @ w), (lambda w: inputs.back @ w)
    weight, inverse = _diagonal(inputs, width, name)
    return (lambda w: weight[:, None] * w), (lambda w: inverse[:, None] * w)


def _diagonal(weight: np.ndarray, width: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights and their inverses, none of them 0."""
    weight = np.asarray(weight, np.float64)
    if weight.shape != (width,) or not np.isfinite(weight).all() or (weight < 0).any() or not weight.any():
        raise UserError(
            f"{name}: {width} finite weights of at least 0, not all 0, are needed; got {weight.shape}"
        )
    weight = np.maximum(weight, _EPS * weight.max())
    return weight, 1 / weight
