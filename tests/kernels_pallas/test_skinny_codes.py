"""The skinny product with codes of 8 and 4 bits: the bits of the product with a float32 copy of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.skinny_matmul import (
    Unsupported,
    codes,
    dequantize,
    pack,
    pack_codes,
    pack_grid,
    panel_columns,
    skinny_code_matmul,
    skinny_matmul,
)

BITS = pytest.mark.parametrize("bits", [8, 4])
# Rows, inputs, columns, a group: one and several panels, a last panel that is not full, more rows than a tile's, groups
# that no power of two divides.
SIZES = [(1, 2, 1, 2), (1, 64, 48, 64), (3, 96, 100, 32), (8, 60, 500, 6), (9, 30, 49, 10), (19, 70, 97, 14)]


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights(inputs: int, columns: int, group: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [inputs, columns], all of them in use where there is room, scale and zero [groups, columns]. Zeros are not
    whole: the difference of a code and a zero is rounded, too."""
    source = np.random.default_rng(bits)
    drawn = source.integers(0, 2**bits, (inputs, columns)).astype(np.uint8)
    scale, zero = source.uniform(0.1, 2, (2, inputs // group, columns)).astype(np.float32)
    return drawn, scale, zero * 2 ** (bits - 2)


def in_panels(
    parts: tuple[np.ndarray, ...], bits: int, width: int | None = None
) -> tuple[jax.Array, jax.Array]:
    width = width or panel_columns()
    return jnp.asarray(pack_codes(parts[0], bits, width)), jnp.asarray(pack_grid(parts[1], parts[2], width))


def as_floats(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    drawn, scale, zero = parts
    each = len(drawn) // len(scale)
    return (drawn.astype(np.float32) - np.repeat(zero, each, 0)) * np.repeat(scale, each, 0)


def test_panels_by_hand():
    drawn = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]], np.uint8)
    assert pack_codes(drawn, 8, 2).tolist() == [
        [[1, 2], [4, 5], [7, 8], [10, 11]],
        [[3, 0], [6, 0], [9, 0], [12, 0]],
    ]
    # The second row of a pair is the high half: 1 + 16 * 4, 2 + 16 * 5, ...
    assert pack_codes(drawn, 4, 2).tolist() == [[[65, 82], [167, 184]], [[99, 0], [201, 0]]]
    scale, zero = np.array([[0.5, 1, 2]]), np.array([[7, 8, 9]], np.uint8)
    grid = pack_grid(scale, zero, 2)
    assert grid.tolist() == [[[[0.5, 1], [7, 8]]], [[[2, 0], [9, 0]]]]
    for bits in (8, 4):
        found = dequantize(*in_panels((drawn, scale, zero), bits), bits, 3)
        assert found.tolist() == [[-3, -6, -12], [-1.5, -3, -6], [0, 0, 0], [1.5, 3, 6]]


@BITS
@pytest.mark.parametrize("rows, inputs, columns, group", SIZES)
def test_the_bits_of_the_product_with_floats(bits: int, rows: int, inputs: int, columns: int, group: int):
    x, parts = drawn(rows, inputs), weights(inputs, columns, group, bits)
    kernel = as_floats(parts)
    found = skinny_code_matmul(x, *in_panels(parts, bits), bits, columns)
    assert np.array_equal(found, skinny_matmul(x, jnp.asarray(pack(kernel, panel_columns())), columns))
    assert np.array_equal(dequantize(*in_panels(parts, bits), bits, columns), kernel)


@BITS
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_any_length_give_the_same_bits(bits: int, lanes: int):
    # Wider vectors than the processor's are cut by LLVM: the code of every processor runs here.
    parts = weights(48, 70, 12, bits)
    panels = in_panels(parts, bits, 3 * lanes)
    for rows in (1, 8, 11):
        x = drawn(rows, 48)
        found = codes.skinny_code_matmul(x, *panels, bits, 70)
        assert np.array_equal(found, skinny_code_matmul(x, *in_panels(parts, bits), bits, 70))


