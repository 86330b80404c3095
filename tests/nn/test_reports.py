"""Reports of layers and what blocks carry through depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention, Context
from research.nn.mlp import GatedMLP
from research.nn.reports import apply_reporting, report_loss, report_measurement
from research.nn.transformer import Block, Stream, scan_params
from tests.programs import call

TOKENS = jnp.arange(10).reshape(2, 5)


class Reporting(nn.Module):
    """An FFN that adds one to its input and tells of it."""

    takes_context = True

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        report_loss(self, "size", jnp.float32(context.positions.size))
        report_measurement(self, "ones", jnp.ones(3), jnp.float32(2.0))
        return x + 1.0


class Counting(Block):
    """A block that carries through depth how many of its kind came before, and adds that to the states."""

    def init_depth(self, x: jax.Array) -> jax.Array:
        return jnp.zeros((*x.shape[:-1], 1), x.dtype)

    @nn.compact
    def __call__(self, stream, context, cache=None):
        x, fresh = Block.__call__(self, stream.x, context, cache)
        return Stream(x + stream.depth, stream.depth + 1.0), fresh


def model(blocks, **options) -> DecoderLM:
    return DecoderLM(vocab_size=10, width=8, max_length=16, num_layers=4, blocks=blocks, **options)


def block(kind=Block, mlp=None) -> Block:
    return kind(Attention(num_heads=2, head_dim=4), mlp or GatedMLP(hidden_dim=8))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("scan", [False, True])
def test_reports_are_counted_once_per_layer(scan, remat):
    decoder = model((block(mlp=Reporting()), block()), scan_layers=scan, remat=remat)
    params = decoder.init(jax.random.key(0), TOKENS)["params"]

    @jax.jit
    @jax.value_and_grad
    def run(params):
        _, losses, measured = apply_reporting(decoder, {"params": params}, TOKENS)
        assert sorted(measured) == ["layer_0/mlp/ones", "layer_2/mlp/ones"]
        assert measured["layer_2/mlp/ones"][0].shape == (3,)
        return losses["size"]

    assert run(params)[0] == 2 * TOKENS.size  # two of four layers


def test_nothing_is_kept_unasked():
    decoder = model((block(mlp=Reporting()),))
    variables = decoder.init(jax.random.key(0), TOKENS)
    assert isinstance(call(decoder, variables["params"], TOKENS), jax.Array)


def test_a_name_is_used_once():
    class Twice(Reporting):
        @nn.compact
        def __call__(self, x, context):
            report_loss(self, "size", jnp.float32(1))
            return Reporting.__call__(self, x, context)

    decoder = model((block(mlp=Twice()),))
    with pytest.raises(UserError, match="layer_0/mlp reports 'size' twice"):
        decoder.init(jax.random.key(0), TOKENS)


@pytest.mark.parametrize("layout", ["flat", "batched"])
def test_depth_is_carried_past_blocks_without_it(layout):
    """Layers 0 and 2 count: 0 before the first, 1 before the second, so layer 2 adds 1 to its states."""
    blocks = (block(Counting), block())
    counting = model(blocks, token_layout=layout)
    params = counting.init(jax.random.key(0), TOKENS)["params"]
    logits = call(counting, params, TOKENS)

    plain = model((block(),), token_layout=layout)

    class Adding(Block):
        @nn.compact
        def __call__(self, x, context, cache=None):
            x, fresh = Block.__call__(self, x, context, cache)
            return x + 1.0, fresh

    expected = model((block(), block(), block(Adding), block()), token_layout=layout)
    np.testing.assert_array_equal(logits, call(expected, params, TOKENS))
    assert not np.array_equal(logits, call(plain, params, TOKENS))
    scanned = counting.clone(scan_layers=True)
    np.testing.assert_allclose(call(scanned, scan_params(params, 2), TOKENS), logits, rtol=1e-5, atol=1e-5)
    cache = counting.init_cache(2, 8)
    stepped = call(counting, params, TOKENS, cache, method="extend")[0]
    np.testing.assert_allclose(stepped, logits, rtol=1e-5, atol=1e-5)
