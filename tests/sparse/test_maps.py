"""Attention maps by a case done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.masks import Window
from research.nn.mlp import GatedMLP
from research.nn.transformer import Block, scan_params
from research.sparse.maps import attention_maps
from research.ssm.mamba2 import Mamba2
from tests.programs import drawn


def decoder(*mixers, **fields) -> DecoderLM:
    blocks = tuple(Block(mixer, GatedMLP(4)) for mixer in mixers)
    return DecoderLM(vocab_size=8, width=4, max_length=8, num_layers=2, blocks=blocks, **fields)


def test_what_heads_see():
    model = decoder(Attention(2, 2, 1), Attention(2, 2, rule=Window((1, 2))))
    tokens = jnp.asarray([[3, 1, 4, 1]])
    params = drawn(model, tokens)
    maps = attention_maps(model, params, tokens)
    assert list(maps) == [0, 1] and maps[0].shape == (1, 2, 4, 4)
    for found in maps.values():
        np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-6)
    assert (np.triu(maps[0][0, 0], 1) == 0).all() and (np.tril(maps[0]) == maps[0]).all()
    # Head 0 of the second layer sees itself alone, head 1 the token before it too.
    np.testing.assert_array_equal(maps[1][0, 0], np.eye(4))
    assert ((maps[1][0, 1] > 0) == (np.eye(4) + np.eye(4, k=-1) > 0)).all()
    # Without queries all scores are 0: token i looks at i + 1 tokens alike.
    params = jax.tree.map(lambda x: x, params)
    params["layer_0"]["attention"]["query"]["kernel"] *= 0
    expected = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    np.testing.assert_allclose(attention_maps(model, params, tokens)[0][0, 1], expected, rtol=1e-6)
    scanned = attention_maps(model.clone(scan_layers=True), scan_params(params, 2), tokens)
    np.testing.assert_allclose(scanned[0][0, 1], expected, rtol=1e-6)


def test_nothing_to_see():
    model = decoder(Mamba2(num_heads=1, head_dim=4, state_dim=2))
    with pytest.raises(UserError, match=r"no layer of this model is Attention \(Mamba2\)"):
        attention_maps(model, {"layer_0": {}, "layer_1": {}}, jnp.zeros((1, 2), jnp.int32))
