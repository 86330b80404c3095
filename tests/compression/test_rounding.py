"""Rounding with the error fed back, against NumPy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.compression.rounding import (
    Affine,
    CodeBook,
    Ternary,
    Uniform,
    feed_back,
    fit,
    round_to_nearest,
)
from research.errors import UserError
from research.nn.quantized import Quantized, quantize


def example(inputs=12, outputs=5, seed=0):
    """w [in, out] and the Gram matrix of correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * inputs, inputs)) @ rng.normal(size=(inputs, inputs))
    return rng.normal(size=(inputs, outputs)), x.T @ x


def plain_gptq(w, gram, bits, group, damp, order=False, refit=False):
    """Error feedback as the paper states it: H^-1 as such, one row at a time. -> codes, values."""
    w, inputs, top = w.copy(), len(w), 2**bits - 1
    places = np.argsort(-np.diag(gram), kind="stable") if order else np.arange(inputs)
    hessian = (gram + damp * np.diag(gram).mean() * np.eye(inputs))[np.ix_(places, places)]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T

    def parameters(rows):
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        scale = ((high - low) / top).astype(np.float32).astype(np.float64)  # as it is stored
        return scale, np.clip(np.round(-low / scale), 0, top)

    fitted = {g: parameters(w[g * group : (g + 1) * group]) for g in range(-(-inputs // group))}
    codes, values = np.zeros(w.shape), np.zeros(w.shape)
    for j, place in enumerate(places):
        if refit and place % group == 0:
            fitted[place // group] = parameters(w[place : place + group])
        scale, zero = fitted[place // group]
        codes[place] = np.clip(np.round(w[place] / scale + zero), 0, top)
        values[place] = scale * (codes[place] - zero)
        error = (w[place] - values[place]) / upper[j, j]
        w[places[j:]] -= np.outer(upper[j, j:], error)
    return codes, values


def quadratic(w, values, gram):
    """(w - q)^T H (w - q) of each output."""
    rest = np.asarray(w, np.float64) - np.asarray(values, np.float64)
    return np.einsum("io,ij,jo->o", rest, np.asarray(gram, np.float64), rest)


@pytest.mark.parametrize(
    "options", [dict(group=3, refit=True), dict(group=5, order=True)], ids=["refit", "order"]
)
def test_feeding_back_is_the_algorithm_of_the_paper(options):
    """Over two experts at once, 12 inputs in blocks of 4 (refit: 3, the groups): the last group of 5 has 2 inputs."""
    grid, pairs = Uniform(3), [example(seed=seed) for seed in (0, 1)]
    w, gram = (np.stack(each) for each in zip(*pairs, strict=True))
    with jax.enable_x64(True):
        found = feed_back(jnp.asarray(w), jnp.asarray(gram), grid, damp=0.02, block=4, **options)
        values = np.asarray(found.values(grid))
    assert not found.nearest.any()
    for i in range(2):
        codes, expected = plain_gptq(w[i], gram[i], 3, damp=0.02, **options)
        np.testing.assert_array_equal(found.codes[i], codes)
        np.testing.assert_allclose(values[i], expected, rtol=0, atol=1e-12)
        # What is fed back is the quadratic error itself: sum_j e_j^2 = (w - q)^T H (w - q).
        damp = gram[i] + 0.02 * np.diag(gram[i]).mean() * np.eye(12)
        np.testing.assert_allclose(found.error[i], quadratic(w[i], values[i], damp), rtol=1e-9)


def test_two_inputs_by_hand():
    """w = (0.4, 0.4), values 0, 1, ..., H = [[2, 1], [1, 2]]: q_1 = 0. Minimised over w_2, the error (0.4, d) has
    2 d + 0.4 = 0, so d = -0.2 and w_2 becomes 0.6, which is rounded to 1. Error (0.4, -0.6): 2 (0.16 + 0.36) - 2 0.24
    = 0.56, and 2 (0.16 + 0.16) + 2 0.16 = 0.96 if both are rounded to 0."""
    w, gram = jnp.full((2, 1), 0.4), jnp.asarray([[2.0, 1.0], [1.0, 2.0]])
    unit, grid = Affine(jnp.ones((1, 1)), jnp.zeros((1, 1))), Uniform(2)
    found = feed_back(w, gram, grid, fitted=unit, damp=0.0)
    assert found.codes.tolist() == [[0], [1]]
    assert found.error.tolist() == pytest.approx([0.56], rel=1e-6)
    nearest = round_to_nearest(w, grid, fitted=unit)
    assert nearest.codes.tolist() == [[0], [0]]
    assert quadratic(w, nearest.values(grid), gram).tolist() == pytest.approx([0.96], rel=1e-6)
    # Inputs that do not meet, or never came: nothing to feed back. [[1, 1], [1, 1]] has no factor without damping.
    for same in (jnp.diag(jnp.asarray([3.0, 0.5])), jnp.zeros((2, 2)), jnp.ones((2, 2))):
        found = feed_back(w, same, grid, fitted=unit, damp=0.0)
        assert found.codes.tolist() == [[0], [0]]
        assert found.nearest == bool((same == 1).all())


@pytest.mark.parametrize(
    "grid", [Uniform(4, symmetric=True, store="bfloat16"), CodeBook((-1.0, -0.3, 0.3, 1.0)), Ternary()]
)
def test_a_diagonal_gram_rounds_every_grid_to_nearest(grid):
    w, gram = (jnp.asarray(each, jnp.float32) for each in example())
    nearest = round_to_nearest(w, grid)
    found = feed_back(w, jnp.diag(jnp.arange(1.0, 13.0)), grid, block=8)  # 12 inputs: 4 rows of padding
    damped = np.diag(np.arange(1, 13) + 0.01 * 6.5)
    np.testing.assert_allclose(found.error, quadratic(w, found.values(grid), damped), rtol=1e-5)
    np.testing.assert_array_equal(found.codes, nearest.codes)
    values, correlated = (np.asarray(r.values(grid)) for r in (nearest, feed_back(w, gram, grid, block=8)))
    assert quadratic(w, correlated, gram).sum() < quadratic(w, values, gram).sum()
    # No value of the grid is nearer than the one chosen.
    if isinstance(grid, Ternary):
        low, high = nearest.fitted.low, nearest.fitted.high
        every = np.stack([low, 0 * low, high])
    else:
        scale = nearest.fitted.scale
        every = (np.arange(-7, 8) if isinstance(grid, Uniform) else np.array(grid.values))[
            :, None, None
        ] * scale
    distance = np.abs(np.asarray(w) - every).min(0)
    np.testing.assert_allclose(np.abs(np.asarray(w) - values), distance, rtol=1e-5, atol=1e-6)
    if isinstance(grid, Uniform):  # the grid of packed kernels, and what they hold
        packed = quantize(w, 4, scale_dtype=jnp.bfloat16)
        np.testing.assert_array_equal(packed.unpacked(), nearest.codes)
        again = Quantized.from_codes(found.codes.astype(jnp.uint8), scale.astype(jnp.bfloat16), None, 4)
        np.testing.assert_array_equal(again.materialize(), values)


def test_grids_and_their_errors():
    # Range -0.5 ... 1 in steps of 0.5 with zero = 1; a group of zeros has scale 1.
    fitted = fit(jnp.asarray([[-0.5, 0.0], [1.0, 0.0]]), Uniform(2))
    assert (fitted.scale.tolist(), fitted.zero.tolist()) == ([[0.5, 1.0]], [[1.0, 0.0]])
    # Row 0 -> the ends -1 and 3; 1.5 is not beyond half of 3, -0.5 not beyond half of -1.
    ternary = round_to_nearest(jnp.asarray([[-1.0], [3.0], [1.5], [-0.5], [1.6], [-0.6]]), Ternary())
    assert ternary.codes[:, 0].tolist() == [1, 2, 0, 0, 2, 1]
    # Groups of 4 in 9 inputs: 4, 4 and 1. Three bits hold 0 ... 7 exactly, and each group has its own zero.
    w = jnp.asarray([[0, 7, 3, 1, 5, 0, 7, 2, 1]], jnp.float32).T
    assert round_to_nearest(w, Uniform(3), group=4).values(Uniform(3)).tolist() == w.tolist()
    w, gram = jnp.ones((4, 2)), jnp.eye(4)
    for match, call in {
        "bits=9": lambda: Uniform(9),
        "ascending": lambda: CodeBook((1.0, 0.0)),
        "group=0": lambda: fit(w, Uniform(2), 0),
        "float32 or float64": lambda: feed_back(w.astype(jnp.bfloat16), gram, Uniform(2)),
        r"takes a Gram matrix \(4, 4\)": lambda: feed_back(w, jnp.eye(3), Uniform(2)),
        "scatters": lambda: feed_back(w, gram, Uniform(2), 2, order=True, refit=True),
        "given": lambda: feed_back(w, gram, Uniform(2), 2, fitted=fit(w, Uniform(2), 2), refit=True),
        r"parameters \(2, 2\)": lambda: feed_back(w, gram, Uniform(2), 2, fitted=fit(w, Uniform(2))),
    }.items():
        with pytest.raises(UserError, match=match):
            call()
