"""Mamba-2 against Mamba-2 of `transformers` on the same weights.

- prefill: a prompt into logits and states, compiled, against a forward with `use_cache` of `transformers`, whose plain
  path is what runs without its CUDA kernels.
- decode: `Generator.generate`, greedy, against `generate`; both sides must emit the same tokens.

Float32. Ratios above 1 mean that this project is faster.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.decode import peer_generate
from experiments.bench.turns import Row, take_turns
from research.decoding.generator import Generator
from research.errors import UserError
from research.interop.huggingface import save
from research.language.decoder import DecoderLM
from research.nn.norm import RMSNorm
from research.nn.transformer import Block
from research.ssm.mamba2 import Mamba2

WIDTH, LAYERS, VOCAB = 128, 2, 256
PROMPTS = (256, 1024, 4096)
PROMPT, NEW_TOKENS = 32, 64
CHUNK = 64


def run(
    prompts: Sequence[int] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
    rounds: int = 5,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Measure and report a line for each number. Without `transformers` nothing is measured, aloud."""
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    report(f"Mamba-2, {LAYERS} layers of width {WIDTH}, float32; {load}")
    rows = []
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        report(f"transformers: not compared, {error}; install .[parity]")
        return rows
    model, params = random_model(max((*prompts, PROMPT)) + new_tokens)
    peer = peer_model(model, params)
    for length in prompts:
        rows.append(_prefill(model, params, peer, length, rounds))
        report(rows[-1].line("transformers"))
    rows.append(_decode(model, params, peer, new_tokens, rounds))
    report(f"{rows[-1].line('transformers')}, tokens equal")
    return rows


def random_model(length: int) -> tuple[DecoderLM, Any]:
    """A decoder and parameters without training, with an inner width of twice the model's and no FFN."""
    mixer = Mamba2(num_heads=WIDTH // 32, head_dim=64, state_dim=64, chunk=CHUNK)
    model = DecoderLM(
        blocks=(Block(mixer, None, RMSNorm(mixer.norm_eps)),),
        num_layers=LAYERS,
        vocab_size=VOCAB,
        width=WIDTH,
        max_length=length,
        final_norm=RMSNorm(1e-5),
        tied_head=False,
    )
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"])
    return model, init(jax.random.key(0))


def peer_model(model: DecoderLM, params: Any) -> Any:
    """`transformers` Mamba-2 with these weights, through the files that this project exports."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        save(model, {"params": params}, Path(directory) / "model")
        return AutoModelForCausalLM.from_pretrained(Path(directory) / "model").eval()


def _prefill(model: DecoderLM, params: Any, peer: Any, length: int, rounds: int) -> Row:
    import torch

    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, length))

    def read(params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        lengths = jnp.full(1, length)
        logits, _, fresh = model.apply({"params": params}, tokens, lengths, method="prefill")
        return logits, model.init_cache(1, length).commit(fresh, None, lengths)

    ids, inputs = jnp.asarray(tokens), torch.from_numpy(tokens)
    program = jax.jit(read).lower(params, ids).compile()

    def theirs() -> Any:
        with torch.inference_mode():
            return peer(inputs, use_cache=True, logits_to_keep=1)

    gap = np.abs(program(params, ids)[0] - theirs().logits[:, -1].numpy()).max()
    if gap > 1e-3:
        raise UserError(
            f"prefill of {length} tokens: the logits differ from those of transformers by {gap:.1e}"
        )
    seconds = take_turns(
        {"ours": lambda: jax.block_until_ready(program(params, ids)), "theirs": theirs}, rounds
    )
    return Row("prefill", length, seconds["ours"], seconds["theirs"])


def _decode(model: DecoderLM, params: Any, peer: Any, new_tokens: int, rounds: int) -> Row:
    prompts = np.random.default_rng(0).integers(0, VOCAB, (1, PROMPT))
    generator = Generator(model, params)
    options = dict(eos_token_id=None, pad_token_id=0)

    def ours() -> list[list[int]]:
        result = generator.generate(prompts.tolist(), max_new_tokens=new_tokens)
        return [sample.tokens for sample in result.samples]

    def theirs() -> np.ndarray:
        return peer_generate(peer, prompts, new_tokens, **options)

    if ours() != theirs().tolist():
        raise UserError(f"decoding {new_tokens} tokens: transformers emits others with the same weights")
    seconds = take_turns({"ours": ours, "theirs": theirs}, rounds)
    return Row("decode", new_tokens, seconds["ours"], seconds["theirs"])
