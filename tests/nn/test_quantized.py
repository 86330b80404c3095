"""Quantized kernels: what they store, round to, multiply, cut and refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.quantized_matmul.packing import unpack_codes
from research.errors import UserError
from research.nn import packed
from research.nn.accounting import count_bytes, count_parameters
from research.nn.normal_float import code_book, quantize_normal
from research.nn.quantized import PallasProduct, Quantized, quantize, quantize_kernels
from research.nn.weights import LowRank, Sum, dot, narrow, stored_bits

RNG = np.random.default_rng(0)
W = RNG.normal(size=(32, 6)).astype("f")
X = RNG.normal(size=(2, 32)).astype("f")
KERNELS = {
    "8 bits a channel": quantize(W, 8),
    "4 bits, groups of 16": quantize(W, 4, 16),
    "3 bits, asymmetric": quantize(W, 3, 8, symmetric=False),
    "2 bits": quantize(W, 2, 4, symmetric=False, scale_dtype=jnp.float16),
    "NF4": quantize_normal(W, 4, 8, scale_block=3),
    "NF3": quantize_normal(W, 3, 16),
    "NF2": quantize_normal(W, 2, 32, scale_dtype=jnp.bfloat16),
}


def reference(kernel):
    """The kernel in numpy, of its codes."""
    codes = np.asarray(unpack_codes(kernel.codes, kernel.bits, kernel.tile))
    if isinstance(kernel, Quantized):
        zero = 2 ** (kernel.bits - 1) if kernel.zero is None else np.repeat(kernel.zero, kernel.group, 0)
        return (codes - np.float32(zero)) * np.repeat(np.float32(kernel.scale), kernel.group, 0)
    return np.float32(code_book(kernel.bits))[codes] * np.repeat(np.float32(kernel.scales()), kernel.group, 0)


def test_what_is_stored_is_what_lies_in_memory():
    # Codes, then scales (and zeros): 32 * 6 codes.
    by_hand = {
        "8 bits a channel": 192 * 8 + 6 * 32,
        "4 bits, groups of 16": 192 * 4 + 2 * 6 * 32,
        "3 bits, asymmetric": 192 * 3 + 4 * 6 * (32 + 8),
        "2 bits": 192 * 2 + 8 * 6 * (16 + 8),
        # 4 * 6 scales of a byte, a step for every 3 of them, one offset.
        "NF4": 192 * 4 + 24 * 8 + 8 * 32 + 32,
        "NF3": 192 * 3 + 12 * 32,
        "NF2": 192 * 2 + 6 * 16,
    }
    for name, kernel in KERNELS.items():
        on_device = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(kernel))
        assert kernel.stored_bits() == by_hand[name] == 8 * on_device == 8 * count_bytes({"k": kernel})
    low = LowRank(jnp.ones((32, 2)), jnp.ones((2, 6), jnp.bfloat16))
    tree = {"sum": Sum((KERNELS["NF3"], low)), "plain": jnp.ones(5)}
    assert stored_bits(tree) == by_hand["NF3"] + 64 * 32 + 12 * 16 + 5 * 32
    assert count_parameters(tree) == 192 + 12 + 64 + 12 + 5


def test_products_gradients_and_cuts():
    def everything(x, kernels):
        def of(kernel):
            leaves, tree = jax.tree.flatten(kernel)
            real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

            def product(x, floating):
                floating = iter(floating)
                full = [next(floating) if f else leaf for f, leaf in zip(real, leaves, strict=True)]
                return dot(x, tree.unflatten(full))

            floating = [leaf for f, leaf in zip(real, leaves, strict=True) if f]
            few, pull = jax.vjp(product, x, floating)
            many = dot(jnp.concatenate([x] * 65), kernel)
            return few, many, kernel.materialize(), *pull(jnp.ones_like(few))

        return {name: of(kernel) for name, kernel in kernels.items()}

    some = {name: KERNELS[name] for name in ("3 bits, asymmetric", "2 bits", "NF4")}
    for name, (few, many, whole, dx, d_floating) in jax.jit(everything)(X, some).items():
        kernel, expected = KERNELS[name], reference(KERNELS[name])
        assert kernel.shape == (32, 6) and kernel.dtype == jnp.float32
        np.testing.assert_allclose(whole, expected, rtol=1e-6)
        # Sums of 32 terms of order 1 in float32.
        np.testing.assert_allclose(few, X @ expected, atol=2e-5)
        np.testing.assert_allclose(many[128:], X @ expected, atol=2e-5)
        np.testing.assert_allclose(dx, np.broadcast_to(expected.sum(1), X.shape), atol=2e-5)
        if not hasattr(kernel.scale, "step"):  # dy/dscale = sum of (x dy) over the group's unscaled values
            unit = expected / np.repeat(np.float32(kernel.scale), kernel.group, 0)
            expected = (X.sum(0)[:, None] * unit).reshape(-1, kernel.group, 6).sum(1)
            rtol = 1e-2 if kernel.scale.dtype != jnp.float32 else 1e-4  # rounded to its dtype
            np.testing.assert_allclose(np.float32(d_floating[0]), expected, rtol, 1e-4)
    # A slice is the slice of the kernel, in less memory, whether or not it ends at a tile.
    for name, inputs, outputs in (
        ("8 bits a channel", 7, 2),
        ("4 bits, groups of 16", 16, 5),
        ("3 bits, asymmetric", 24, None),
        ("NF4", 8, 3),
    ):
        part = narrow(KERNELS[name], inputs, outputs)
        np.testing.assert_array_equal(
            part.materialize(), KERNELS[name].materialize()[:inputs, :outputs], strict=True
        )
        assert part.stored_bits() == 8 * count_bytes(part) < KERNELS[name].stored_bits()
    with pytest.raises(UserError, match="a slice of 8 inputs cuts a group of 16: take a multiple of 16"):
        narrow(KERNELS["4 bits, groups of 16"], inputs=8)
    with pytest.raises(UserError, match="cuts a block of 3 scales"):
        narrow(KERNELS["NF4"], outputs=4)


def test_one_row_and_blocks(monkeypatch):
    """One row is summed in registers; three are multiplied tile by tile, four columns at a time (of 3 bits sixteen) and
    the last block sharing columns with the one before."""
    monkeypatch.setattr(packed, "TILE", 16)
    monkeypatch.setattr(packed, "_BLOCK", 32)

    def kernel(bits, groups, zero_dtype):
        codes = RNG.integers(0, 2**bits, (32, 18)).astype(np.uint8)
        scale, zero = RNG.uniform(0.5, 1.0, (groups, 18)), RNG.uniform(0, 2**bits, (groups, 18))
        zero = None if zero_dtype is None else zero.astype(zero_dtype)
        return Quantized.from_codes(codes, scale.astype("f"), zero, bits)

    kernels = [kernel(8, 1, None), kernel(4, 4, "uint8"), kernel(3, 8, "f")]
    kernels.append(quantize_normal(RNG.normal(size=(64, 18)).astype("f"), 4, 8))

    def everything(x, kernels):
        def product(x, scale, kernel):
            return dot(x[:, : kernel.shape[0]], kernel.replace(scale=scale))

        def of(x, kernel):
            y, pull = jax.vjp(lambda x, scale: product(x, scale, kernel), x, kernel.scale)
            return y, *pull(jnp.ones_like(y))

        return [[of(x[:rows], kernel) for kernel in kernels] for rows in (1, 3)]

    x = RNG.normal(size=(3, 64)).astype("f")
    for rows, results in zip((1, 3), jax.jit(everything)(x, kernels), strict=True):
        for kernel, (y, dx, d_scale) in zip(kernels, results, strict=True):
            expected, k = np.float64(reference(kernel)), kernel.shape[0]
            np.testing.assert_allclose(y, x[:rows, :k] @ expected, atol=1e-6 * 2**kernel.bits * k)
            np.testing.assert_allclose(dx[:, :k], np.tile(expected.sum(1), (rows, 1)), rtol=1e-4, atol=1e-4)
            unit = expected / np.repeat(kernel.scale, kernel.group, 0)
            unit = (x[:rows, :k].sum(0)[:, None] * unit).reshape(-1, kernel.group, 18).sum(1)
            np.testing.assert_allclose(d_scale, unit, rtol=1e-4, atol=1e-6 * 2**kernel.bits * k)


def test_rounding():
    column = np.array([[-7.0], [3.4], [0.0], [7.0]], "f")
    assert quantize(column, 4).unpacked()[:, 0].tolist() == [8 - 7, 8 + 3, 8, 8 + 7]  # scale 1
    shifted = quantize(np.array([[0.0], [1.0], [1.6], [3.0]], "f"), 2, symmetric=False)
    # Scale 1, zero 0: no code is lost on a side that has no values.
    assert (shifted.unpacked()[:, 0].tolist(), shifted.zero.tolist()) == ([0, 1, 2, 3], [[0]])
    # Fifteen ones and one more value in each column. At steps 14 and 3.5 the ones become 0 (error 15), and of the
    # latter 14 becomes 3.5: the first stays. At steps 4 (error 15) and 1 (4 becomes 1: error 9) the second is taken.
    many = np.concatenate([np.ones((15, 2)), [[14.0, 4.0]]]).astype("f")
    np.testing.assert_allclose(quantize(many, 2, clips=(1.0, 0.25)).scale, [[14.0, 1.0]])
    assert not quantize(jnp.zeros((4, 1)), 4).materialize().any()
    # QLoRA's table, appendix E.
    table = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    table += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    np.testing.assert_allclose(code_book(4), table, atol=1e-6)
    assert [len(code_book(bits)) for bits in (2, 3)] == [4, 8] and code_book(2)[1] == 0.0
    exact = np.float32(code_book(3))[:, None] * [[2.0, 0.5]]
    np.testing.assert_allclose(quantize_normal(exact, 3, 8).materialize(), exact, rtol=1e-6)


def test_the_pallas_kernel_computes_the_same():
    kernel = quantize(RNG.normal(size=(64, 8)).astype("f"), 4, 16)
    x = RNG.normal(size=(8, 64)).astype("f")
    pallas = kernel.replace(kernel=PallasProduct("tpu", interpret=True))
    np.testing.assert_allclose(dot(x, pallas), dot(x, kernel), atol=2e-5)
    for bad, match in (
        (quantize(W, 3).replace(kernel=PallasProduct("tpu")), "codes of 3 bits"),
        (kernel.replace(kernel=PallasProduct()), "no quantized matmul kernel for the backend 'cpu'"),
    ):
        with pytest.raises(UserError, match=match):
            dot(x[:, : bad.shape[0]], bad)


def test_bad_input_is_named():
    for call, match in (
        (lambda: quantize(W, 5), "bits=5 is not supported: there are 2, 3, 4, 8"),
        (lambda: quantize(W, 4, 5), "group=5 does not divide the 32 inputs"),
        (lambda: quantize(W[:9], 3), "9 inputs cannot be packed at 3 bits: take a multiple of 8"),
        (lambda: quantize_normal(W, 5), "NormalFloat of 5 bits is not supported: there are 2, 3, 4, 8"),
        (lambda: quantize_normal(W, 4, 8, scale_block=4), "scale_block=4 does not divide the 6 outputs"),
        (lambda: quantize_kernels({"a": {"kernel": W}}, lambda k: quantize(k, 4, 5)), "^a/kernel: group=5"),
        (lambda: quantize_kernels({"conv": {"kernel": W}}, lambda k: quantize(k, 4)), "no array to quantize"),
    ):
        with pytest.raises(UserError, match=match):
            call()
