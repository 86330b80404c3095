"""silu(gate) * up: against its formula in float64, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.silu_product import Unsupported, cpu, silu_product


def expected(gate: np.ndarray, up: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, ...]:
    gate, up, dy = (x.astype(np.float64) for x in (gate, up, dy))
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-gate))
    return gate * s * up, dy * up * s * (1 + gate * (1 - s)), dy * gate * s


# Around vectors of 16, pairs of them, and pieces of 16,384 numbers.
@pytest.mark.parametrize("shape", [(1,), (15,), (3, 11), (4, 16), (5, 13), (130, 127)])
def test_values_and_gradients(shape: tuple[int, ...]):
    gate, up, dy = (np.random.default_rng(i).normal(size=shape).astype(np.float32) * 3 for i in range(3))
    y, pull = jax.vjp(silu_product, gate, up)
    for found, wanted in zip((y, *pull(dy)), expected(gate, up, dy), strict=True):
        # The exponential is right to two units in the last place, and some ten roundings follow it.
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)


def test_by_hand():
    # silu(0) = 0 with slope 1/2; silu(ln 3) = 3/4 ln 3 with slope 3/4 (1 + ln 3 / 4) = 0.955990
    gate, up = jnp.asarray([0.0, np.log(3)], jnp.float32), jnp.asarray([5.0, 2.0])
    np.testing.assert_allclose(silu_product(gate, up), [0, 1.5 * np.log(3)], rtol=1e-6)
    dgate, dup = jax.grad(lambda gate, up: silu_product(gate, up).sum(), (0, 1))(gate, up)
    np.testing.assert_allclose(dgate, [2.5, 2 * 0.955990], rtol=1e-6)
    np.testing.assert_allclose(dup, [0, 0.75 * np.log(3)], rtol=1e-6)


def test_large_numbers_and_nan():
    gate, up = np.array([1e4, -1e4, np.nan, 1], np.float32), np.array([2, 2, 2, np.nan], np.float32)
    found = np.asarray(silu_product(gate, up))
    # -1e4 / (1 + e^88): the exponential ends there, and the reference's 1e4 e^-1e4 is 0 in float32, too.
    assert found[0] == 2e4 and abs(found[1]) < 1e-30 and np.isnan(found[2:]).all()


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_any_length_give_the_same_bits(lanes: int):
    gate, up = (np.random.default_rng(i).normal(size=50_000).astype(np.float32) for i in range(2))
    assert np.array_equal(cpu.silu_product(gate, up, lanes), silu_product(gate, up))


def test_under_jit_vmap_and_remat():
    gate, up = (jnp.asarray(np.random.default_rng(i).normal(size=(2, 40)), jnp.float32) for i in range(2))
    once = silu_product(gate, up)
    assert np.array_equal(jax.jit(jax.vmap(silu_product))(gate, up), once)
    grad = jax.grad(lambda gate: silu_product(gate, up).sum())
    again = jax.grad(lambda gate: jax.checkpoint(silu_product)(gate, up).sum())
    assert np.array_equal(jax.jit(again)(gate), grad(gate))
    assert np.array_equal(silu_product(gate, up, implementation="reference"), jax.nn.silu(gate) * up)


@pytest.mark.parametrize(
    "up, options, message",
    [
        (np.zeros(3, np.float32), {}, r"the gate is \[2\], what it multiplies \[3\]"),
        (jnp.zeros(2, jnp.bfloat16), {}, "what it multiplies bfloat16: the kernel takes float32"),
        (np.zeros(2, np.float32), {"implementation": "gpu"}, "no implementation 'gpu'"),
    ],
)
def test_bad_arguments(up, options: dict, message: str):
    with pytest.raises(Unsupported, match=message):
        silu_product(np.zeros(2, np.float32), up, **options)
