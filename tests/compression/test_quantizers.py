"""FineQuant, EoRA and decoupleQ on single matrices: what must hold exactly, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.compression.blocks import Notes, Walk
from research.compression.chain import Chain
from research.compression.decoupleq import DecoupleQ, Projected, Stored, decouple, floats
from research.compression.eora import EoRA
from research.compression.finequant import FineQuant, mean_range
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.quantized import quantize
from research.nn.transformer import Block
from research.nn.weights import LowRank
from research.training.observe import Gram
from tests.programs import drawn

INPUTS, OUTPUTS, TOKENS = 32, 16, 256


@pytest.fixture(scope="module")
def layer():
    """w [in, out], inputs [tokens, in] that are correlated, their mean second moments."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, INPUTS)) @ (
        rng.normal(size=(INPUTS, INPUTS)) * np.arange(1, INPUTS + 1) ** -0.7
    )
    return rng.normal(size=(INPUTS, OUTPUTS)), x, x.T @ x / TOKENS


def test_groups_are_as_fine_as_outliers_ask_for():
    rng = np.random.default_rng(1)
    normal = rng.normal(size=(1024, 8)).astype(np.float32)
    planted = normal.copy()
    planted[300] *= 30
    method = FineQuant(4, smallest=64)
    assert method.group(normal) == 1024 and method.group(planted) == 64
    # One expert of 32 asks for what it needs, which the mean of all would not.
    experts = np.stack([*[normal] * 31, planted])
    coarse, fine = (np.mean([mean_range(expert, group) for expert in experts]) for group in (1024, 512))
    assert fine > 0.87 * coarse
    for same in (7 * planted, planted[:, ::-1], experts):
        assert method.group(same) == 64
    assert FineQuant(4, alpha=0).group(planted) == 1024 and FineQuant(4, smallest=300).group(planted) == 512
    # By hand: groups of two have the largest magnitudes 2 and 4, all four have 4.
    column = np.array([[1], [-2], [4], [3]], np.float32)
    assert mean_range(column, 2) == 3 and mean_range(column, 4) == 4 and mean_range(column, 1) == 2.5
    fine, coarse = (quantize(jnp.asarray(planted), 4, group) for group in (64, 128))
    assert (fine.scale <= np.repeat(coarse.scale, 2, axis=0)).all()
    # 4 bits a code, and 32 of a scale for every 64.
    assert fine.stored_bits() == planted.size * (4 + 32 / 64)
    error = np.abs(fine.materialize() - planted).reshape(16, 64, 8)
    assert (error <= np.asarray(fine.scale)[:, None] * 0.5001).all()


def test_no_correction_of_a_rank_has_a_smaller_output_error(layer):
    w, x, _ = layer
    residual = w - np.asarray(quantize(jnp.asarray(w, jnp.float32), 2).materialize(), np.float64)
    gram = Gram(*(np.asarray(part, np.float32) for part in (x.T @ x, TOKENS, np.abs(x).sum(0))))

    def error(space, rank, gram=gram):
        method = EoRA(rank, space, factor_dtype="float32")
        spaces = method._weights("kernel", None if space == "plain" else gram, Notes())
        return np.linalg.norm(
            x @ (residual - np.asarray(method.fit(residual, spaces).materialize(), np.float64))
        )

    errors = {
        space: [error(space, rank) for rank in (1, 4, 8, 16)] for space in ("eigen", "activation", "plain")
    }
    assert all(
        a < b
        for other in ("activation", "plain")
        for a, b in zip(errors["eigen"][:3], errors[other], strict=False)
    )
    assert sorted(errors["eigen"], reverse=True) == errors["eigen"]
    # All of it, but for directions of eigenvalues below 32 * 1.2e-7 of the largest, which are left out.
    assert errors["eigen"][3] < np.sqrt(32 * 1.2e-7) * np.linalg.norm(x @ residual)
    # What is left is the tail of the singular values of S^T (W - W^), and S S^T = X^T X up to a factor.
    tail = np.linalg.svd(np.linalg.cholesky(x.T @ x).T @ residual, compute_uv=False)[4:]
    np.testing.assert_allclose(errors["eigen"][1], np.sqrt(np.square(tail).sum()), rtol=1e-4)
    scaled = Gram(gram.total * 9, gram.count, gram.magnitude * 3)
    np.testing.assert_allclose(error("eigen", 4, scaled), errors["eigen"][1], rtol=1e-4)
    white = Gram(np.eye(INPUTS, dtype=np.float32), np.float32(1), np.ones(INPUTS, np.float32))
    np.testing.assert_allclose(error("eigen", 4, white), errors["plain"][1], rtol=1e-4)
    small = EoRA(4, factor_bits=4, factor_group=4).fit(residual, [None])
    assert isinstance(small, LowRank) and small.stored_bits() == (32 + 16) * 4 * 4 + (8 * 4 + 16) * (16 + 8)
    assert not EoRA(4).fit(0 * residual, [None]).materialize().any()


