"""Mamba-2 against attention as the context grows, and against Mamba-2 of `transformers` on the same weights.

- context: one decoding step, batch 1, behind 1k to 128k tokens, of a decoder with attention and of one with Mamba-2
  mixers of about as many parameters. Caches are updated in place, as the decoding loop does it. Attention reads its
  cache and grows with it; a state has one size.
- prefill: a prompt into logits and states, compiled, against a forward with `use_cache` of `transformers`, whose plain
  path is what runs without its CUDA kernels.
- decode: `Generator.generate`, greedy, against `generate`; both sides must emit the same tokens.

Float32. Ratios above 1 mean that this project is faster.
"""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.contender import PAUSE
from experiments.bench.decode import peer_generate
from research.decoding.generator import Generator
from research.errors import UserError
from research.interop.huggingface import save
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.ssm.mamba2 import Mamba2

WIDTH, LAYERS, VOCAB = 128, 2, 256
CONTEXTS = (1024, 4096, 16384, 65536, 131072)
PROMPTS = (256, 1024, 4096)
PROMPT, NEW_TOKENS = 32, 64
CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Row:
    """Seconds of both sides, one of each for every round. In `context` the baseline is attention.

    `ratio` compares medians and `best_ratio` the best rounds, baseline over ours: above 1 ours is faster.
    """

    kind: str
    length: int
    seconds: tuple[float, ...]
    baseline: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(self.baseline) / statistics.median(self.seconds)

    @property
    def best_ratio(self) -> float:
        return min(self.baseline) / min(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio, "best_ratio": self.best_ratio}

    def line(self, other: str) -> str:
        ours, theirs = (1e3 * statistics.median(x) for x in (self.seconds, self.baseline))
        ratios = f"{self.ratio:.2f}x (best turns {self.best_ratio:.2f}x)"
        return f"{self.kind} {self.length:>6}: {ours:9.2f} ms, {other} {theirs:9.2f} ms: {ratios}"


def run(
    contexts: Sequence[int] = CONTEXTS,
    prompts: Sequence[int] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
    rounds: int = 5,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Measure everything and report a line for each number. Without `transformers`, its part is left out aloud."""
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    report(f"Mamba-2, {LAYERS} layers of width {WIDTH}, float32; {load}")
    rows = []
    for length in contexts:
        steps = {name: _step(*random_model(name, length + 16), length) for name in ("mamba2", "attention")}
        seconds = _turns(steps, rounds)
        rows.append(Row("context", length, seconds["mamba2"], seconds["attention"]))
        report(rows[-1].line("attention"))
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        report(f"transformers: not compared, {error}; install .[parity]")
        return rows
    model, params = random_model("mamba2", max((*prompts, PROMPT)) + new_tokens)
    peer = peer_model(model, params)
    for length in prompts:
        rows.append(_prefill(model, params, peer, length, rounds))
        report(rows[-1].line("transformers"))
    rows.append(_decode(model, params, peer, new_tokens, rounds))
    report(f"{rows[-1].line('transformers')}, tokens equal")
    return rows


def random_model(kind: str, length: int) -> tuple[DecoderLM, Any]:
    """A decoder and parameters without training: "mamba2" with an inner width of twice the model's and no FFN, or
    "attention" with an FFN that makes about as many."""
    if kind == "mamba2":
        mixer = Mamba2(num_heads=WIDTH // 32, head_dim=64, state_dim=64, chunk=CHUNK)
        block = Block(mixer, None, RMSNorm(mixer.norm_eps))
    else:
        block = Block(Attention(WIDTH // 32, 32, rotary=Rotary()), GatedMLP(WIDTH))
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
    return model, init(jax.random.key(0))


def peer_model(model: DecoderLM, params: Any) -> Any:
    """`transformers` Mamba-2 with these weights, through the files that this project exports."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        save(model, {"params": params}, Path(directory) / "model")
        return AutoModelForCausalLM.from_pretrained(Path(directory) / "model").eval()


def _step(model: DecoderLM, params: Any, length: int) -> Callable[[], None]:
    """One more token behind `length`; the same length again in every call."""

    def call(params: Any, token: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        logits, _, fresh = model.apply({"params": params}, token, cache, method="extend")
        token = jnp.argmax(logits[:, -1:], axis=-1)
        # Tokens are never negative; that the count depends on one orders the update after its reads: see `Engine`.
        after = cache.commit(fresh, None, 1 + jnp.minimum(token[:, 0], 0))
        return token, after.replace(length=cache.length)

    cache = model.init_cache(1, length + 16).replace(length=jnp.asarray([length]))
    state = [jnp.zeros((1, 1), jnp.int32), cache]
    program = jax.jit(call, donate_argnums=2).lower(params, *state).compile()

    def step() -> None:
        state[:] = jax.block_until_ready(program(params, *state))

    return step


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
    seconds = _turns({"ours": lambda: jax.block_until_ready(program(params, ids)), "theirs": theirs}, rounds)
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
    seconds = _turns({"ours": ours, "theirs": theirs}, rounds)
    return Row("decode", new_tokens, seconds["ours"], seconds["theirs"])


def _turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, ...]]:
    """Seconds of each call, for every round, the first of which is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: tuple(times) for name, times in seconds.items()}
