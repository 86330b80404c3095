"""The forms of state-space duality against the recurrence, and the recurrence against numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.ssd import reference
from research.errors import UserError
from research.ssm import ssd as forms

# One program a shape instead of one an operation.
ssd = jax.jit(forms.ssd, static_argnames="chunk")
ssd_sequential, ssd_tree, advance = map(jax.jit, (forms.ssd_sequential, forms.ssd_tree, forms.advance))

BATCH, LENGTH, HEADS, CHANNELS, GROUPS, SIZE = 2, 11, 4, 3, 2, 5


@functools.partial(jax.jit, static_argnums=0)
def inputs(length: int = LENGTH):
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (BATCH, length, HEADS, CHANNELS))
    log_decay = -jax.random.exponential(keys[1], (BATCH, length, HEADS))
    b, c = (jax.random.normal(key, (BATCH, length, GROUPS, SIZE)) for key in keys[2:4])
    state = jax.random.normal(keys[4], (BATCH, HEADS, CHANNELS, SIZE))
    return x, log_decay, b, c, state


def close(got, expected, scale=1.0):
    """Sums of at most 11 x 5 float32 products of size one: 55 roundings of 6e-8, with room."""
    np.testing.assert_allclose(got, expected, rtol=2e-5 * scale, atol=2e-5 * scale)


def test_the_recurrence_by_hand():
    """Decay 1/2: S = 2 * 3 = 6, y = 6 * 1; S = 6/2 + 4 * 1 = 7, y = 7 * 2 = 14; S = 7/2 - 1 * 2 = 1.5, y = 1.5 * 10."""
    x = jnp.array([2.0, 4.0, -1.0]).reshape(1, 3, 1, 1)
    b = jnp.array([3.0, 1.0, 2.0]).reshape(1, 3, 1, 1)
    c = jnp.array([1.0, 2.0, 10.0]).reshape(1, 3, 1, 1)
    log_decay = jnp.full((1, 3, 1), jnp.log(0.5))
    for y, state in (ssd_sequential(x, log_decay, b, c), ssd(x, log_decay, b, c, chunk=2)):
        np.testing.assert_allclose(y.reshape(-1), [6.0, 14.0, 15.0], rtol=1e-6)
        np.testing.assert_allclose(state.reshape(-1), [1.5], rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 64])
def test_any_chunk_is_the_recurrence(chunk):
    x, log_decay, b, c, state = inputs()
    for start in (None, state):
        y, final = ssd(x, log_decay, b, c, chunk=chunk, state=start)
        expected, expected_final = ssd_sequential(x, log_decay, b, c, start)
        close(y, expected)
        close(final, expected_final)


def test_gradients_are_those_of_the_recurrence():
    x, log_decay, b, c, state = inputs()

    def loss(form):
        return lambda *args: sum(jnp.sum(jnp.sin(part)) for part in form(*args))

    chunked = jax.jit(jax.grad(loss(lambda *a: ssd(*a[:4], chunk=4, state=a[4])), argnums=range(5)))
    sequential = jax.jit(jax.grad(loss(ssd_sequential), argnums=range(5)))
    for got, expected in zip(
        chunked(x, log_decay, b, c, state), sequential(x, log_decay, b, c, state), strict=True
    ):
        assert np.all(np.isfinite(got))
        close(got, expected, scale=10.0)  # the derivative of a decay is a sum over all later tokens


def test_without_decay_it_is_causal_linear_attention():
    x, log_decay, b, c, _ = inputs()
    y, _ = ssd(x, jnp.zeros_like(log_decay), b, c, chunk=4)
    b, c = (np.repeat(part, HEADS // GROUPS, axis=2) for part in (b, c))
    scores = np.einsum("bihn,bjhn->bhij", c, b) * np.tril(np.ones((LENGTH, LENGTH)))
    close(y, np.einsum("bhij,bjhp->bihp", scores, x))


def test_segments_do_not_meet():
    x, log_decay, b, c, _ = inputs()
    cuts = (0, 2, 7, LENGTH)
    segments = np.broadcast_to(np.repeat(np.arange(3), np.diff(cuts)), (BATCH, LENGTH))
    y, final = ssd(x, log_decay, b, c, chunk=4, segments=segments)
    for start, stop in zip(cuts, cuts[1:], strict=False):
        part = (np.asarray(value)[:, start:stop] for value in (x, log_decay, b, c))
        expected, last = ssd_sequential(*part)
        close(y[:, start:stop], expected)
    close(final, last)


def test_blocks_of_chunks_are_the_recurrence(monkeypatch):
    """11 chunks in blocks of 4, the last of which is padded; a state in front, which segments cut off in a block."""
    monkeypatch.setattr(reference, "BLOCK", 4)
    in_blocks = jax.jit(lambda *a: forms.ssd(*a[:4], chunk=1, state=a[4], segments=a[5]))
    x, log_decay, b, c, state = inputs()
    whole, cut = (
        np.zeros((BATCH, LENGTH), np.int32),
        np.repeat([[0, 1]], (6, 5), axis=1).repeat(BATCH, axis=0),
    )
    for got, expected in zip(
        in_blocks(x, log_decay, b, c, state, whole), ssd_sequential(x, log_decay, b, c, state), strict=True
    ):
        close(got, expected)
    y, final = in_blocks(x, log_decay, b, c, state, cut)
    head, tail = (
        [np.asarray(value)[:, part] for value in (x, log_decay, b, c)] for part in (slice(6), slice(6, None))
    )
    close(y[:, :6], ssd_sequential(*head, state)[0])
    for got, expected in zip((y[:, 6:], final), ssd_sequential(*tail), strict=True):
        close(got, expected)


def test_a_tree_is_the_recurrence_along_every_path():
    """Nodes 0 -> 1 -> 3 and 0 -> 2 -> 4; a state in front."""
    x, log_decay, b, c, state = inputs(5)
    paths = {0: [0], 1: [0, 1], 2: [0, 2], 3: [0, 1, 3], 4: [0, 2, 4]}
    tree = np.zeros((5, 5), bool)
    for node, path in paths.items():
        tree[node, path] = True
    y = ssd_tree(x, log_decay, b, c, tree=jnp.asarray(tree), state=state)
    for node, path in paths.items():
        expected, _ = ssd_sequential(*(np.asarray(value)[:, path] for value in (x, log_decay, b, c)), state)
        close(y[:, node], expected[:, -1])


def test_a_state_advances_by_some_of_the_tokens():
    x, log_decay, b, c, state = inputs()
    count = jnp.array([4, 0])
    got = advance(state, x, log_decay, b, count)
    close(got[0], ssd_sequential(*(value[:1, :4] for value in (x, log_decay, b, c)), state[:1])[1][0])
    np.testing.assert_array_equal(got[1], state[1])


def test_strong_decay_does_not_overflow():
    x, log_decay, b, c, _ = inputs()
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(ssd(x, a, b, c, chunk=11)[0])))(log_decay * 1e4)
    assert np.all(np.isfinite(gradient))


def test_mistakes_are_told():
    x, log_decay, b, c, _ = inputs()
    with pytest.raises(UserError, match="chunk=0"):
        ssd(x, log_decay, b, c, chunk=0)
    with pytest.raises(UserError, match="4 heads are not a multiple of 3 groups"):
        ssd(x, log_decay, jnp.zeros((BATCH, LENGTH, 3, SIZE)), jnp.zeros((BATCH, LENGTH, 3, SIZE)), chunk=4)
