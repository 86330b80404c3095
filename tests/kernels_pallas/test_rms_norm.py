"""RMSNorm and its gradient on a CPU: by hand, against float64, and bits that depend on nothing but the row."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.rms_norm import Unsupported, cpu, reference, rms_norm

EPSILON = 1e-6
UNIT = 2.0**-24  # by which a rounding changes a number at most


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pulled(function, *arguments, dy):
    """The result and the cotangents."""
    y, pull = jax.vjp(function, *arguments)
    return tuple(map(np.asarray, (y, *pull(dy))))


def test_by_hand():
    # i = 1 / sqrt((9 + 16) / 2), i^2 = 0.08. dy = [1, 0]: the mean of x scale dy is 3/2, so dx = i [1, 0] - i^3 3/2 x.
    i = 0.08**0.5
    norm = lambda x, scale: rms_norm(x, scale, 0.0)  # noqa: E731
    x, scale, dy = np.float32([[3, 4]]), np.float32([1, 2]), np.float32([[1, 0]])
    y, dx, dscale = pulled(norm, x, scale, dy=dy)
    np.testing.assert_allclose(y, [[3 * i, 8 * i]], rtol=1e-6)
    np.testing.assert_allclose(dx, [[i * (1 - 0.08 * 4.5), -i * 0.08 * 6]], rtol=1e-6)
    np.testing.assert_allclose(dscale, [3 * i, 0], rtol=1e-6)
    # epsilon joins the mean square: 3 / sqrt(12.5 + 3.5) = 3 / 4.
    np.testing.assert_allclose(rms_norm(x, scale, 3.5), [[0.75, 2]], rtol=1e-6)


def test_zeros_are_divided_by_the_root_of_epsilon():
    x, scale, dy = np.zeros((3, 8), np.float32), np.full(8, 2, np.float32), np.ones((3, 8), np.float32)
    y, dx, dscale = pulled(lambda x, scale: rms_norm(x, scale, 0.25), x, scale, dy=dy)
    assert not y.any() and not dscale.any() and np.array_equal(dx, np.full((3, 8), 4))


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize(
    "rows, groups, width",
    [(1, 1, 1), (1, 1, 7), (3, 2, 5), (64, 1, 16), (65, 3, 48), (131, 1, 100), (7, 1, 64), (2, 1, 333)],
)
def test_against_float64(lanes: int, rows: int, groups: int, width: int):
    # Wider vectors than the processor's are cut by LLVM: the code of every processor runs here.
    x, dy = drawn((rows, groups, width)), drawn((rows, groups, width), 1)
    scale = drawn((groups, width), 2)
    y, dx, dscale = pulled(lambda x, scale: cpu.rms_norm(x, scale, EPSILON, lanes), x, scale, dy=dy)
    x, dy, scale = (array.astype(np.float64) for array in (x, dy, scale))
    i = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
    share = (x * scale * dy).mean(-1, keepdims=True)
    # A sum of `width` terms rounds each at most `width` times; a dozen operations follow.
    roundings = (width + 12) * UNIT
    assert np.all(np.abs(y - x * i * scale) <= roundings * np.abs(x * i * scale))
    size = np.abs(i * scale * dy) + np.abs(x) * i**3 * np.abs(x * scale * dy).mean(-1, keepdims=True)
    assert np.all(np.abs(dx - (i * scale * dy - x * i**3 * share)) <= 2 * roundings * size)
    terms = dy * x * i
    assert np.all(np.abs(dscale - terms.sum(0)) <= (rows * UNIT + roundings) * np.abs(terms).sum(0))


def test_a_row_has_the_same_bits_alone_and_among_others():
    norm = lambda x, scale: rms_norm(x, scale, EPSILON)  # noqa: E731
    x, scale, dy = drawn((200, 100)), drawn((100,), 1), drawn((200, 100), 2)
    y, dx, _ = pulled(norm, x, scale, dy=dy)
    for first, last in ((0, 1), (63, 66), (130, 200)):
        own = pulled(norm, x[first:last], scale, dy=dy[first:last])
        assert np.array_equal(own[0], y[first:last]) and np.array_equal(own[1], dx[first:last])


def test_the_gradient_of_the_scale_is_a_sum_of_blocks_in_their_order():
    norm = lambda x, scale: rms_norm(x, scale, EPSILON)  # noqa: E731
    x, scale, dy = drawn((1000, 40)), drawn((40,), 1), drawn((1000, 40), 2)
    found = pulled(norm, x, scale, dy=dy)[2]
    expected = np.zeros(40, np.float32)
    for first in range(0, 1000, cpu.BLOCK):
        rows = slice(first, first + cpu.BLOCK)
        expected += pulled(norm, x[rows], scale, dy=dy[rows])[2]
    assert np.array_equal(found, expected)


def test_many_callers_at_once():
    # Who finds the threads taken computes alone: the bits are the same with helpers and without.
    gradient = jax.jit(jax.grad(lambda x, s, dy: jnp.sum(dy * rms_norm(x, s, EPSILON)), (0, 1)))
    arguments = drawn((1500, 96)), drawn((96,), 1), drawn((1500, 96), 2)
    expected = jax.device_get(gradient(*arguments))

    def call(_: int) -> bool:
        return all(map(np.array_equal, jax.device_get(gradient(*arguments)), expected))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(100)))


def test_under_jit_scan_remat_and_vmap():
    scale, x = drawn((3, 24)), drawn((2, 5, 24), 1)

    def loss(x, scale, norm):
        layer = jax.checkpoint(lambda x, scale: (x + norm(x, scale), None))
        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, scale)[0]))

    def gradients(implementation: str):
        norm = lambda x, scale: rms_norm(x, scale, EPSILON, 2, implementation=implementation)  # noqa: E731
        one = jax.jit(jax.grad(lambda x, scale: loss(x, scale, norm), (0, 1)))
        return one(x, scale), jax.vmap(one, (0, None))(x, scale)

    (whole, each), expected = gradients("cpu"), gradients("reference")
    # Three norms one behind the other, of numbers of about 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (whole, each), expected)
    assert np.array_equal(whole[0], each[0])


def test_what_is_not_a_number_stays_in_its_row():
    x, dy = drawn((70, 33)), drawn((70, 33), 1)
    x[2, 3] = np.nan
    y, dx, dscale = pulled(lambda x, s: rms_norm(x, s, EPSILON), x, np.ones(33, np.float32), dy=dy)
    for rows in (y, dx):
        assert np.isnan(rows[2]).all() and np.isfinite(np.delete(rows, 2, 0)).all()
    assert np.isnan(dscale).all()


def test_no_rows():
    scale = np.ones(4, np.float32)
    y, dx, dscale = pulled(
        lambda x, s: rms_norm(x, s, 1.0), np.zeros((0, 4), np.float32), scale, dy=np.zeros((0, 4))
    )
    assert y.shape == dx.shape == (0, 4) and np.array_equal(dscale, np.zeros(4))


def test_reference_is_the_same_norm():
    x, scale = drawn((2, 3, 20)), drawn((20,), 1)
    found = rms_norm(x, scale, EPSILON, 4)
    assert found.shape == (2, 3, 20)
    named = rms_norm(x, scale, EPSILON, 4, implementation="reference")
    np.testing.assert_allclose(found, named, rtol=20 * UNIT)
    assert np.array_equal(named, reference.rms_norm(x, scale, EPSILON, 4))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(x=jnp.zeros((2, 20), jnp.bfloat16)),
            "x is bfloat16, the scale is float32: the kernel takes float32",
        ),
        (dict(scale=np.ones(21, np.float32)), "does not fall into 1 groups"),
        (dict(groups=3), "does not fall into 3 groups"),
        (dict(groups=0), "does not fall into 0 groups"),
        (dict(implementation="tpu"), "no implementation 'tpu': there are reference and cpu"),
    ],
)
def test_bad_arguments(change: dict, message: str):
    given = dict(x=np.zeros((2, 20), np.float32), scale=np.ones(20, np.float32), epsilon=1.0) | change
    with pytest.raises(Unsupported, match=message):
        rms_norm(**given)