@BITS
def test_a_row_has_the_same_bits_alone_and_among_others(bits: int):
    # 400 thousand weights: threads share the panels out. Up to 8 rows codes become floats in registers, then in memory.
    x, panels = drawn(19, 512), in_panels(weights(512, 768, 64, bits), bits)
    together = np.asarray(skinny_code_matmul(x, *panels, bits, 768))
    for rows in (1, 2, 7, 8, 9):
        assert np.array_equal(skinny_code_matmul(x[3 : 3 + rows], *panels, bits, 768), together[3 : 3 + rows])


@BITS
def test_inside_a_loop_under_jit_and_vmap(bits: int):
    x, panels = drawn(2, 3, 48), in_panels(weights(48, 48, 16, bits), bits)

    def twice(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 2, lambda _, y: skinny_code_matmul(y, *panels, bits, 48), x)

    expected = skinny_code_matmul(skinny_code_matmul(x, *panels, bits, 48), *panels, bits, 48)
    assert np.array_equal(jax.jit(twice)(x), expected)
    assert np.array_equal(jax.vmap(twice)(x), expected)
    assert f"lathe_skinny_code_matmul_{bits}" in jax.jit(twice).lower(x).as_text()


@BITS
def test_gradient_reaches_x_alone(bits: int):
    # Whole numbers, far below 2**24: sums in any order are exact.
    values, wanted = (
        np.random.default_rng(0).integers(0, 2**bits, (20, 30)).astype(np.uint8),
        np.ones((4, 30)),
    )
    panels = in_panels((values, np.full((2, 30), 0.5), np.full((2, 30), 3)), bits)
    gradient = jax.grad(lambda x: jnp.sum(skinny_code_matmul(x, *panels, bits, 30)))(jnp.zeros((4, 20)))
    assert np.array_equal(gradient, wanted @ (0.5 * (values.astype(np.float32) - 3)).T)


@BITS
def test_reference_is_the_same_product(bits: int):
    # Whole numbers again.
    values, x = (
        np.random.default_rng(0).integers(0, 2**bits, (20, 100)).astype(np.uint8),
        np.round(4 * drawn(3, 4, 20)),
    )
    panels = in_panels((values, np.full((5, 100), 0.5), np.full((5, 100), 3)), bits)
    one = skinny_code_matmul(x, *panels, bits, 100, implementation="reference")
    assert one.shape == (3, 4, 100) and np.array_equal(one, skinny_code_matmul(x, *panels, bits, 100))
    assert np.array_equal(one, x @ (0.5 * (values.astype(np.float32) - 3)))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=np.zeros((2, 21), np.float32)), "x has 21 columns, the weights have 20 rows"),
        (dict(x=jnp.zeros((2, 20), jnp.bfloat16)), "the kernel takes float32, uint8 and float32"),
        (dict(bits=2), "codes of 2 bits: the kernel takes 4 and 8"),
        (dict(columns=500), "panels of .* columns do not hold 500 columns"),
        (dict(grid=np.zeros((1, 4, 2, 5), np.float32)), "does not divide codes .* of 4 bits into groups"),
        # 20 inputs in groups of 5, two to a byte.
        (dict(parts=weights(20, 30, 5, 4)), "does not divide codes .* of 4 bits into groups"),
        (dict(width=5), "panels of 5 columns: this processor's have"),
        (dict(implementation="tpu"), "no implementation 'tpu': there are reference and cpu"),
    ],
)
def test_bad_arguments(change: dict, message: str):
    given = dict(x=np.zeros((2, 20), np.float32), bits=4, columns=30) | change
    made = in_panels(given.pop("parts", weights(20, 30, 10, 4)), 4, given.pop("width", None))
    given = dict(codes=made[0], grid=made[1]) | given
    with pytest.raises(Unsupported, match=message):
        skinny_code_matmul(**given)
