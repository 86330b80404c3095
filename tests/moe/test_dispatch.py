"""Every backend equals the dense oracle, forward and backward, and treats capacity and padding as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.moe.dispatch import CapacityDispatch, SortedDispatch, make_dispatch
from research.moe.routing import route

N, K, E, D = 24, 2, 4, 8


def routing(seed=0, mask=None, k=K):
    return route(jax.random.normal(jax.random.key(seed), (N, E)), k, mask=mask)


def layer(make, x, logits, up, down, mask):
    r = route(logits, K, mask=mask)
    dispatch = make(r)
    hidden = jnp.tanh(dispatch.bias(dispatch.dot(dispatch.scatter(x), up), up[:, 0]))
    return dispatch.combine(dispatch.dot(hidden, down), r.gate)


MAKERS = {
    "capacity": CapacityDispatch.make,
    "sorted": SortedDispatch.make,
    "tiles of 1": lambda r: SortedDispatch.make(r, 1),
    "tiles of 5": lambda r: SortedDispatch.make(r, 5),
}


@pytest.mark.parametrize("name", MAKERS)
def test_equals_the_oracle_forward_and_backward(name):
    keys = jax.random.split(jax.random.key(1), 4)
    x, logits = jax.random.normal(keys[0], (N, D)), jax.random.normal(keys[1], (N, E))
    up, down = jax.random.normal(keys[2], (E, D, D)), jax.random.normal(keys[3], (E, D, D))
    mask = jnp.arange(N) % 5 > 0

    def run(make):
        def objective(x, logits, up, down):
            y = layer(make, x, logits, up, down, mask)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

        return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2, 3), has_aux=True))(x, logits, up, down)

    ours, oracle = run(MAKERS[name]), run(lambda r: make_dispatch(r, "dense"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, oracle)
