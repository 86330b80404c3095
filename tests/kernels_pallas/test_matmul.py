"""The dense product of many rows: exact where numbers are whole, in every form, for every shape of edge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.matmul import Unsupported, cpu, matmul
from kernels_pallas.skinny_matmul import pack, panel_columns, skinny_matmul


def whole(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Whole numbers: their products' sums here stay far below 2**24, so that float32 keeps them exactly."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Rows, terms and columns around tiles of 12 and 6, vectors of 16, panels of 32, up to 512 or 256 terms at a time, and
# more columns than fit into a second-level cache of 2 MiB.
SHAPES = [
    (1, 1, 1),
    (5, 7, 3),
    (12, 16, 32),
    (13, 17, 33),
    (8, 300, 65),
    (4, 256, 64),
    (31, 257, 95),
    (600, 40, 40),
    (14, 520, 801),
]


@pytest.mark.parametrize("rows, terms, columns", SHAPES)
@pytest.mark.parametrize("form", cpu.FORMS)
def test_whole_numbers_are_exact(form: str, rows: int, terms: int, columns: int):
    left, right = whole((rows, terms)), whole((terms, columns), 1)
    expected = left.astype(np.int64) @ right.astype(np.int64)
    found = cpu.matmul(
        jnp.asarray(left if form[0] == "n" else left.T),
        jnp.asarray(right if form[1] == "n" else right.T),
        form,
    )
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("form", cpu.FORMS)
@pytest.mark.parametrize("lanes, terms", [(4, 300), (8, 300), (16, 300), (16, 1030)])
def test_vectors_of_any_length_give_the_same_bits(form: str, lanes: int, terms: int):
    # Wider vectors than the processor's are cut by LLVM: the code of every processor runs here. After 512 terms the
    # sums are written and read again.
    left, right = drawn((45, terms)), drawn((terms, 70), 1)
    operands = (left if form[0] == "n" else left.T, right if form[1] == "n" else right.T)
    found = cpu.matmul(*map(jnp.asarray, operands), form, lanes)
    # One chain of multiply-adds in the order of the sum, as in the product of few rows.
    assert np.array_equal(found, skinny_matmul(left, jnp.asarray(pack(right, panel_columns())), 70))


def test_a_row_has_the_same_bits_alone_and_among_others():
    x, w = drawn((700, 128)), drawn((128, 96), 1)  # rectangles for two threads
    together = np.asarray(matmul(x, w))
    for rows in (1, 11, 12, 13, 100):
        assert np.array_equal(matmul(x[3 : 3 + rows], w), together[3 : 3 + rows])


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_products(transposed: bool):
    x, w, wanted = whole((3, 5, 20)), whole((20, 30), 1), whole((3, 5, 30), 2)
    kernel = w.T if transposed else w
    loss = lambda x, w: jnp.sum(matmul(x, w, transposed=transposed) * wanted)  # noqa: E731
    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(x, kernel)
    assert np.array_equal(dx, wanted @ w.T)
    expected = np.einsum("abi,abo->io", x, wanted)
    assert np.array_equal(dw, expected.T if transposed else expected)


def test_gradients_have_gradients():
    x, w, wanted = whole((14, 20)) / 16, whole((20, 33), 1) / 16, whole((14, 33), 2) / 16

    def penalty(product, x, w):
        """Of the gradient's size, as in some regularisers: the second derivatives of all three forms."""
        dx, dw = jax.grad(lambda x, w: jnp.sum(product(x, w) ** 2 * wanted), (0, 1))(x, w)
        return jnp.sum(dx**2) + jnp.sum(dw**2)

    found = jax.grad(lambda x, w: penalty(matmul, x, w), (0, 1))(x, w)
    by_xla = jax.grad(lambda x, w: penalty(jnp.matmul, x, w), (0, 1))(x, w)
    # Four products of at most 33 terms in a row, each a rounding of 6e-8 of terms of one size.
    assert all(np.abs(a - b).max() < 1e-5 * np.abs(b).max() for a, b in zip(found, by_xla, strict=True))


