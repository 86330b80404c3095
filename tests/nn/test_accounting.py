"""Costs against hand counts."""

import jax
import jax.numpy as jnp

from research.nn.accounting import count_bytes, count_flops, count_parameters


def test_a_product_costs_two_flops_per_multiply_and_add():
    a, b = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
    assert count_flops(lambda x, y: x @ y, a, b) == 2 * 3 * 5 * 7


def test_parameters_and_bytes_of_a_tree():
    tree = {"a": jnp.zeros((2, 3)), "b": {"c": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}}
    assert count_parameters(tree) == 2 * 3 + 5
    assert count_bytes(tree) == 2 * 3 * 4 + 5 * 2
