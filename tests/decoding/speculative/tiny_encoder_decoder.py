"""A tiny encoder-decoder with random parameters, and the drafter's network that goes with it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from research.language.encoder_decoder import Encoder, EncoderDecoder
from research.nn.attention import Attention
from research.nn.cross_attention import CrossAttention, CrossBlock
from research.nn.masks import Causal, Full
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from tests.programs import drawn

VOCAB = 37
SOURCES = [[5, 9, 3], list(range(20, 36)), [7]]  # unequal lengths


def network(vocab_size: int = VOCAB, rule: Any = Causal()) -> EncoderDecoder:  # noqa: B008 (frozen)
    sizes = dict(num_heads=2, head_dim=8, rotary=Rotary())
    block = CrossBlock(Attention(rule=rule, **sizes), GatedMLP(24), cross_attention=CrossAttention(**sizes))
    encoder = Encoder(blocks=(Block(Attention(rule=Full(), **sizes), GatedMLP(24)),), num_layers=1)
    return EncoderDecoder(
        encoder=encoder,
        blocks=(block,),
        num_layers=1,
        vocab_size=vocab_size,
        width=16,
        source_length=16,
        max_length=24,
        tied_head=False,
    )


@functools.cache
def tiny_encoder_decoder() -> tuple[EncoderDecoder, Any]:
    model = network()
    params = drawn(model, jnp.zeros((1, 2), jnp.int32), seed=1)
    return model, jax.tree.map(lambda x: x * 2.0, params)  # sharper logits: outputs that vary
