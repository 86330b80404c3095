"""Patches in reading order, and what is learned with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.nn.patch import PatchEmbedding, patchify, windows


def test_patches_are_row_major():
    # 2 x 4 pixels of 2 channels, numbered: patch 0 holds columns 0 and 1, patch 1 columns 2 and 3.
    image = jnp.arange(16).reshape(1, 2, 4, 2)
    assert patchify(image, 2).tolist() == [[[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]]


def test_embedding_by_hand():
    image = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    params = {
        "projection": {"kernel": jnp.asarray([[1.0, 10.0]]), "bias": jnp.asarray([0.5, 0.0])},
        "class_token": jnp.asarray([[7.0, 7.0]]),
        "positions": jnp.arange(5.0)[:, None] * jnp.asarray([[100.0, 0.0]]),
    }
    y = PatchEmbedding(1, 2, class_token=True).apply({"params": params}, image)
    # The class token first, at position 0; then pixel p at position i: [p + 0.5 + 100 i, 10 p].
    assert y[0].tolist() == [[7.0, 7.0], [101.5, 10.0], [202.5, 20.0], [303.5, 30.0], [404.5, 40.0]]


def test_sizes_that_do_not_fit_are_told():
    with pytest.raises(UserError, match="images of 3x4 pixels don't divide into patches of 2x2"):
        patchify(jnp.zeros((1, 3, 4, 1)), 2)
    embedding = PatchEmbedding(2, 4)
    variables = embedding.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    assert variables["params"]["positions"].shape == (4, 4)
    with pytest.raises(UserError, match="holds 4 positions, the image has 8"):
        embedding.apply(variables, np.zeros((1, 4, 8, 1), "f"))


def test_windows_may_overlap():
    # 3 x 5 places, windows of 2 x 3 every 1 x 2: 2 x 2 of them.
    grid = np.arange(15).reshape(1, 3, 5, 1)
    assert windows(jnp.asarray(grid), (2, 3), (1, 2))[0].tolist() == [
        [0, 1, 2, 5, 6, 7],
        [2, 3, 4, 7, 8, 9],
        [5, 6, 7, 10, 11, 12],
        [7, 8, 9, 12, 13, 14],
    ]
    images = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    assert np.array_equal(windows(images, (2, 2), (2, 2)), patchify(images, 2))
