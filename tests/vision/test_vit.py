"""The ViT: pooling, permutation, and the forms that are the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.transformer import Block, scan_params
from research.training.partitioning import batch_sharding, make_mesh, parameter_shardings
from research.vision.vit import ViT
from tests.programs import drawn

IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 4, 3))


def make(**fields):
    attention = Attention(num_heads=2, head_dim=4, rule=Full(), use_bias=True, output_bias=True)
    block = Block(attention, MLP(16), LayerNorm())
    return ViT(blocks=(block,), num_layers=2, num_classes=5, width=8, patch=2, **fields)


def init(model):
    return drawn(model, IMAGES, seed=1)


def run(model, params, images=IMAGES, method=None):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))(params, images)


def close(a, b):
    # Values of order 1 after two layers of sums of at most 16 terms.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_parameters():
    params = init(make(pool="class"))
    # 8 x 4 pixels in patches of 2 x 2 pixels of 3 channels: 8 patches of 12 numbers, and the class token.
    assert jax.tree.map(jnp.shape, params["patch_embedding"]) == {
        "projection": {"kernel": (12, 8), "bias": (8,)},
        "class_token": (1, 8),
        "positions": (9, 8),
    }
    assert jax.tree.map(jnp.shape, params["head"]) == {"kernel": (8, 5), "bias": (5,)}
    assert "class_token" not in init(make())["patch_embedding"]


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_pooling(pool):
    model = make(pool=pool)
    params = init(model)
    features = run(model, params, method="features")
    assert features.shape == (4, 9 if pool == "class" else 8, 8)
    pooled = features[:, 0] if pool == "class" else features.mean(1)
    logits = run(model, params)
    close(logits, pooled @ params["head"]["kernel"] + params["head"]["bias"])
    assert logits.dtype == jnp.float32


def test_without_positions_the_order_of_patches_is_lost():
    model = make()
    params = init(model)
    blind = {**params, "patch_embedding": {**params["patch_embedding"], "positions": jnp.zeros((8, 8))}}
    # Rows of patches swapped: whole 2-pixel bands of the image.
    swapped = IMAGES.reshape(4, 4, 2, 4, 3)[:, jnp.asarray([2, 0, 3, 1])].reshape(IMAGES.shape)
    close(run(model, blind, swapped), run(model, blind))
    assert not np.allclose(run(model, params, swapped), run(model, params), atol=1e-4)


def test_other_forms_are_the_same_function():
    model = make()
    params = init(model)
    logits = run(model, params)
    close(run(model.clone(scan_layers=True), scan_params(params, 1)), logits)
    close(run(model.clone(token_layout="batched"), params), logits)
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    spread = jax.device_put(params, parameter_shardings(params, mesh, ((r"head/", ()),)))
    close(run(model, spread, jax.device_put(IMAGES, batch_sharding(mesh))), logits)
