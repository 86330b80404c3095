"""The skinny product: exact where numbers are whole, the same bits for a row alone and among others."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.skinny_matmul import Unsupported, cpu, pack, panel_columns, skinny_matmul, unpack
from kernels_pallas.skinny_matmul.reference import skinny_matmul as reference


def whole(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Whole numbers: their products' sums here stay far below 2**24, so that float32 keeps them exactly."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def packed(weights: np.ndarray) -> jax.Array:
    return jnp.asarray(pack(weights, panel_columns()))


def test_panels_by_hand():
    weights = np.arange(10, dtype=np.float32).reshape(2, 5)
    # Blocks of two columns of [[0 1 2 3 4], [5 6 7 8 9]], a zero behind the last.
    assert pack(weights, 2).tolist() == [[[0, 1], [5, 6]], [[2, 3], [7, 8]], [[4, 0], [9, 0]]]
    assert np.array_equal(unpack(jnp.asarray(pack(weights, 2)), 5), weights)


@pytest.mark.parametrize(
    "rows, inputs, columns",
    [(1, 1, 1), (1, 7, 5), (3, 64, 48), (8, 128, 100), (9, 33, 49), (13, 300, 500), (40, 65, 1000)],
)
def test_whole_numbers_are_exact(rows: int, inputs: int, columns: int):
    x, weights = whole((rows, inputs)), whole((inputs, columns), 1)
    found = skinny_matmul(x, packed(weights), columns)
    assert np.array_equal(found, x.astype(np.int64) @ weights.astype(np.int64))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_any_length_give_the_same_bits(lanes: int):
    # Wider vectors than the processor's are cut by LLVM: the code of every processor runs here.
    x, weights = drawn((11, 50)), drawn((50, 70), 1)
    found = cpu.skinny_matmul(x, jnp.asarray(pack(weights, 3 * lanes)), 70)
    assert np.array_equal(found, skinny_matmul(x, packed(weights), 70))
    # 50 roundings, each by at most 2**-24 of a sum whose terms are at most those of |x| |w|.
    bound = 50 * 2**-24 * (np.abs(x) @ np.abs(weights))
    assert np.all(np.abs(found - x.astype(np.float64) @ weights) <= bound)


def test_a_row_has_the_same_bits_alone_and_among_others():
    # 1.5 MiB of weights: threads share the panels out.
    x, weights = drawn((19, 512)), packed(drawn((512, 768), 1))
    together = np.asarray(skinny_matmul(x, weights, 768))
    for rows in (1, 2, 7, 8, 9):
        assert np.array_equal(skinny_matmul(x[3 : 3 + rows], weights, 768), together[3 : 3 + rows])


def test_inside_a_loop_under_jit_and_vmap():
    x, weights = whole((2, 3, 48)), whole((48, 48), 1)
    panels = packed(weights)

    @jax.jit
    def thrice(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, y: skinny_matmul(y, panels, 48) % 7, x)

    expected = x
    for _ in range(3):
        expected = (expected @ weights) % 7
    assert np.array_equal(thrice(x), expected)
    assert np.array_equal(jax.vmap(thrice)(x), expected)
    assert "lathe_skinny_matmul" in thrice.lower(x).as_text()


def test_gradient_reaches_x_alone():
    x, weights, wanted = whole((4, 20)), whole((20, 30), 1), whole((4, 30), 2)
    panels = packed(weights)
    gradient = jax.grad(lambda x: jnp.sum(skinny_matmul(x, panels, 30) * wanted))(x)
    assert np.array_equal(gradient, wanted @ weights.T)


def test_what_is_not_a_number_stays_in_its_row_and_column():
    x, weights = whole((9, 40)), whole((40, 60), 1)
    x[2, 3], weights[5, 50] = np.nan, np.inf
    x[:, 5] = 1
    found = np.asarray(skinny_matmul(x, packed(weights), 60))
    assert np.isnan(found[2]).all() and np.isfinite(np.delete(np.delete(found, 2, 0), 50, 1)).all()
    assert np.isposinf(np.delete(found[:, 50], 2)).all()


def test_many_callers_at_once():
    # Who finds the threads taken computes alone; nobody gets another's numbers.
    x, weights = [whole((5, 256), seed) for seed in range(4)], packed(whole((256, 1024), 9))
    product = jax.jit(lambda x: skinny_matmul(x, weights, 1024))
    expected = [np.asarray(reference(part, weights, 1024)) for part in x]

    def call(number: int) -> bool:
        return np.array_equal(product(x[number % 4]), expected[number % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(200)))


def test_threads_treat_the_smallest_numbers_alike():
    # XLA's threads flush numbers below 1e-38 to zero; who helps must too, or a panel's bits tell who computed it.
    x, weights = np.ones((1, 512), np.float32), packed(np.full((512, 3072), 1e-39, np.float32))
    assert not any(np.asarray(skinny_matmul(x, weights, 3072)).any() for _ in range(20))


def test_reference_is_the_same_product():
    x, weights = whole((3, 4, 20)), packed(whole((20, 100), 1))
    one = skinny_matmul(x, weights, 100, implementation="reference")
    assert one.shape == (3, 4, 100) and np.array_equal(one, skinny_matmul(x, weights, 100))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=np.zeros((2, 21), np.float32)), "x has 21 columns, the weights have 20 rows"),
        (dict(x=jnp.zeros((2, 20), jnp.bfloat16)), "the kernel takes float32"),
        (dict(columns=500), "panels of .* columns do not hold 500 columns"),
        (
            dict(panels=np.zeros((2, 20, 5), np.float32), columns=8),
            "panels of 5 columns: this processor's have",
        ),
        (dict(implementation="tpu"), "no implementation 'tpu': there are reference and cpu"),
    ],
)
def test_bad_arguments(change: dict, message: str):
    given = dict(x=np.zeros((2, 20), np.float32), panels=packed(whole((20, 100))), columns=100) | change
    with pytest.raises(Unsupported, match=message):
        skinny_matmul(given.pop("x"), **given)
