"""Weighted low-rank fits and budgets, against NumPy, by hand and by search."""

import itertools

import numpy as np
import pytest

from research.errors import UserError
from research.nn.allocation import allocate
from research.nn.lowrank import alternate, low_rank, root


def example(inputs=12, outputs=5, seed=0):
    """w [in, out] and the Gram matrix of correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * inputs, inputs)) @ rng.normal(size=(inputs, inputs))
    return rng.normal(size=(inputs, outputs)), x.T @ x


def test_low_rank_is_the_best_fit_of_the_outputs():
    w, gram = example(8, 6)
    values = np.linalg.svd(w, compute_uv=False)
    plain = low_rank(w, 2)
    left, _, right = np.linalg.svd(w)
    np.testing.assert_allclose(plain.product(), left[:, :2] * values[:2] @ right[:2], atol=1e-12)
    assert plain.error == pytest.approx(np.sqrt(np.square(values[2:]).sum()), rel=1e-12)
    # Gram matrix c I: the same product. A ridge on top changes it no more.
    for same in (root(4 * np.eye(8)), root(np.eye(8), "whole", ridge=2.0), 3 * np.ones(8)):
        np.testing.assert_allclose(low_rank(w, 2, same).product(), plain.product(), atol=1e-12)
    weighting = root(gram)
    assert weighting.unseen == 0 and weighting.note is None
    errors = []
    for rank in range(1, 7):
        found = low_rank(w, rank, weighting)
        rest = w - found.product()
        # |X (W - L)|^2 = tr (W - L)^T G (W - L) = the squares of the values that were dropped.
        squares = np.trace(rest.T @ gram @ rest)
        assert squares == pytest.approx(np.square(found.values[rank:]).sum(), rel=1e-9, abs=1e-8)
        assert found.error**2 == pytest.approx(squares, rel=1e-9, abs=1e-8)
        errors.append(found.error)
        # The optimum is stationary and no other fit is better.
        for other in (low_rank(w, rank), low_rank(w, rank, np.sqrt(np.diag(gram)))):
            other = w - other.product()
            assert squares <= np.trace(other.T @ gram @ other) + 1e-8
    np.testing.assert_allclose(found.product(), w, atol=1e-10)
    assert errors == sorted(errors, reverse=True)
    # The gradient of the error is 0 in both factors.
    found = low_rank(w, 2, weighting)
    rest = gram @ (w - found.product())
    np.testing.assert_allclose(found.down.T @ rest, 0, atol=1e-9)
    np.testing.assert_allclose(rest @ found.up.T, 0, atol=1e-9)
    # CorDA: weighted by G itself; top and bottom together are the whole, and |G B A|^2 the squares of those chosen.
    top, bottom = (
        low_rank(w, r, root(gram, "whole"), which=which) for r, which in ((4, "top"), (2, "bottom"))
    )
    np.testing.assert_allclose(top.product() + bottom.product(), w, atol=1e-9)
    part = np.linalg.norm(gram @ bottom.product())
    assert part == pytest.approx(np.linalg.norm(bottom.values[-2:]), rel=1e-9)
    assert bottom.error == pytest.approx(np.linalg.norm(top.values[:4]), rel=1e-12)
    # Rows and columns: the truncated decomposition of diag(a) W diag(b).
    a, b = np.arange(1.0, 9.0), np.arange(1.0, 7.0)
    both = low_rank(w, 2, a, b)
    dropped = np.linalg.svd(a[:, None] * w * b, compute_uv=False)[2:]
    assert np.linalg.norm(a[:, None] * (w - both.product()) * b) == pytest.approx(
        np.linalg.norm(dropped), rel=1e-9
    )
    np.testing.assert_allclose(both.weight().materialize(), both.product(), atol=1e-5)


def test_singular_grams_and_wrong_ranks_are_told():
    w, _ = example(6, 4)
    x = np.random.default_rng(2).normal(size=(3, 6))
    weighting = root(x.T @ x)
    assert weighting.unseen == 3 and "in 3 of 6 directions" in weighting.note
    # Three tokens: rank 3 makes all their outputs right, and a fourth component has nothing to do.
    found = low_rank(w, 4, weighting)
    np.testing.assert_allclose(x @ found.product(), x @ w, atol=1e-10)
    assert not found.down[:, 3].any() and found.error == 0.0
    assert root(x.T @ x, ridge=0.01).unseen == 0
    for match, call in {
        "rank=5: a matrix of 6 by 4": lambda: low_rank(w, 5),
        "saw no tokens": lambda: root(np.zeros((6, 6))),
        "not symmetric": lambda: root(np.triu(np.ones((6, 6)))),
        "not finite": lambda: root(np.full((6, 6), np.nan)),
        "below 0": lambda: root(-np.eye(6)),
        r"\[in, in\]": lambda: root(w),
        "finite matrix": lambda: low_rank(w * np.nan, 1),
        "of 3 inputs, for a matrix of 6": lambda: low_rank(w, 1, root(np.eye(3))),
        "6 finite weights": lambda: low_rank(w, 1, np.zeros(6)),
        "steps=0": lambda: alternate(w, 1, np.round, 0),
    }.items():
        with pytest.raises(UserError, match=match):
            call()


def test_alternating_returns_its_best_step():
    w = np.random.default_rng(3).normal(size=(16, 12)) * 2.0 ** -np.arange(12)

    def quantize(w):
        scale = np.abs(w).max(0)
        return scale * np.round(w / scale)

    quantized, found, errors = alternate(w, 3, quantize, 20)
    assert np.linalg.norm(w - quantized - found.product()) == min(errors)
    assert errors[:-1] == sorted(errors[:-1], reverse=True)
    one = low_rank(w, 3)
    assert errors[0] == np.linalg.norm(w - one.product() - quantize(w - one.product()))
    # LoftQ's first step compensates what rounding w itself leaves.
    _, loft, errors = alternate(w, 3, quantize, 1, first="quantized")
    assert errors == [pytest.approx(low_rank(w - quantize(w), 3).error)]


def test_allocation_is_exhaustive_search():
    rng = np.random.default_rng(4)
    options = [
        list(zip(rng.integers(1, 9, n).tolist(), rng.random(n).tolist(), strict=True)) for n in (3, 4, 2, 4)
    ]
    every = [list(choice) for choice in itertools.product(*(range(len(choices)) for choices in options))]
    bits = np.array([sum(options[i][o][0] for i, o in enumerate(choice)) for choice in every])
    loss = np.array([sum(options[i][o][1] for i, o in enumerate(choice)) for choice in every])
    for budget in range(bits.min(), bits.max() + 1, 3):
        chosen, total, used = allocate(options, budget)
        assert used <= budget and total == pytest.approx(loss[bits <= budget].min(), rel=1e-6)
        assert (total, used) == (loss[every.index(chosen)], bits[every.index(chosen)])
    # Losses of 1e-9 over bits of 1e9, and a budget that one bit more would break.
    large = [[(4e9, 1e-9), (8e9, 1e-10)], [(4e9, 3e-9), (8e9 + 1, 1e-10)]]
    assert allocate(large, 12e9)[0] == [1, 0]
    assert allocate(large, 12e9 + 1)[0] == [0, 1]
    for match, call in {
        r"fits 2 bits: .* need 4": lambda: allocate([[(4, 0.0), (5, 0.0)]], 2),
        "there are none": lambda: allocate([], 1),
        "layer 1 has no option": lambda: allocate([[(1, 0.0)], []], 1),
        "layer 0: its options need finite": lambda: allocate([[(1, float("nan"))]], 1),
    }.items():
        with pytest.raises(UserError, match=match):
            call()
