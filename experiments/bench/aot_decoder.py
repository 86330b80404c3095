"""A decoder that uses the kernels, as programs to compile: one step of decoding, and one of training.

A hybrid of two layers of width 2048: attention and a mixture of experts, Mamba-2 and a gated FFN, whose weights have 4
bits in decoding. Some parts ask for the backend when they are traced, so all choices are made here.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from kernels_pallas.quantized_matmul import Packed, dequantize, pack, quantized_matmul
from research.language.decoder import DecoderLM
from research.moe.grouped import PallasGroupedDot
from research.moe.layer import MoE
from research.nn.attention import Attention
from research.nn.attention_kernels import SpanAttention, TreeAttention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.ssm.mamba2 import Mamba2
from research.ssm.ssd import PallasScan
from research.training.optimizers import adamw, constant
from research.training.task import LanguageModelling

WIDTH, VOCAB = 2048, 32768
SEQUENCES, SLOTS = 8, 4096  # of the cache
BATCH, LENGTH = 2, 1024  # of training


class Quantized(struct.PyTreeNode):
    """A kernel [in, out] of few bits, as the models multiply by it (`research.nn.weights`)."""

    packed: Packed
    implementation: str = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.packed.scale.dtype

    def dot(self, x: jax.Array) -> jax.Array:
        return quantized_matmul(x, self.packed, implementation=self.implementation)

    def materialize(self) -> jax.Array:
        return dequantize(self.packed).astype(self.dtype)

    def narrow(self, inputs: int | None, outputs: int | None) -> jax.Array:
        return self.materialize()[:inputs, :outputs]


def _quantized(kernel: jax.ShapeDtypeStruct, implementation: str, group: int = 128) -> Quantized:
    """The shapes of a kernel's 4 bits."""
    rows, columns = kernel.shape

    def packed() -> Packed:
        scale = jnp.zeros((rows // group, columns), kernel.dtype)
        return pack(jnp.zeros((rows, columns), jnp.uint8), scale, scale, bits=4)

    return Quantized(jax.eval_shape(packed), implementation)


def decoder(implementation: str) -> DecoderLM:
    attention = Attention(
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        rotary=Rotary(),
        kernel=SpanAttention(implementation),
        cached_kernel=TreeAttention(implementation),
    )
    experts = MoE(8, 2, 1024, dispatch="sorted", grouped_dot=PallasGroupedDot(implementation))
    mamba = Mamba2(num_heads=64, head_dim=64, state_dim=128, scan=PallasScan(implementation))
    blocks = (Block(attention, experts), Block(mamba, GatedMLP(hidden_dim=4096)))
    return DecoderLM(
        blocks=blocks,
        num_layers=2,
        vocab_size=VOCAB,
        width=WIDTH,
        max_length=SLOTS,
        token_layout="batched",
    )


def programs(implementation: str) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """(title, function, shapes of its arguments)."""
    model = decoder(implementation)
    task = LanguageModelling(model, compute_dtype="bfloat16")
    # Parameters do not depend on the kernels; making them would run one.
    params = jax.eval_shape(task.init, jax.random.key(0))
    served = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    mlp = served["layer_1"]["mlp"]
    mlp = {name: {"kernel": _quantized(part["kernel"], implementation)} for name, part in mlp.items()}
    served = served | {"layer_1": served["layer_1"] | {"mlp": mlp}}
    cache = jax.eval_shape(lambda: model.init_cache(SEQUENCES, SLOTS, jnp.bfloat16))
    tokens = jax.ShapeDtypeStruct((SEQUENCES, 1), jnp.int32)

    def decode(params: Any, cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        logits, _, fresh = model.apply({"params": params}, tokens, cache, method="extend")
        first = jnp.zeros((SEQUENCES, 1), jnp.int32)
        cache = cache.commit(fresh, first, jnp.ones(SEQUENCES, jnp.int32))
        return jnp.argmax(logits, axis=-1), cache

    yield (
        f"decode: a token for {SEQUENCES} sequences, {SLOTS} slots, bfloat16 and 4 bits",
        decode,
        (served, cache, tokens),
    )

    rule = adamw(constant(1e-3)).transformation(1000, params, "aot")
    state = jax.eval_shape(rule.init, params)
    numbers = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    batch = {name: numbers for name in ("tokens", "targets", "segments", "positions", "target_bytes")}
    batch["weights"] = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.float32)

    def train(params: Any, state: Any, batch: dict[str, jax.Array]) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            total, weight = task.loss(params, batch, jax.random.key(0))["loss"]
            return total / weight

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = rule.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    title = f"training: a step of {BATCH} x {LENGTH} tokens, bfloat16 with float32 masters, AdamW"
    yield title, train, (params, state, batch)
