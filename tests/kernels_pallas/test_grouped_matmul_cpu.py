"""The grouped product on a CPU: exact where numbers are whole, the same bits for a row alone and among others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import Unsupported
from kernels_pallas.grouped_matmul.cpu import grouped_panels
from kernels_pallas.skinny_matmul import pack, panel_columns, skinny_matmul


def whole(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Whole numbers: their products' sums here stay far below 2**24, so that float32 keeps them exactly."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def packed(weights: np.ndarray, width: int | None = None) -> jax.Array:
    return jnp.asarray(np.stack([pack(kernel, width or panel_columns()) for kernel in weights]))


def product(x: np.ndarray, weights: np.ndarray, starts: list[int], sizes: list[int]) -> np.ndarray:
    call = jax.jit(grouped_panels, static_argnums=4)
    arguments = (jnp.asarray(x), packed(weights), jnp.asarray(starts), jnp.asarray(sizes))
    return np.asarray(call(*arguments, weights.shape[2]))


def expected(x: np.ndarray, weights: np.ndarray, starts: list[int], sizes: list[int]) -> np.ndarray:
    y = np.zeros((len(x), weights.shape[2]))
    for group, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        y[start : start + size] = x[start : start + size] @ weights[group % len(weights)]
    return y


def begins(sizes: list[int]) -> list[int]:
    return [sum(sizes[:group]) for group in range(len(sizes))]


@pytest.mark.parametrize(
    "inputs, columns, sizes",
    [
        (1, 1, [1]),
        (7, 5, [1, 0, 3, 2]),
        (33, 16, [0, 0, 17]),  # all rows to one expert
        (64, 100, [0, 300, 9]),  # more than one block of rows
        (20, 70, [512, 256, 257]),
        (48, 96, [8, 16]),
        (65, 49, [9, 1, 7, 13, 0, 0]),
        (30, 33, [0] * 8),
    ],
)
def test_whole_numbers_are_exact(inputs: int, columns: int, sizes: list[int]):
    # Rows behind those of the last expert are nobody's.
    x, weights = whole((sum(sizes) + 3, inputs)), whole((len(sizes), inputs, columns), 1)
    x[sum(sizes) :] = np.nan
    found = product(x, weights, begins(sizes), sizes)
    assert np.array_equal(found, expected(x, weights, begins(sizes), sizes))


def test_groups_with_rows_of_nobody_between_them_and_two_groups_of_an_expert():
    x, weights = whole((50, 40)), whole((3, 40, 60), 1)
    starts, sizes = [2, 10, 25, 30, 31, 40], [5, 10, 5, 1, 0, 7]
    assert np.array_equal(product(x, weights, starts, sizes), expected(x, weights, starts, sizes))


def silu(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    "inputs, columns, sizes", [(1, 1, [1]), (7, 5, [1, 0, 3]), (64, 100, [0, 300, 9]), (48, 64, [8, 0, 17])]
)
def test_a_gate(inputs: int, columns: int, sizes: list[int]):
    x = whole((sum(sizes) + 3, inputs))
    up, gate = (whole((len(sizes), inputs, columns), seed) for seed in (1, 2))
    gate /= 32  # within what silu bends, and still exact
    starts = begins(sizes)
    found = grouped_panels(
        jnp.asarray(x), packed(up), jnp.asarray(starts), jnp.asarray(sizes), columns, packed(gate)
    )
    wanted = silu(expected(x, gate, starts, sizes)) * expected(x, up, starts, sizes)
    # Both products are exact; silu's reduction, polynomial, sum, quotient and the product round about six times.
    np.testing.assert_allclose(found, wanted, rtol=6 * 2**-24, atol=0)


def test_silu_over_its_whole_range():
    x = np.linspace(-120, 120, 24001, dtype=np.float32)[:, None]
    one, start, size = packed(np.ones((1, 1, 1), np.float32)), jnp.zeros(1, int), jnp.full(1, len(x))
    found = grouped_panels(jnp.asarray(x), one, start, size, 1, one)
    # Below -87 it is 0 within 120 * e^-87 = 2e-36, here times x.
    np.testing.assert_allclose(found, silu(x) * x, rtol=6 * 2**-24, atol=3e-34)
    rest = grouped_panels(jnp.full((1, 1), jnp.nan), one, start, jnp.ones(1, int), 1, one)
    assert np.isnan(rest).all()


def test_a_gated_row_has_the_same_bits_alone_and_among_others():
    x, up, gate = drawn((30, 128)), packed(drawn((2, 128, 100), 1)), packed(drawn((2, 128, 100), 2))
    call = jax.jit(grouped_panels, static_argnums=4)
    together = np.asarray(call(x, up, jnp.asarray([0, 20]), jnp.asarray([20, 10]), 100, gate))
    for row, sizes in ((0, [1, 0]), (19, [1, 0]), (20, [0, 1]), (29, [0, 1])):
        alone = call(x[row : row + 1], up, jnp.zeros(2, int), jnp.asarray(sizes), 100, gate)
        assert np.array_equal(alone[0], together[row])


def test_groups_outside_of_the_rows_write_nowhere():
    x, weights = whole((10, 16)), whole((3, 16, 48), 1)
    found = product(x, weights, [0, 4, 12], [4, 100, 5])
    assert np.array_equal(found, expected(x, weights, [0, 4, 10], [4, 6, 0]))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_any_length_give_the_bits_of_the_skinny_product(lanes: int, monkeypatch):
    # Wider vectors than the processor's are cut by LLVM: the code of every processor runs here.
    x, weights, sizes = drawn((21, 50)), drawn((2, 50, 70), 1), jnp.asarray([10, 11])
    own = [skinny_matmul(x[:10], packed(weights)[0], 70), skinny_matmul(x[10:], packed(weights)[1], 70)]
    monkeypatch.setattr("kernels_pallas.grouped_matmul.cpu.panel_columns", lambda: 3 * lanes)
    found = grouped_panels(jnp.asarray(x), packed(weights, 3 * lanes), jnp.asarray([0, 10]), sizes, 70)
    assert np.array_equal(found, np.concatenate(own))


def test_a_row_has_the_same_bits_alone_and_among_others():
    # 1.5 MiB of weights an expert: threads share the panels out.
    x, weights = drawn((300, 512)), drawn((2, 512, 768), 1)
    together = product(x, weights, [0, 290], [290, 10])
    for first, rows in ((3, 1), (3, 9), (255, 3), (289, 1)):
        assert np.array_equal(
            product(x[first : first + rows], weights, [0, rows], [rows, 0]), together[first : first + rows]
        )
    for row in (290, 299):
        assert np.array_equal(product(x[row : row + 1], weights, [0, 0], [0, 1]), together[row : row + 1])


def test_weights_of_experts_without_rows_are_not_read():
    x, weights = whole((4, 64)), whole((5, 64, 60), 1)
    weights[[0, 2, 4]] = np.nan
    sizes = [0, 3, 0, 1, 0]
    assert np.array_equal(
        product(x, weights, begins(sizes), sizes), expected(x, weights[:], begins(sizes), sizes)
    )


def test_inside_a_loop_under_jit_and_vmap():
    x, weights, sizes = whole((2, 6, 48)), whole((2, 48, 48), 1), jnp.asarray([[4, 2], [1, 5]])
    panels = packed(weights)

    @jax.jit
    def thrice(x: jax.Array, sizes: jax.Array) -> jax.Array:
        starts = jnp.cumsum(sizes) - sizes
        step = lambda _, y: grouped_panels(y, panels, starts, sizes, 48) % 7  # noqa: E731
        return jax.lax.fori_loop(0, 3, step, x)

    for number, mine in enumerate(sizes.tolist()):
        y = x[number]
        for _ in range(3):
            y = expected(y, weights, begins(mine), mine) % 7
        assert np.array_equal(thrice(x[number], sizes[number]), y)
        assert np.array_equal(jax.vmap(thrice)(x, sizes)[number], y)
    assert "lathe_grouped_matmul" in thrice.lower(x[0], sizes[0]).as_text()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=jnp.zeros((2, 21))), "x has 21 columns, the weights have 20 rows"),
        (dict(x=jnp.zeros((2, 20), jnp.bfloat16)), "the kernel takes float32"),
        (dict(columns=500), "panels of .* columns do not hold 500 columns"),
        (dict(panels=jnp.zeros((3, 2, 20, 5)), columns=8), "panels of 5 columns: this processor's have"),
        (dict(sizes=jnp.ones(2, int)), "are not of groups of 3 experts"),
        (dict(gate=jnp.zeros((3, 1, 20, 48))), r"the gate is float32\[3, 1, 20, 48\], the weights"),
        (dict(starts=jnp.ones(4, int), sizes=jnp.ones(4, int)), "are not of groups of 3 experts"),
    ],
)
def test_bad_arguments(change: dict, message: str):
    given = dict(
        x=jnp.zeros((2, 20)),
        panels=packed(whole((3, 20, 100))),
        starts=jnp.zeros(3, int),
        sizes=jnp.ones(3, int),
        columns=100,
    )
    with pytest.raises(Unsupported, match=message):
        grouped_panels(**given | change)
