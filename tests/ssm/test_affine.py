"""The linear recurrence: loop, closed form and associative scan are one function."""

import jax
import jax.numpy as jnp
import numpy as np

from research.ssm.affine import UNROLL, AffineState, affine_scan


def combine(first, second):
    """s -> s W_1 + u_1, then s -> s W_2 + u_2, as one affine map."""
    (w1, u1), (w2, u2) = first, second
    return w1 @ w2, jnp.einsum("...bs,...st->...bt", u1, w2) + u2


def test_recurrence_is_the_closed_form_and_the_associative_scan():
    batch, length, size = 2, UNROLL + 5, 3  # more than one turn of the loop, and a rest
    random = np.random.default_rng(0)
    kernel = np.linalg.qr(random.standard_normal((size, size)))[0] * 0.9
    u, start = random.standard_normal((batch, length, size)), random.standard_normal((batch, size))

    @jax.jit
    def both(kernel, u, start):
        maps = jnp.broadcast_to(kernel, (length, size, size)), u.swapaxes(0, 1)
        products, sums = jax.lax.associative_scan(combine, maps)
        return (
            affine_scan(kernel, u),
            affine_scan(kernel, u, start),
            sums[-1],
            start @ products[-1] + sums[-1],
        )

    found = both(*(jnp.asarray(x, jnp.float32) for x in (kernel, u, start)))
    powers = [np.linalg.matrix_power(kernel, length - 1 - t) for t in range(length)]
    closed = sum(u[:, t] @ powers[t] for t in range(length))
    started = closed + start @ np.linalg.matrix_power(kernel, length)
    # 21 terms of order 1, each after at most 21 products with a matrix of norm 0.9.
    for value, wanted in zip(found, (closed, started, closed, started), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5)


def test_layer_by_hand():
    # One state and one input: s_t = 2 s_{t-1} + 1 + (3 x_t - 1) = 2 s_{t-1} + 3 x_t over x = 1, 0, 2:
    # 3, 6, 18.
    params = {
        "transition": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([1.0])},
        "update": {"kernel": jnp.array([[3.0]]), "bias": jnp.array([-1.0])},
    }
    out = AffineState(1).apply({"params": params}, jnp.array([[[1.0], [0.0], [2.0]]]))
    np.testing.assert_array_equal(out, [[18.0]])
