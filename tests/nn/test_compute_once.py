"""Values computed once: the same bits, and one computation in the program of a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.compute_once import compute_once
from research.nn.rotary import Rotary, rotate


@pytest.mark.parametrize("shape", [(3, 32), (2, 5, 96), (7, 130), (2, 67), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_are_the_same(shape, dtype):
    """Widths below an identity, of several, of a small divisor, prime, and one."""
    x = jnp.asarray(1e3 * np.random.default_rng(0).standard_normal(shape), dtype)
    once = jax.jit(compute_once)(x)
    assert once.dtype == x.dtype
    np.testing.assert_array_equal(once, x)


def test_xla_computes_tables_once_and_not_where_they_are_used():
    def cosines(uses: int, prepare) -> int:
        def loss(x, positions):
            tables = [prepare(table) for table in Rotary()(positions, 64)]
            for _ in range(uses):
                x = jnp.tanh(rotate(x, *tables))
            return jnp.sum(x)

        x, positions = jnp.ones((2, 32, 2, 64)), jnp.zeros((2, 32), jnp.int32)
        return jax.jit(jax.grad(loss)).lower(x, positions).compile().as_text().count(" cosine(")

    assert cosines(4, compute_once) == cosines(1, compute_once) == 1
    assert cosines(4, lambda table: table) > 1  # else the trick is no longer needed
