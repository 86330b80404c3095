"""Drafters with the other parts."""

import jax
import jax.numpy as jnp
import numpy as np

from research.decoding.sampling import Sampling
from research.nn.masks import Causal, Window
from research.nn.norm import RMSNorm
from research.nn.transformer import scan_params
from research.nn.weights import LowRank

from .cells import DRAFTERS, decoder, drafted_as_plain, init, louder, runs

for _name in DRAFTERS:

    @runs(
        _name,
        "window cache, soft caps and post-norms (Gemma)",
        "behind a ring that has wrapped, the tokens of plain decoding",
    )
    def _(_, name=_name):
        attention = dict(softcap=20.0, num_kv_heads=1)
        model = decoder(
            (Window(4), Causal()),
            attention=attention,
            post_norms=True,
            norm=RMSNorm(unit_offset=True),
            logit_softcap=30.0,
        )
        drafted_as_plain(name, model, louder(init(model)))

    @runs(_name, "low-rank target", "kernels of rank 2 in attention and FFN: the tokens of plain decoding")
    def _(_, name=_name):
        model = decoder(num_layers=2)
        params = jax.tree.map(np.asarray, louder(init(model)))
        for layer in ("layer_0", "layer_1"):
            for part, names in (("attention", ("query", "output")), ("mlp", ("up", "down"))):
                for kernel in names:
                    left, values, right = np.linalg.svd(
                        params[layer][part][kernel]["kernel"], full_matrices=False
                    )
                    low = LowRank(jnp.asarray(left[:, :2] * values[:2]), jnp.asarray(right[:2]))
                    params[layer][part][kernel] = {"kernel": low}
        drafted_as_plain(name, model, params)


@runs("Medusa", "scanned target", "unrolled when it is decoded: the tokens of plain decoding")
def _(_):
    model = decoder(num_layers=2)
    params = scan_params(louder(init(model)), 1)
    drafted_as_plain("Medusa", model.clone(scan_layers=True), params)


@runs("ADED", "sampling with a repetition penalty", "the tokens of plain sampling with the same seed")
def _(_):
    model = decoder()
    options = dict(sampling=Sampling(0.9, top_p=0.9, repetition_penalty=1.3), seed=2)
    drafted_as_plain("ADED", model, louder(init(model)), **options)
