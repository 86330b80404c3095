"""The quantized product: packing by hand, the kernels against float64, gradients, lowering."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.quantized_matmul import Unsupported, dequantize, pack, quantized_matmul, unpack

KERNELS = ("tpu", "gpu")


def make(rows, columns, bits, group, tile=None, count=5, dtype=jnp.float32):
    """Activations [count, rows] and packed weights; zeros that are no whole numbers."""
    rng = np.random.default_rng(bits)
    codes = jnp.asarray(rng.integers(0, 2**bits, (rows, columns)))
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (rows // group, columns)), jnp.float32)
    zero = jnp.asarray(rng.uniform(0, 2**bits, (rows // group, columns)), jnp.float32)
    return jnp.asarray(rng.normal(size=(count, rows)), dtype), pack(codes, scale, zero, bits=bits, tile=tile)


def test_packing_by_hand():
    """Codes 1, 2, 3, 0. In one group and a tile of 16 rows, each byte has one of them and 12 rows of padding. In groups
    of a row, 2 bits make one byte of all: 1 + 4 * 2 + 16 * 3 + 64 * 0 = 57; 4 bits in tiles of two rows make two bytes,
    1 + 16 * 2 = 33 and 3."""
    codes = jnp.asarray([[1], [2], [3], [0]])
    one = jnp.ones((1, 1))
    weights = pack(codes, 0.5 * one, 2 * one, bits=2, tile=16)
    assert weights.codes.tolist() == [[1], [2], [3], [0]]
    weights = pack(codes, jnp.full((4, 1), 0.5), jnp.full((4, 1), 2.0), bits=2)
    assert weights.codes.tolist() == [[57]]
    assert dequantize(weights).tolist() == [[-0.5], [0.0], [0.5], [-1.0]]  # (code - 2) / 2
    weights = pack(codes, jnp.ones((4, 1)), jnp.zeros((4, 1)), bits=4, tile=2)
    assert weights.codes.tolist() == [[33], [3]]
    for bits in (8, 4, 2):
        codes = jnp.asarray(np.random.default_rng(0).integers(0, 2**bits, (48, 3)), jnp.uint8)
        packed = pack(codes, jnp.ones((3, 3)), jnp.ones((3, 3)), bits=bits)
        assert (unpack(packed) == codes).all()


# Rows that are no multiple of a tile (160 = 128 + 32), several tiles, all widths of codes.
CASES = ((160, 48, 4, 16, 128), (128, 16, 2, 32, None), (64, 32, 8, 16, 32))


@pytest.mark.parametrize(
    ("case", "implementation"), [(CASES[0], "reference"), *itertools.product(CASES, KERNELS)]
)
def test_is_the_product_with_the_dequantized_weights(case, implementation):
    x, weights = make(*case)
    exact = np.asarray(dequantize(weights), np.float64)
    cotangent = np.random.default_rng(1).normal(size=(5, case[1]))

    def both(x):
        out, pull = jax.vjp(
            lambda x: quantized_matmul(x, weights, implementation=implementation, interpret=True), x
        )
        return out, pull(jnp.asarray(cotangent, jnp.float32))[0]

    out, dx = jax.jit(both)(x)
    # float32 sums of at most 160 products; those of 8 bits are up to 255 times as large.
    largest = 2 ** case[2]
    np.testing.assert_allclose(out, np.asarray(x, np.float64) @ exact, atol=1e-5 * largest)
    np.testing.assert_allclose(dx, cotangent @ exact.T, atol=1e-5 * largest)


@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16(implementation):
    x, weights = make(64, 32, 4, 16, count=17, dtype=jnp.bfloat16)
    out = quantized_matmul(x, weights, implementation=implementation, interpret=True)
    right = np.asarray(x, np.float64) @ np.asarray(dequantize(weights), np.float64)
    assert out.dtype == jnp.bfloat16
    # Codes and x are exact, sums are float32: only the output is rounded, to 8 bits.
    np.testing.assert_allclose(np.asarray(out, np.float64), right, rtol=2**-8, atol=1e-3)


def test_in_the_simulator(simulator):
    x, weights = make(64, 16, 4, 16, tile=32)

    def product(x):
        return jnp.sum(quantized_matmul(x, weights, implementation="tpu", interpret=simulator))

    value, dx = jax.value_and_grad(product)(x)
    exact = np.asarray(dequantize(weights), np.float64)
    np.testing.assert_allclose(value, (np.asarray(x, np.float64) @ exact).sum(), rtol=1e-4)
    np.testing.assert_allclose(dx, np.broadcast_to(exact.sum(1), x.shape), atol=1e-3)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(("count", "bits"), [(1, 4), (1000, 2), (8, 8)])
def test_lowers_without_the_device(implementation, count, bits, lower):
    """4096 x 14336 weights in groups of 128, a decoding step and a prompt, with the gradient of x."""
    x, weights = jax.eval_shape(
        lambda: (
            jnp.zeros((count, 4096), jnp.bfloat16),
            pack(
                jnp.zeros((4096, 14336), jnp.uint8),
                *(jnp.zeros((32, 14336), jnp.bfloat16),) * 2,
                bits=bits,
            ),
        )
    )

    def gradient(x, weights):
        return jax.grad(lambda x: jnp.sum(quantized_matmul(x, weights, implementation=implementation)))(x)

    marker = {"tpu": "tpu_custom_call", "gpu": "triton"}[implementation]
    assert marker in lower(gradient, (x, weights), implementation)


def test_what_cannot_be_computed_is_refused():
    x, weights = make(64, 24, 4, 16)
    with pytest.raises(Unsupported, match="24 columns: the gpu kernel takes multiples of 16"):
        quantized_matmul(x, weights, implementation="gpu")
    with pytest.raises(Unsupported, match="x has 63 columns, the weights have 64 rows"):
        quantized_matmul(x[:, :63], weights, implementation="reference")
    with pytest.raises(Unsupported, match="x is float16"):
        quantized_matmul(x.astype(jnp.float16), weights, implementation="tpu")
    _, odd = make(24, 16, 8, 12)
    with pytest.raises(Unsupported, match="groups of 12 rows: the tpu kernel takes multiples of 8"):
        quantized_matmul(x[:, :24], odd, implementation="tpu")
    if jax.default_backend() == "cpu":
        with pytest.raises(Unsupported, match="no quantized matmul kernel for the backend 'cpu'"):
            quantized_matmul(x, weights)
    codes, ones = jnp.zeros((8, 2), int), jnp.ones((2, 2))
    with pytest.raises(Unsupported, match="bits=3: there are 8, 4 and 2"):
        pack(codes, ones, ones, bits=3)
    with pytest.raises(Unsupported, match="tile=12: 4 bits in groups of 4 need a multiple of 8"):
        pack(codes, ones, ones, bits=4, tile=12)
    with pytest.raises(Unsupported, match="8 rows are not a multiple of 3 groups"):
        pack(codes, jnp.ones((3, 2)), jnp.ones((3, 2)), bits=4)
