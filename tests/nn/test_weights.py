"""Kernels multiply, materialize and narrow alike, whatever they are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.weights import LowRank, Sum, Weight, dot, materialize, narrow

X = jnp.asarray([[1.0, 2.0, 3.0]])
# down [3, 1] times up [1, 2] = [[2, 1], [0, 0], [4, 2]]
LOW = LowRank(jnp.asarray([[2.0], [0.0], [4.0]]), jnp.asarray([[1.0, 0.5]]))
BASE = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
KERNELS = {
    # x BASE = [1 + 3, 2 + 3]
    "array": (BASE, [[4.0, 5.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
    # x LOW = [1 * 2 + 3 * 4, 1 * 1 + 3 * 2]
    "low rank": (LOW, [[14.0, 7.0]], [[2.0, 1.0], [0.0, 0.0], [4.0, 2.0]]),
    # base plus correction: [4 + 14, 5 + 7]
    "sum": (Sum((BASE, LOW)), [[18.0, 12.0]], [[3.0, 1.0], [0.0, 1.0], [5.0, 3.0]]),
}


@pytest.mark.parametrize("name", KERNELS)
def test_dot_materialize_and_narrow(name):
    kernel, product, whole = KERNELS[name]
    assert kernel.shape == (3, 2) and kernel.dtype == jnp.float32
    assert dot(X, kernel).tolist() == product
    assert materialize(kernel).tolist() == whole
    part = narrow(kernel, inputs=2, outputs=1)
    assert part.shape == (2, 1)
    assert materialize(part).tolist() == [row[:1] for row in whole[:2]]
    assert jax.tree.structure(narrow(kernel)) == jax.tree.structure(kernel)
    assert materialize(narrow(kernel)).tolist() == whole


def test_narrowing_makes_the_arrays_smaller():
    part = narrow(Sum((BASE, LOW)), inputs=2, outputs=1)
    # BASE [2, 1] + down [2, 1] + up [1, 1]
    assert sum(leaf.size for leaf in jax.tree.leaves(part)) == 2 + 2 + 1


def test_stacked_kernels_are_narrowed_layer_by_layer():
    rng = np.random.default_rng(0)
    layers = [
        LowRank(rng.normal(size=(4, 2)).astype("f"), rng.normal(size=(2, 6)).astype("f")) for _ in range(3)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert stacked.shape == (3, 4, 6)
    part = narrow(Sum((stacked, stacked)), inputs=3, outputs=5)
    assert part.shape == (3, 3, 5)
    for i, layer in enumerate(layers):
        sliced = jax.tree.map(lambda leaf: leaf[i], part).terms[0]  # noqa: B023
        np.testing.assert_array_equal(sliced.down, layer.down[:3])
        np.testing.assert_array_equal(sliced.up, layer.up[:, :5])


def test_dot_has_the_dtype_of_x_and_accumulates_in_float32():
    # 257 = 256 + 1 is no bfloat16: a bfloat16 accumulator would lose every 1 after 256.
    x = jnp.ones((1, 512), jnp.bfloat16)
    result = dot(x, jnp.ones((512, 1), jnp.float32))
    assert result.dtype == jnp.bfloat16 and result.tolist() == [[512.0]]


def test_structured_kernels_pass_jit_vmap_and_grad():
    kernel = KERNELS["sum"][0]
    assert isinstance(kernel, Weight) and not isinstance(BASE, Weight)
    gradient = jax.jit(jax.grad(lambda k: dot(X, k).sum()))(kernel)
    # d/dBASE = x^T [1, 1]; d/ddown = x^T ([1, 1] up^T) = x^T * 1.5; d/dup = (x down) [1, 1] = 14.
    assert gradient.terms[0].tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert gradient.terms[1].down.tolist() == [[1.5], [3.0], [4.5]]
    assert gradient.terms[1].up.tolist() == [[14.0, 14.0]]
    assert jax.vmap(dot, in_axes=(0, None))(X, kernel).tolist() == [[18.0, 12.0]]
