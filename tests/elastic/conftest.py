"""A tiny decoder task, its batch, and a classification task, for the tests of nested models."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.masks import Causal, Full, Window
from research.nn.mlp import MLP, GatedMLP
from research.nn.norm import LayerNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.task import Classification, LanguageModelling
from research.vision.vit import ViT
from tests.programs import drawn_like

VOCAB, WIDTH, HIDDEN, LENGTH = 32, 8, 16, 6


def decoder(num_layers=3, pattern=1, mlp=None, **fields) -> DecoderLM:
    """`pattern` 1: causal layers; 3: local, local, global."""
    attention = Attention(num_heads=2, head_dim=4, rotary=Rotary())
    rules = (Window(2), Window(2), Causal()) if pattern == 3 else (Causal(),)
    blocks = tuple(Block(attention.clone(rule=rule), mlp or GatedMLP(HIDDEN)) for rule in rules)
    return DecoderLM(
        blocks=blocks, num_layers=num_layers, vocab_size=VOCAB, width=WIDTH, max_length=32, **fields
    )


def vit() -> ViT:
    attention = Attention(num_heads=2, head_dim=4, rule=Full(), use_bias=True, output_bias=True)
    block = Block(attention, MLP(HIDDEN), LayerNorm())
    return ViT(blocks=(block,), num_layers=2, num_classes=3, width=WIDTH, patch=2)


def batch() -> dict[str, np.ndarray]:
    text = np.random.default_rng(0).integers(0, VOCAB, (4, LENGTH + 1), np.int32)
    weights = np.ones((4, LENGTH), np.float32)
    weights[0, 3:] = 0.0
    return {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "segments": np.ones((4, LENGTH), np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (4, LENGTH)),
        "target_bytes": np.ones((4, LENGTH), np.int32),
        "weights": weights,
    }


@pytest.fixture(scope="session")
def nested() -> SimpleNamespace:
    def init(task):
        return drawn_like(lambda: task.init(jax.random.key(0)), seed=7)

    return SimpleNamespace(
        decoder=decoder,
        vit=vit,
        batch=batch(),
        images={
            "images": np.random.default_rng(1).standard_normal((4, 4, 4, 1)).astype(np.float32),
            "labels": np.asarray([0, 1, 2, 0], np.int32),
            "weights": np.ones(4, np.float32),
        },
        language=lambda **fields: LanguageModelling(decoder(**fields)),
        classification=lambda: Classification(vit(), (4, 4, 1)),
        init=init,
        VOCAB=VOCAB,
        WIDTH=WIDTH,
        HIDDEN=HIDDEN,
        LENGTH=LENGTH,
    )