def test_inside_a_loop_under_jit_vmap_and_remat():
    x, w = whole((2, 3, 48)), whole((48, 48), 1)

    @jax.jit
    def twice(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, _: (matmul(y, w) % 7, None), x, length=2)[0]

    expected = ((x @ w) % 7) @ w % 7
    assert np.array_equal(twice(x), expected) and np.array_equal(jax.vmap(twice)(x), expected)
    assert "lathe_matmul_nn" in twice.lower(x).as_text()
    again = jax.grad(lambda w: jax.checkpoint(lambda w: matmul(x, w))(w).sum())(jnp.asarray(w))
    assert np.array_equal(again, np.broadcast_to(x.sum((0, 1))[:, None], w.shape))


def test_what_is_not_a_number_stays_in_its_row_and_column():
    x, w = whole((50, 40)), whole((40, 60), 1)
    x[2, 3], w[5, 50] = np.nan, np.inf
    x[:, 5] = 1
    found = np.asarray(matmul(x, w))
    assert np.isnan(found[2]).all() and np.isfinite(np.delete(np.delete(found, 2, 0), 50, 1)).all()
    assert np.isposinf(np.delete(found[:, 50], 2)).all()


@pytest.mark.parametrize("form", ["nn", "tn"])
@pytest.mark.parametrize(
    "height, width, threads", [(4096, 1024, 2), (128, 512, 2), (1536, 384, 16), (1, 1, 8), (13, 33, 3)]
)
def test_rectangles_cover_the_result(form: str, height: int, width: int, threads: int):
    tall, wide, across, count = cpu.plan(form, height, width, threads, 16)
    down = count // across
    assert count == across * down
    assert (across - 1) * wide < width <= across * wide and (down - 1) * tall < height <= down * tall


def test_equal_rectangles_for_two_threads():
    # 11 tiles of 12 rows (128) and 16 panels of 32 columns: the columns are halved, the rows would leave 6 and 5 tiles.
    assert cpu.plan("nn", 128, 512, 2, 16) == (132, 256, 2, 2)
    # All rows of a transposed left operand are copied at once, at most 512 of them and a tile.
    assert cpu.plan("nn", 4096, 1024, 2, 16) == (2052, 1024, 1, 2)
    assert cpu.plan("tn", 4096, 1024, 2, 16)[0] == 516


def test_reference_is_the_same_product():
    x, w = whole((3, 4, 20)), whole((20, 100), 1)
    for transposed, kernel in ((False, w), (True, w.T)):
        one = matmul(x, kernel, transposed=transposed, implementation="reference")
        assert one.shape == (3, 4, 100) and np.array_equal(one, matmul(x, kernel, transposed=transposed))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=np.zeros((2, 21), np.float32)), r"x \[2, 21\] times w \[20, 10\] is no product"),
        (dict(transposed=True), r"x \[2, 20\] times w \[20, 10\], transposed, is no product"),
        (dict(x=jnp.zeros((2, 20), jnp.bfloat16)), "x is bfloat16, w is float32: the kernel takes float32"),
        (dict(x=np.zeros((0, 20), np.float32)), "is empty"),
        (
            dict(x=jax.ShapeDtypeStruct((2**31 - 1, 20), np.float32)),
            r"x \[2147483647, 20\] or w \[20, 10\] is longer than",
        ),
        (dict(implementation="tpu"), "no implementation 'tpu': there are reference and cpu"),
    ],
)
def test_bad_arguments(change: dict, message: str):
    given = dict(x=np.zeros((2, 20), np.float32), w=whole((20, 10))) | change
    with pytest.raises(Unsupported, match=message):
        operands = given.pop("x"), given.pop("w")
        jax.eval_shape(functools.partial(matmul, **given), *operands)