def test_floats_are_the_least_squares_solution(layer):
    w, _, gram = layer
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 4, w.shape)
    hessian = gram + 0.01 * np.eye(INPUTS)
    group = 8
    scale, shift = floats(w, hessian, codes, group, 2)
    signed = codes - 2.0
    wide = lambda part: np.repeat(part, group, axis=0)  # noqa: E731
    slope = hessian @ (wide(scale) * signed + wide(shift) - w)
    by_group = lambda part: part.reshape(-1, group, OUTPUTS).sum(1)  # noqa: E731
    size = np.abs(hessian @ w).sum()
    assert (
        np.abs(by_group(slope * signed)).max() < 1e-12 * size and np.abs(by_group(slope)).max() < 1e-12 * size
    )
    # One group and H = I: a straight line through the weights over their integers.
    scale, shift = floats(w, np.eye(INPUTS), codes, INPUTS, 2)
    line = np.array([np.polyfit(signed[:, i], w[:, i], 1) for i in range(OUTPUTS)])
    np.testing.assert_allclose(np.stack([scale[0], shift[0]], 1), line, rtol=1e-9)
    # Integers that are all equal leave s and z undetermined, and still give an answer; so do zeros of a symmetric grid.
    assert np.isfinite(floats(w, hessian, np.zeros_like(codes), group, 2)).all()
    assert not np.any(floats(w, hessian, np.full_like(codes, 2), group, 2, symmetric=True))
    # Symmetric: no z, s = w^T H c / c^T H c of one group, and of several no slope along c.
    scale, shift = floats(w, hessian, codes, INPUTS, 2, symmetric=True)
    wanted = np.sum(w * (hessian @ signed), 0) / np.sum(signed * (hessian @ signed), 0)
    np.testing.assert_allclose(scale[0], wanted, rtol=1e-9)
    assert not shift.any()
    scale, _ = floats(w, hessian, codes, group, 2, symmetric=True)
    slope = hessian @ (wide(scale) * signed - w)
    assert np.abs(by_group(slope * signed)).max() < 1e-12 * size


def test_projected_descent_rounds_what_is_left_to_its_minimum():
    """H = [4 2; 2 2] on the integers -2 ... 1, the first input first. 0.75 becomes 1, and the second's minimum moves by
    -(2 / 2) 0.25: from 0.7 to 0.45, which is 0, and from -0.2 to -0.45, 0. -0.3 becomes 0, and 0.3 goes to 0; of
    0.4 + 0.45 = 0.85 it is 1. 7 becomes its end 1, and the second's minimum is -9 + 6 = -3, beyond its end -2."""
    w = np.array([[0.75, 0.75, -0.3, 0.45, 7.0], [0.7, -0.2, 0.3, 0.4, -9.0]])
    hessian = np.array([[4.0, 2], [2, 2]])
    grid = np.ones((1, 5)), np.full((1, 5), 2.0)
    found = Projected(0, 400, 0.01).solve(w, hessian, *grid, 2)
    np.testing.assert_array_equal(found - 2.0, [[1, 1, 0, 0, 1], [0, 0, 0, 1, -2]])
    # Inputs that know nothing of each other are rounded to nearest, by a negative scale as well.
    w = np.random.default_rng(0).normal(size=(8, 4))
    scale, zero = np.array([[0.5, -0.5, 1, 2]]), np.array([[1.5, 2, 0.3, 1]])
    nearest = np.clip(np.round(w / scale + zero), 0, 3)
    np.testing.assert_array_equal(
        Projected(5, 5).solve(w, np.diag(np.arange(1.0, 9)), scale, zero, 2), nearest
    )


