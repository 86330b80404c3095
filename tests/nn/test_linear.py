"""Projections and embeddings against hand-computed values, and what they accept in place of a kernel."""

import jax
import jax.numpy as jnp
import pytest

from research.errors import UserError
from research.nn.linear import Embedding, Linear
from research.nn.weights import LowRank


def test_linear_by_hand():
    params = {"kernel": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.asarray([0.5, -0.5])}
    y = Linear(2, use_bias=True).apply({"params": params}, jnp.asarray([[1.0, -1.0]]))
    # [1 - 3 + 0.5, 2 - 4 - 0.5]
    assert y.tolist() == [[-1.5, -2.5]]


def test_initial_scale_is_the_inverse_root_of_the_inputs():
    params = Linear(256, init_scale=4.0).init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    assert params["kernel"].dtype == jnp.float32 and "bias" not in params
    # variance 4 / 64: deviation 0.25; 16384 draws give it to 0.25 / sqrt(2 * 16384) = 0.0014.
    assert float(params["kernel"].std()) == pytest.approx(0.25, abs=0.006)


def test_a_structured_or_narrower_kernel_is_used_as_it_is():
    x = jnp.asarray([[1.0, 2.0]])
    low = LowRank(jnp.asarray([[1.0], [1.0]]), jnp.asarray([[1.0, 10.0]]))
    assert Linear(2).apply({"params": {"kernel": low}}, x).tolist() == [[3.0, 30.0]]
    narrow = {"kernel": jnp.asarray([[1.0], [1.0]]), "bias": jnp.asarray([4.0])}
    assert Linear(2, use_bias=True).apply({"params": narrow}, x).tolist() == [[7.0]]


def test_a_kernel_of_other_inputs_is_named():
    class Two(Linear):
        pass

    with pytest.raises(UserError, match="kernel takes 3 inputs, but its input is 2 wide"):
        Two(4).apply({"params": {"kernel": jnp.ones((3, 4))}}, jnp.ones((1, 2)))


def test_embedding_multiplies_and_its_head_does_not():
    table = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    embedding = Embedding(3, 2, multiplier=2.0)
    variables = {"params": {"table": table}}
    assert embedding.apply(variables, jnp.asarray([2, 0])).tolist() == [[10.0, 12.0], [2.0, 4.0]]
    logits = embedding.apply(variables, jnp.asarray([[1.0, 1.0]], jnp.bfloat16), method="attend")
    assert logits.tolist() == [[3.0, 7.0, 11.0]] and logits.dtype == jnp.float32
