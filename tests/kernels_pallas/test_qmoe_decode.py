"""QMoE's dictionary and code, and the kernels that decode and multiply."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.qmoe_decode import Coded, Unsupported, dense, qmoe_matmul
from kernels_pallas.qmoe_decode.dictionary import LONGEST, decode, encode, fingerprint, table, words

KERNELS = ("tpu", "gpu")
unpack = jax.jit(decode, static_argnums=(2, 3))


def draw(rows, width, zero=0.885, seed=0):
    other = (1 - zero) / 2
    return np.random.default_rng(seed).choice(3, (rows, width), p=[zero, other, other]).astype(np.uint8)


def coded(symbols, dtype=jnp.bfloat16, padding=3):
    """With ends that differ from row to row, and padding behind the codes as the longest of several experts leaves."""
    codes, offsets = encode(symbols)
    ends = np.random.default_rng(1).uniform(0.5, 1.5, (len(symbols), 2)) * [-1, 1]
    codes = jnp.asarray(np.pad(codes, (0, padding), constant_values=7))
    return Coded(codes, jnp.asarray(offsets), jnp.asarray(ends, dtype), symbols.shape[1])


def test_the_dictionary():
    symbols, pairs = words()
    counts = [9, 65, 233, 577, 1161, 2049, 3305, 4993, 7177, 9921, 13289, 17345, 3843, 1569]
    np.testing.assert_array_equal(np.bincount(pairs), [0, *counts])
    known = {bytes(word[: 2 * n]) for word, n in zip(symbols, pairs, strict=True)}
    assert len(known) == 65536 and max(map(len, known)) == LONGEST == 28
    assert {bytes(pair) for pair in itertools.product(range(3), repeat=2)} <= known
    assert all(len(word) == 2 or word[:-2] in known for word in known)
    # 28 zeros have probability 0.885^28 = 0.03, a word with one other symbol at most 0.885 x 0.0575 = 0.05.
    np.testing.assert_array_equal(pairs[:9], range(1, 10))
    assert not symbols[:9].any()
    first = table()[symbols.any(axis=1).argmax()]  # (2, 0), as descending order has it: one pair
    assert first.tolist() == [1 | 2 << 4, 1]
    assert fingerprint() == "90c4a83a7736f1e3"  # saved models name it


@pytest.mark.parametrize("width", [1, 2, 27, 28, 29, 300])
def test_what_was_coded_comes_back(width):
    several = np.stack([np.zeros(width), np.ones(width), np.full(width, 2), np.arange(width) % 3]).astype(
        np.uint8
    )
    symbols = np.concatenate([several, draw(8, width, 0.6)])
    codes, offsets = encode(symbols)
    assert codes.dtype == np.uint16 and len(codes) == offsets[-1]
    # Never more weights than 28 to a word, nor fewer words than one a row.
    assert (np.diff(offsets) >= -(-width // LONGEST)).all()
    np.testing.assert_array_equal(unpack(np.pad(codes, (0, 5)), offsets[-1], len(symbols), width), symbols)


def test_the_rate():
    """Of independent symbols in rows of 3072. A word begins with the pair that did not fit the one before, so that its
    length depends on that pair: 0.7330 bits by the chain of words, 0.685 if they were independent. 64 bits a row are
    0.0208, and the word that a row's end cuts short is 0.0026: 0.7564, and 0.002 is its deviation in 100 rows."""
    entropy = -(0.885 * np.log2(0.885) + 0.115 * np.log2(0.0575))
    symbols = draw(100, 3072)
    rate = (16 * len(encode(symbols)[0]) + 64 * 100) / symbols.size
    assert entropy < rate == pytest.approx(0.7564, abs=3 * 0.002)
    none = encode(np.zeros((4, 2800), np.uint8))[0]
    assert 16 * len(none) == 4 * 2800 * 16 / 28


@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
@pytest.mark.parametrize(("rows", "width", "count"), [(40, 150, 3), (130, 29, 1)])
def test_is_the_product_with_the_decoded_weights(implementation, rows, width, count):
    symbols = draw(rows, width, 0.7)
    weights = coded(symbols)
    low, high = np.asarray(weights.ends, np.float64).T
    exact = np.where(symbols == 2, high[:, None], np.where(symbols == 1, low[:, None], 0))
    np.testing.assert_array_equal(jax.jit(dense)(weights), exact)
    x = np.random.default_rng(2).standard_normal((count, width)).astype(np.float32)
    out = jax.jit(lambda x: qmoe_matmul(x, weights, implementation=implementation, interpret=True))(x)
    np.testing.assert_allclose(out, x @ exact.T, atol=1e-4)  # float32 sums of at most 150 products


def test_in_the_simulator(simulator):
    symbols = draw(9, 40, 0.8)
    weights, x = coded(symbols), jnp.asarray(np.random.default_rng(3).standard_normal((2, 40)), jnp.bfloat16)
    out = jax.jit(lambda x: qmoe_matmul(x, weights, implementation="tpu", interpret=simulator))(x)
    exact = np.asarray(x, np.float64) @ np.asarray(dense(weights), np.float64).T
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("implementation", KERNELS)
def test_lowers_without_the_device(implementation, lower):
    """A decoding step through an expert of 4096 x 1024 weights."""
    weights = Coded(
        jax.ShapeDtypeStruct((250_000,), jnp.uint16),
        jax.ShapeDtypeStruct((4097,), jnp.int32),
        jax.ShapeDtypeStruct((4096, 2), jnp.bfloat16),
        1024,
    )
    x = jax.ShapeDtypeStruct((1, 1024), jnp.bfloat16)
    marker = {"tpu": "tpu_custom_call", "gpu": "triton"}[implementation]
    assert marker in lower(
        lambda x, w: qmoe_matmul(x, w, implementation=implementation), (x, weights), implementation
    )


def test_what_cannot_be_computed_is_refused():
    weights = coded(draw(4, 10))
    with pytest.raises(Unsupported, match="x has 9 columns, the weights have 10"):
        qmoe_matmul(jnp.zeros((1, 9)), weights, implementation="reference")
    with pytest.raises(Unsupported, match="65 tokens: the kernels take at most 64"):
        qmoe_matmul(jnp.zeros((65, 10)), weights, implementation="tpu")
    with pytest.raises(Unsupported, match="x is float16"):
        qmoe_matmul(jnp.zeros((1, 10), jnp.float16), weights, implementation="gpu")
