"""How a decoding step grows with the context: attention, what reads less of it, Mamba-2; Llama of `transformers`.

One step of a decoder, batch 1, greedy, float32, behind 1k to 128k tokens of an empty cache, which costs what a full one
does. All but Mamba-2 have the same weights:

- attention: reads its whole cache.
- tidal: TidalDecode (arXiv 2410.05076). Layers 0 to 2 of 8 and layer 5 read everything; layers 2 and 5 choose the 256
  tokens that the layers above them read.
- spans: a sink and a window a head, in rings, as a plan of MoA gives them (arXiv 2406.14909): a quarter of the heads
  sees 1024 tokens, the others 256. The size of such a cache does not depend on the context.
- mamba2: as many layers of Mamba-2 with about as many parameters.
- transformers: its Llama with the weights of `attention`. Its cache is copied in every step, as its `generate` does.

Caches of this project are updated in place, as its decoding loop does it.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.turns import Row, take_turns
from research.errors import UserError
from research.interop.huggingface import save
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.masks import Window
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.sparse.tidal import Tidal, tidal
from research.ssm.mamba2 import Mamba2

WIDTH, LAYERS, HEADS, VOCAB = 128, 8, 4, 256
CONTEXTS = (1024, 4096, 16384, 65536, 131072)
SELECTOR = Tidal(k=256, select=2, reselect=5)
SPANS = Window((1024 - 64, 256 - 64, 256 - 64, 256 - 64), sinks=64)
MARGIN = 1  # rows that a ring keeps to roll back


def run(
    contexts: Sequence[int] = CONTEXTS, rounds: int = 5, report: Callable[[str], None] = print
) -> list[Row]:
    """Measure and report a line for each number. Without `transformers`, its rows are left out aloud."""
    report(f"a decoding step, {LAYERS} layers of width {WIDTH}, float32; load {os.getloadavg()[0]:.1f}")
    peer = None
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        report(f"transformers: not compared, {error}; install .[parity]")
    else:
        peer = peer_model(*random_model("attention", max(contexts) + 16))
    rows = []
    for length in contexts:
        steps = {kind: step(*random_model(kind, length + 16), length) for kind in KINDS}
        if peer is not None:
            steps["transformers"] = peer_step(peer, length)
            check(steps["attention"](), steps["transformers"](), length)
        seconds = take_turns(steps, rounds)
        for kind in (*KINDS[1:], *(("transformers",) if peer is not None else ())):
            rows.append(Row(kind, length, seconds[kind], seconds["attention"]))
            report(rows[-1].line("attention"))
    return rows


def random_model(kind: str, length: int) -> tuple[DecoderLM, Any]:
    """A decoder of `kind`, one of KINDS, and parameters without training."""
    block = Block(Attention(HEADS, WIDTH // HEADS, rotary=Rotary()), GatedMLP(WIDTH), RMSNorm(1e-5))
    if kind == "mamba2":
        mixer = Mamba2(num_heads=HEADS, head_dim=64, state_dim=64)
        block = Block(mixer, None, RMSNorm(mixer.norm_eps))
    elif kind == "spans":
        block = block.clone(attention=block.attention.clone(rule=SPANS))
    model = DecoderLM(
        blocks=(block,),
        num_layers=LAYERS,
        vocab_size=VOCAB,
        width=WIDTH,
        max_length=length,
        final_norm=RMSNorm(1e-5),
        tied_head=False,
    )
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"])
    params = init(jax.random.key(0))
    return tidal(model, params, SELECTOR) if kind == "tidal" else (model, params)


KINDS = ("attention", "tidal", "spans", "mamba2")


def step(model: DecoderLM, params: Any, length: int) -> Callable[[], np.ndarray]:
    """One more token behind `length`, the same length again in every call; returns the logits float32[vocabulary]."""

    def call(params: Any, token: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        logits, _, fresh = model.apply({"params": params}, token, cache, method="extend")
        # Logits are never below -1e30; that the count depends on them orders the update after its reads: see `Engine`.
        count = 1 - (jnp.max(logits[:, -1], axis=-1) < -1e30).astype(jnp.int32)
        after = cache.commit(fresh, None, count)
        return logits[0, -1], after.replace(length=cache.length)

    token = jnp.zeros((1, 1), jnp.int32)
    cache = [model.init_cache(1, length + 16, margin=MARGIN).replace(length=jnp.asarray([length]))]
    program = jax.jit(call, donate_argnums=2).lower(params, token, cache[0]).compile()

    def run() -> np.ndarray:
        logits, cache[0] = program(params, token, cache[0])
        return np.asarray(logits)

    return run


def peer_model(model: DecoderLM, params: Any) -> Any:
    """`transformers` Llama with these weights, through the files that this project exports."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        save(model, {"params": params}, Path(directory) / "model")
        return AutoModelForCausalLM.from_pretrained(Path(directory) / "model").eval()


def peer_step(peer: Any, length: int) -> Callable[[], np.ndarray]:
    """As `step`, of the peer: a cache of zeros, cut back after every call."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=peer.config)
    empty = torch.zeros(1, HEADS, length, WIDTH // HEADS)
    for layer in range(LAYERS):
        cache.update(empty.clone(), empty.clone(), layer)
    token = torch.zeros(1, 1, dtype=torch.long)

    def run() -> np.ndarray:
        with torch.inference_mode():
            logits = peer(token, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits[0, -1].float().numpy()

    return run


def check(ours: np.ndarray, theirs: np.ndarray, length: int) -> None:
    """Raise UserError if the same weights and cache give other logits."""
    gap = np.abs(ours - theirs).max()
    if not gap < 1e-3:
        raise UserError(f"a step behind {length} tokens: the logits differ from transformers' by {gap:.1e}")
