"""Norms against hand-computed values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.norm import _LARGE, LayerNorm, RMSNorm


def test_rms_norm_of_3_4():
    x = jnp.asarray([[3.0, 4.0]])
    rms = 12.5**0.5  # sqrt((9 + 16) / 2)
    ones = {"params": {"scale": jnp.asarray([1.0, 2.0])}}
    np.testing.assert_allclose(RMSNorm(0.0).apply(ones, x), [[3 / rms, 8 / rms]], rtol=1e-6)
    # A stored scale of [0, 1] means [1, 2] with the unit offset.
    offset = {"params": {"scale": jnp.asarray([0.0, 1.0])}}
    np.testing.assert_array_equal(
        RMSNorm(0.0, unit_offset=True).apply(offset, x), RMSNorm(0.0).apply(ones, x)
    )
    # epsilon joins the mean square: 3 / sqrt(12.5 + 3.5) = 3 / 4.
    np.testing.assert_allclose(RMSNorm(3.5).apply(ones, x), [[0.75, 2.0]], rtol=1e-6)


def test_rms_norm_over_heads_and_their_width():
    """Two heads of two: sqrt((9 + 16 + 0 + 144) / 4) = 6.5, and one scale for the four numbers."""
    x = jnp.asarray([[[3.0, 4.0], [0.0, 12.0]]])
    scale = {"params": {"scale": jnp.asarray([1.0, 2.0, 3.0, 4.0])}}
    expected = [[[3 / 6.5, 8 / 6.5], [0.0, 48 / 6.5]]]
    np.testing.assert_allclose(RMSNorm(0.0, axes=2).apply(scale, x), expected, rtol=1e-6)


def test_layer_norm_by_hand():
    # Mean 2, deviation 1: [-1, 1] * [1, 3] + [10, 20]
    params = {"scale": jnp.asarray([1.0, 3.0]), "bias": jnp.asarray([10.0, 20.0])}
    y = LayerNorm(0.0).apply({"params": params}, jnp.asarray([[1.0, 3.0]]))
    np.testing.assert_allclose(y, [[9.0, 23.0]], rtol=1e-6)


def test_initial_norms_change_nothing_but_the_scale():
    x = jnp.asarray([[2.0, -2.0]])
    for norm in (RMSNorm(0.0), RMSNorm(0.0, unit_offset=True), LayerNorm(0.0)):
        y, _ = norm.init_with_output(jax.random.key(0), x)
        np.testing.assert_allclose(y, [[1.0, -1.0]], rtol=1e-6)


def test_bfloat16_is_rounded_once_at_the_end():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 64)), jnp.bfloat16)
    scale = rng.normal(size=64).astype("f")
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True)) * scale
    y = RMSNorm(0.0).apply({"params": {"scale": jnp.asarray(scale)}}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y), expected.astype(jnp.bfloat16))


def test_groups_are_normalised_each_by_itself():
    """(3, 4) has the root mean square sqrt(25 / 2), (6, 8) twice that; one scale for all four."""
    scale = jnp.array([1.0, 1.0, 1.0, 2.0])
    out = RMSNorm(epsilon=0.0, groups=2).apply({"params": {"scale": scale}}, jnp.array([3.0, 4.0, 6.0, 8.0]))
    root = (25 / 2) ** 0.5
    np.testing.assert_allclose(out, [3 / root, 4 / root, 3 / root, 2 * 4 / root], rtol=1e-6)


def gradient_of(norm: RMSNorm):
    """A jitted function of x and the scale."""
    run = lambda x, scale: jnp.sum(jnp.sin(norm.apply({"params": {"scale": scale}}, x)))  # noqa: E731
    return jax.jit(jax.grad(run, (0, 1)))


@pytest.mark.parametrize("options", [{}, {"unit_offset": True}, {"groups": 4}, {"axes": 2}, {"epsilon": 0.1}])
def test_a_kernel_for_a_cpu_trains_large_norms(options: dict, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(_LARGE // 64, 4, 16)), jnp.float32)
    scale = jnp.asarray(rng.normal(size=64 if "axes" in options else 16), jnp.float32)
    function = gradient_of(RMSNorm(**options))
    assert "lathe_rms_norm" in function.lower(x, scale).as_text()
    found = function(x, scale)
    monkeypatch.setenv("LATHE_CPU_KERNELS", "off")
    plain = gradient_of(RMSNorm(**options))
    assert "lathe" not in plain.lower(x, scale).as_text()
    for one, other in zip(found, plain(x, scale), strict=True):
        # Sums of up to 1024 rows of numbers of about 1, in other orders.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows, dtype", [(_LARGE // 64 - 1, jnp.float32), (_LARGE // 64, jnp.bfloat16)])
def test_small_and_half_precision_norms_are_left_to_xla(rows: int, dtype: jnp.dtype):
    text = gradient_of(RMSNorm()).lower(jnp.ones((rows, 64), dtype), jnp.ones(64)).as_text()
    assert "lathe" not in text


def test_a_model_that_is_only_run_keeps_the_norm_of_xla():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(_LARGE // 64, 64)), jnp.float32)
    run = jax.jit(lambda x: RMSNorm().apply({"params": {"scale": jnp.ones(64)}}, x))
    assert "lathe" not in run.lower(x).as_text()
