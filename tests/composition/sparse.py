"""Sparse attention with the other parts."""

import jax
import numpy as np

from research.multimodal.dynamic_llava import Sparsity, dynamic
from research.nn.attention import Attention
from research.nn.masks import Full, Window
from research.nn.transformer import Block, unscan_layers
from research.sparse.globalcom2 import encode
from research.sparse.tidal import Tidal, tidal
from research.vision.vit import ViT
from tests.programs import drawn

from .cells import KEY, decoder, drafted_as_plain, init, louder, refused, runs
from .moe import momentum

# Tokens chosen by one layer for the layers above.


@runs(
    "TidalDecode",
    "MomentumSMoE, tree decoding with virtual rows (Hidden Transfer)",
    "every node chooses for itself, among slots and ancestors: the tokens of plain sparse decoding",
)
def _(_):
    drafted_as_plain("Hidden Transfer", *tidal(momentum(), louder(init(momentum())), Tidal(3, select=0)))


@refused("TidalDecode", "windows in all layers", "none attend to all tokens")
def _(_):
    model = decoder((Window(4),))
    tidal(model, init(model), Tidal(3, select=0))


# Tokens dropped for good.


def dropping():
    """A decoder that drops generated tokens above its first layer; the image is one token, which stays."""
    model = decoder(num_layers=2, attention=dict(num_kv_heads=1))
    sparsity = Sparsity((0, 1), layer=1, image_rate=1.0, width=8, heads=2, depth=1)
    made, params = dynamic(model, init(model), KEY, sparsity)
    return made, louder(params)


@runs(
    "Dynamic-LLaVA",
    "tree decoding (Medusa), grouped queries",
    "every node decides for itself, and dropped ones are seen by none above: the tokens of plain sparse decoding",
)
def _(_):
    drafted_as_plain("Medusa", *dropping())


@refused("Dynamic-LLaVA", "tree decoding with virtual rows (Hidden Transfer)", "no token to decide about")
def _(_):
    drafted_as_plain("Hidden Transfer", *dropping())


@runs("GlobalCom2", "an encoder of scanned layers", "scores and features are those of unrolled ones")
def _(_):
    block = Block(Attention(2, 4, rule=Full()), None)
    model = ViT(
        num_classes=2, width=8, patch=2, pool="class", blocks=(block,), num_layers=2, scan_layers=True
    )
    images = jax.random.normal(KEY, (1, 4, 4, 1))
    params = drawn(model, images)
    scanned, unrolled = encode(model, params, images), encode(*unscan_layers(model, params), images)
    for one, other in zip(scanned, unrolled, strict=True):
        np.testing.assert_array_equal(one, other)


@refused("GlobalCom2", "an encoder that pools its patches", "GlobalCom2 asks the class token")
def _(_):
    block = Block(Attention(2, 4, rule=Full()), None)
    model = ViT(num_classes=2, width=8, patch=2, blocks=(block,), num_layers=1)
    encode(model, {}, jax.numpy.zeros((1, 4, 4, 1)))
