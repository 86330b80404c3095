"""Compressed caches, merged models and coded experts with the other parts."""

import jax
import numpy as np

from research.compression import merging
from research.compression.chain import Subject
from research.compression.gear import Gear, with_cache
from research.compression.qmoe import QMoE
from research.elastic.matformer import extract
from research.elastic.slicing import ElasticSpec
from research.sparse.tidal import Tidal, tidal

from .cells import KEY, decoder, drafted_as_plain, init, louder, refused, runs
from .moe import jetmoe
from .quantized import int4
from .sparse import dropping

# Factors of full rank lose nothing, so that tokens can be compared; chunks are compressed all the same.
FULL = Gear(bits=2, group=4, rank=4, buffer=8)


@runs(
    "GEAR",
    "tree decoding (Medusa), int4 weights, grouped queries",
    "with factors of full rank the tokens of plain decoding, in a batch, over several chunks",
)
def _(_):
    model = decoder(attention=dict(num_kv_heads=1))
    drafted_as_plain("Medusa", *with_cache(model, int4(init(model)), FULL))


@refused("GEAR", "TidalDecode", "no layer of this model has a cache that could be compressed")
def _(_):
    model = decoder(num_layers=2)
    with_cache(*tidal(model, init(model), Tidal(3, select=0)), FULL)


@refused("GEAR", "Dynamic-LLaVA", "keeps the others as they are, not in a GearCache")
def _(_):
    with_cache(*dropping(), FULL)


@runs("DARE, TIES", "MatFormer", "a slice of the merged model is the merge of the slices, exactly")
def _(_):
    model = decoder()
    base = init(model)
    tuned = [jax.tree.map(lambda x, s=s: x + s * np.sin(1 + x), base) for s in (0.1, -0.2)]

    def merged(base, models):
        changes = [merging.difference(one, base) for one in models]
        return merging.add(base, merging.ties(changes, trim=0.0))

    def cut(params):
        return extract(model, params, ElasticSpec((0,), (4,)))[1]

    jax.tree.map(
        np.testing.assert_array_equal, cut(merged(base, tuned)), merged(cut(base), list(map(cut, tuned)))
    )


@refused("DARE, TIES", "int4 weights", "merge first, compress afterwards")
def _(_):
    base = init(decoder())
    merging.dropped(int4(base), base, 0.5, KEY)


def coded():
    """A decoder of JetMoE's, every expert coded."""
    model = jetmoe()
    params = louder(init(model))
    return model, QMoE(feedback=False).compress(Subject(model, params, params))[0]


@runs(
    "QMoE",
    "JetMoE, tree decoding (Medusa)",
    "experts of attention and FFN coded, decoded where they are multiplied: the tokens of plain decoding",
)
def _(_):
    drafted_as_plain("Medusa", *coded())


@refused("QMoE", "a MatFormer slice", "words lie across the cut")
def _(_):
    model, params = coded()
    extract(model, params, ElasticSpec((0,), (4,)))
