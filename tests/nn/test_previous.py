"""The previous-token channel: a shift by one, the same behind a cache and along a tree."""

import jax
import jax.numpy as jnp
import numpy as np

from research.nn.attention import Context
from research.nn.cache import Cache
from research.nn.previous import PreviousToken

MIXER = PreviousToken(width=2)
PARAMS = {"params": {"output": {"kernel": jnp.eye(2)}}}  # y is the previous x


@jax.jit
def apply(x, context, cache=None):
    return MIXER.apply(PARAMS, jnp.asarray(x, jnp.float32), context, cache)


def test_a_shift_inside_segments():
    x = np.arange(1, 9).reshape(1, 4, 2)
    y, _ = apply(x, Context(jnp.arange(4)[None], segments=jnp.asarray([[1, 1, 2, 2]])))
    assert y.tolist() == [[[0, 0], [1, 2], [0, 0], [5, 6]]]


def test_parents_in_a_tree_behind_a_cache():
    rows = jnp.arange(1.0, 13.0).reshape(2, 1, 3, 2)
    cache = Cache((MIXER.init_cache(2, 8, 1, jnp.float32),), jnp.zeros(2, jnp.int32))
    cache = cache.commit(((rows, rows[..., :0]),), None, jnp.asarray([3, 1]))
    # Two children of the root, and a child of the second one.
    tree = jnp.asarray([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)[None]
    x = 100.0 + jnp.arange(16).reshape(2, 4, 2)
    for back, last in ((0, [[5, 6], [7, 8]]), (1, [[3, 4], [0, 0]])):  # row 1 then has no token
        held = cache.rollback(cache.length - back)
        positions = held.length[:, None] + jnp.asarray([0, 1, 1, 2])
        y, _ = apply(x, Context(positions, length=held.length, tree=tree), held.layers[0])
        for row in range(2):
            expected = [last[row], x[row, 0].tolist(), x[row, 0].tolist(), x[row, 2].tolist()]
            assert y[row].tolist() == expected


def test_gradient_reaches_the_previous_token():
    places = Context(jnp.arange(3)[None])
    gradient = jax.grad(lambda x: apply(x, places)[0][0, 2].sum())(jnp.ones((1, 3, 2)))
    assert gradient.tolist() == [[[0, 0], [1, 1], [0, 0]]]