@pytest.mark.parametrize(
    "options", [{"symmetric": True}, {"solver": Projected(first=20, between=20, rate=0.01)}]
)
def test_other_grids_and_solvers(layer, options):
    w, _, gram = layer
    for group in (None, 8):
        found, steps = decouple(w, gram, 2, group, 3, 20, **options)
        errors = np.array(steps)
        assert (np.diff(errors, axis=0) <= 0).all()
        rounding, first, last = errors.sum(1)[[0, 1, -1]]
        assert last < 0.9 * first < 0.9 * rounding
        packed = found.packed(2, options.get("symmetric", False))
        assert (packed.zero is None) == ("symmetric" in options)
        np.testing.assert_array_equal(packed.materialize(), found.kernel())


@pytest.mark.parametrize("group", [None, 8])
def test_turns_never_lose_and_beat_gptq(layer, group):
    w, x, gram = layer
    found, steps = decouple(w, gram, 2, group, 4, 20)
    errors = np.array(steps)
    assert (np.diff(errors, axis=0) <= 0).all() and found.codes.max() <= 3
    rounding, gptq, first, last = errors.sum(1)[[0, 1, 3, -1]]
    assert last <= first < 0.75 * gptq < gptq < rounding
    difference = np.asarray(found.packed(2).materialize(), np.float64) - w
    hessian = gram + 0.01 * np.trace(gram) / INPUTS * np.eye(INPUTS)
    np.testing.assert_allclose(np.sum(difference * (hessian @ difference), 0), errors[-1], rtol=1e-4)
    once, steps = decouple(w, gram, 2, group, 1, 20)
    np.testing.assert_array_equal(steps[-1], errors[1])
    # Weights that lie on a grid are found, by an input that saw nothing as well.
    codes = np.random.default_rng(3).integers(0, 4, w.shape)
    grid = Stored(codes, np.full((1, OUTPUTS), 0.5), np.full((1, OUTPUTS), 1.0))
    grid.codes[:2] = [[0], [3]]
    exact = np.asarray(grid.kernel(), np.float64)
    for moments in (gram, 0 * gram):
        np.testing.assert_allclose(decouple(exact, moments, 2, None, 2, 5)[0].kernel(), exact, atol=1e-6)


def test_tuning_moves_floats_alone():
    model = DecoderLM(
        vocab_size=16,
        width=8,
        max_length=12,
        num_layers=1,
        blocks=(Block(Attention(num_heads=2, head_dim=4), GatedMLP(8)),),
    )
    params = drawn(model, np.zeros((1, 2), np.int32))
    rng = np.random.default_rng(0)
    batches = [{"tokens": rng.integers(0, 16, (4, 12)).astype(np.int32)}]

    def run(**options):
        method = DecoupleQ(2, turns=2, clips=5, store="float32", **options)
        (step,) = Chain((method,)).run(model, params, batches)
        return step

    plain, still, moved = run(epochs=0), run(epochs=1, rate=0.0), run(epochs=3, rate=3e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), still.params, plain.params)
    before, after = (step.params["layer_0"] for step in (plain, moved))
    for name in ("query", "key", "value", "output"):
        a, b = before["attention"][name]["kernel"], after["attention"][name]["kernel"]
        np.testing.assert_array_equal(a.codes, b.codes)
    assert (before["mlp_norm"]["scale"] != after["mlp_norm"]["scale"]).any()
    assert (before["mlp"]["down"]["kernel"].scale != after["mlp"]["down"]["kernel"].scale).any()
    walk = Walk(model, params, batches)
    wanted, *found = (walk.outputs(tree["layer_0"])[0].x for tree in (params, plain.params, moved.params))
    errors = [float(jnp.mean(jnp.square(x - wanted))) for x in found]
    assert errors[1] < 0.9 * errors[0]
    symmetric = run(epochs=1, rate=3e-3, symmetric=True).params["layer_0"]["mlp"]["down"]["kernel"]
    assert symmetric.zero is None and symmetric.scale.any()
    # The note says by how much.
    assert float(moved.notes[-1].rsplit(" ", 1)[1]) == pytest.approx(errors[1] / errors[0], abs=2e-3)
