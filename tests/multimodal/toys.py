"""A tiny model that reads images, for the tests of its parts and of the systems."""

import jax
import numpy as np

from research.data.shapes import vocabulary
from research.language.decoder import DecoderLM
from research.multimodal.connectors import PatchProjection
from research.multimodal.media import Square
from research.multimodal.model import VLM
from research.multimodal.tower import Tower
from research.multimodal.video_tower import FrameAttention, SpaceTimeBlock, VideoTower
from research.nn.attention import Attention
from research.nn.masks import Causal, Full
from research.nn.mlp import MLP, GatedMLP
from research.nn.norm import LayerNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block

WIDTH = 8


def decoder(layers=2, rule=Causal(), length=128):  # noqa: B008
    block = Block(Attention(2, 4, rule=rule, rotary=Rotary()), GatedMLP(16))
    size = dict(vocab_size=vocabulary().vocab_size, width=WIDTH, max_length=length)
    return DecoderLM(blocks=(block,), num_layers=layers, **size)


def tower(side=2, layers=1, width=8, **fields):
    attention = Attention(2, width // 2, rule=Full(), use_bias=True, output_bias=True)
    block = Block(attention, MLP(2 * width), LayerNorm())
    return Tower(blocks=(block,), num_layers=layers, width=width, side=side, **fields)


def video_tower(layers=1, frames=4, **fields):
    sizes = dict(rule=Full(), use_bias=True, output_bias=True)
    block = SpaceTimeBlock(
        attention=FrameAttention(2, 4, **sizes), mlp=MLP(16), norm=LayerNorm(), time=Attention(2, 4, **sizes)
    )
    whole = dict(width=8, side=2, class_token=True) | fields
    return VideoTower(blocks=(block,), num_layers=layers, frames=frames, **whole)


def vlm(kind=VLM, planner=Square(patch=4, side=8), rule=Causal(), layers=2, **parts):  # noqa: B008
    whole = dict(decoder=decoder(layers, rule), tower=tower(), connector=PatchProjection(WIDTH)) | parts
    return kind(planner=planner, **whole)


def image(seed=0, height=9, width=13):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def media(planner, *images):
    """Of one row, with the axis B."""
    read = [planner.read(x)[0] for x in images]
    return jax.tree.map(lambda *x: np.stack(x)[None], *read)


def entry(question, answer, **files):
    """A dialogue in LLaVA's format."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return files | {"conversations": turns}
