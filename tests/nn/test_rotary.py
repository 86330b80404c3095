"""Rotary angles and frequency scalings against hand-computed numbers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.nn.rotary import LinearScaling, Llama3Scaling, Rotary, YarnScaling, rotate


def turn(positions, x, rotary=Rotary()):  # noqa: B008  (frozen)
    """x [T, d] at positions [T], one row and one head."""
    x = jnp.asarray(x, jnp.float32)[None, :, None]
    return rotate(x, *rotary(jnp.asarray(positions)[None], x.shape[-1]))[0, :, 0]


def test_a_two_dimensional_head_turns_by_its_position():
    # One pair: its frequency is base ** 0 = 1 radian a token.
    p = np.asarray([0, 1, 2, 17])
    np.testing.assert_allclose(turn(p, [[1.0, 0.0]] * 4), np.stack([np.cos(p), np.sin(p)], -1), atol=1e-6)
    np.testing.assert_allclose(
        turn(p, [[0.0, 2.0]] * 4), 2 * np.stack([-np.sin(p), np.cos(p)], -1), atol=1e-6
    )


def test_frequencies_and_the_half_split_pairing():
    # d = 4, base 10000: frequencies 1 and 10000 ** (-2 / 4) = 0.01; pairs (0, 2) and (1, 3).
    y = turn([3], [[1.0, 1.0, 0.0, 0.0]])
    expected = [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]
    np.testing.assert_allclose(y[0], expected, atol=1e-6)


def test_scores_depend_on_the_difference_of_positions_only():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 8))
    scores = [float(turn([5 + s], [q])[0] @ turn([2 + s], [k])[0]) for s in (0, 1, 100)]
    # Angles of up to 105 radians carry rounding of 105 * 2 ** -24 = 6e-6.
    np.testing.assert_allclose(scores, scores[0], atol=1e-4)


def test_linear_scaling_divides_positions():
    scaled = turn([12], [[1.0, 2.0, 3.0, 4.0]], Rotary(scaling=LinearScaling(4.0)))
    np.testing.assert_allclose(scaled, turn([3], [[1.0, 2.0, 3.0, 4.0]]), atol=1e-6)


def test_llama3_scaling():
    # Rotations over the 100 tokens of the original context: 8, 4, 2.5, 1 and 0.5.
    turns = np.asarray([8.0, 4.0, 2.5, 1.0, 0.5])
    frequencies = turns * 2 * math.pi / 100
    scaled, scale = Llama3Scaling(8.0, 1.0, 4.0, 100)(frequencies, 0.0, 10)
    # From 4 on kept; up to 1 divided by 8; 2.5 is half way: 0.5 + 0.5 / 8 = 0.5625.
    np.testing.assert_allclose(scaled / frequencies, [1.0, 1.0, 0.5625, 0.125, 0.125], rtol=1e-12)
    assert scale == 1.0


def test_yarn_scaling():
    # dim 16, base 100: t turns happen at dimension 16 log_100(6284 / 2 pi / t) / 2 = 4 log10(1000.13 / t),
    # so 100 turns at 4.0002 and 10 turns at 8.0002; floor and ceiling: a ramp from 4 to 9 over dimensions 0..7.
    yarn = YarnScaling(4.0, 6284, beta_fast=100.0, beta_slow=10.0)
    ones = np.ones(8)
    scaled, scale = yarn(ones, 100.0, 16)
    keep = np.asarray([1, 1, 1, 1, 1, 0.8, 0.6, 0.4])  # 1 - (i - 4) / 5
    np.testing.assert_allclose(scaled, keep + (1 - keep) / 4, rtol=1e-12)
    assert scale == pytest.approx(1.1386294)  # 0.1 ln 4 + 1
    # Not truncated: keep 1 - (5 - 4.0002) / 4 = 0.75006 of dimension 5, so 0.75006 + 0.24994 / 4 = 0.81254.
    exact, _ = YarnScaling(4.0, 6284, 100.0, 10.0, truncate=False)(ones, 100.0, 16)
    assert exact[5] == pytest.approx(0.81254, abs=1e-5)
    assert YarnScaling(4.0, 6284, attention_factor=0.7)(ones, 100.0, 16)[1] == 0.7
    assert YarnScaling(1.0, 6284)(ones, 100.0, 16)[1] == 1.0


def test_yarn_scales_the_rotated_vectors():
    # Position 0 turns by 0, so only the attention factor remains.
    rotary = Rotary(scaling=YarnScaling(4.0, 64, attention_factor=1.5))
    np.testing.assert_allclose(turn([0], [[1.0, 2.0, 3.0, 4.0]], rotary), [[1.5, 3.0, 4.5, 6.0]], rtol=1e-6)


def test_an_odd_head_is_refused():
    with pytest.raises(UserError, match="even head_dim, not 3"):
        Rotary()(jnp.zeros((1, 1), jnp.int32), 3)
