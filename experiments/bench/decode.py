"""Decoding speed against `transformers` `generate`, with the same weights, in alternating runs of one
process.

Prompt of 32 tokens, 128 new ones, greedy, float32; every run includes prefill. Two shapes: 1M parameters with
a vocabulary of 256 and 40M with one of 4096, both of the Llama family with an untied head. The bandwidth
column is the rate at which decoding reads its weights (the embedding table apart, of which one row is read)
over the rate at which this machine sums a large array; weights that fit into the processor's cache can exceed
it.
"""

import dataclasses
import functools
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.peak import memory_bandwidth
from experiments.bench.shapes import SHAPES, Shape, make_decoder
from experiments.bench.turns import take_turns
from research.decoding.generator import Generator
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.accounting import count_parameters

PROMPT, NEW = 32, 128
BATCHES = (1, 8)


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens per second of this project and of `transformers`, medians and best runs, and what they read a
    second.

    `ratio` compares medians, `best_ratio` best runs; `bandwidth_fraction` is of the best run; `equal` says
    whether both emitted the same tokens.
    """

    shape: str
    parameters: int
    batch: int
    median: float
    best: float
    peer_median: float
    peer_best: float
    bandwidth_fraction: float
    equal: bool

    @property
    def ratio(self) -> float:
        return self.median / self.peer_median

    @property
    def best_ratio(self) -> float:
        return self.best / self.peer_best

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio, "best_ratio": self.best_ratio}


def run(
    shapes: Sequence[Shape] = (SHAPES["1M"], SHAPES["40M"]),
    batches: Sequence[int] = BATCHES,
    rounds: int = 5,
    new_tokens: int = NEW,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Measure every shape and batch, report a line for each.

    Raises:
        UserError: torch or transformers is not installed.
    """
    bandwidth = memory_bandwidth()
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    memory = f"memory {bandwidth / 1e9:.1f} GB/s"
    report(f"decoding, {PROMPT} + {new_tokens} tokens, float32, greedy; {memory}, {load}")
    rows = []
    for shape in shapes:
        model, params = random_model(shape, PROMPT + new_tokens)
        generator = Generator(model, params)
        peer = functools.partial(peer_generate, peer_model(shape, params, PROMPT + new_tokens))
        for batch in batches:
            row = _measure(shape, params, generator, peer, batch, rounds, new_tokens, bandwidth)
            rows.append(row)
            report(
                f"{shape.name:>4} batch {batch}: {row.median:8.0f} tokens/s, "
                f"transformers {row.peer_median:8.0f}: {row.ratio:.2f}x (best runs {row.best_ratio:.2f}x), "
                f"{row.bandwidth_fraction:.0%} of memory bandwidth, "
                f"tokens {'equal' if row.equal else 'DIFFER'}"
            )
    return rows


def _measure(
    shape: Shape,
    params: Any,
    generator: Generator,
    peer: Callable[[np.ndarray, int], np.ndarray],
    batch: int,
    rounds: int,
    new_tokens: int,
    bandwidth: float,
) -> Row:
    prompts = np.random.default_rng(0).integers(0, shape.vocab, (batch, PROMPT))
    calls = {
        "ours": functools.partial(generator.generate, prompts.tolist(), max_new_tokens=new_tokens),
        "theirs": functools.partial(peer, prompts, new_tokens),
    }
    seconds = take_turns(calls, rounds)
    outputs = {name: call() for name, call in calls.items()}
    total = count_parameters(params)
    streamed = 4 * (total - shape.vocab * shape.width)
    work = batch * new_tokens
    return Row(
        shape=shape.name,
        parameters=total,
        batch=batch,
        median=work / statistics.median(seconds["ours"]),
        best=work / min(seconds["ours"]),
        peer_median=work / statistics.median(seconds["theirs"]),
        peer_best=work / min(seconds["theirs"]),
        bandwidth_fraction=streamed * new_tokens / min(seconds["ours"]) / bandwidth,
        equal=[sample.tokens for sample in outputs["ours"].samples] == outputs["theirs"].tolist(),
    )


def random_model(shape: Shape, length: int) -> tuple[DecoderLM, Any]:
    """The shape with an untied head, and parameters without training."""
    model = make_decoder(shape, length, tied_head=False)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
    return model, init(jax.random.key(0))


def peer_model(shape: Shape, params: Any, length: int) -> Any:
    """`transformers` Llama with these weights. Raises UserError where it is not installed."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError(
            f"the decoding benchmark compares with transformers: {error}; install .[parity]"
        ) from error
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=length,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).eval()

    def tensor(kernel: jax.Array) -> Any:
        return torch.from_numpy(np.array(kernel).T.copy())

    state = {
        "model.embed_tokens.weight": torch.from_numpy(np.array(params["embedding"]["table"])),
        "model.norm.weight": torch.from_numpy(np.array(params["final_norm"]["scale"])),
        "lm_head.weight": tensor(params["head"]["kernel"]),
    }
    for i in range(shape.layers):
        layer, prefix = params[f"layer_{i}"], f"model.layers.{i}"
        state[f"{prefix}.input_layernorm.weight"] = torch.from_numpy(
            np.array(layer["attention_norm"]["scale"])
        )
        state[f"{prefix}.post_attention_layernorm.weight"] = torch.from_numpy(
            np.array(layer["mlp_norm"]["scale"])
        )
        for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "o"}.items():
            state[f"{prefix}.self_attn.{theirs}_proj.weight"] = tensor(layer["attention"][ours]["kernel"])
        for name in ("gate", "up", "down"):
            state[f"{prefix}.mlp.{name}_proj.weight"] = tensor(layer["mlp"][name]["kernel"])
    model.load_state_dict(state)
    return model


def peer_generate(model: Any, prompts: np.ndarray, new_tokens: int, **options: Any) -> np.ndarray:
    """Greedy `generate` of a peer: prompts [B, T] -> new tokens [B, new]."""
    import torch

    inputs = torch.from_numpy(prompts)
    with torch.inference_mode():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            **options,
        )
    return output[:, prompts.shape[1] :].numpy()
