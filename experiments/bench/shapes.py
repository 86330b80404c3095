"""The sizes of model that the benchmarks measure."""

import dataclasses
from typing import TYPE_CHECKING

from research.errors import UserError, nearest

if TYPE_CHECKING:
    from research.language.decoder import DecoderLM


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family: RMSNorm, rotary positions, gated SiLU. `hidden` units in each MLP."""

    name: str
    width: int
    layers: int
    heads: int
    hidden: int
    vocab: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("1M", 128, 4, 4, 512, 256),
        Shape("6M", 256, 6, 4, 1024, 1024),
        Shape("20M", 384, 8, 6, 1536, 4096),
        Shape("40M", 512, 10, 8, 2048, 4096),
    )
}


def find_shape(name: str) -> Shape:
    """The shape of this name. Raises UserError."""
    if name not in SHAPES:
        found = nearest(name, SHAPES)
        hint = f"did you mean {found}?" if found else f"there are {', '.join(SHAPES)}"
        raise UserError(f"no size {name!r}; {hint}")
    return SHAPES[name]


def make_decoder(shape: Shape, length: int, *, tied_head: bool) -> "DecoderLM":
    """The shape as a model of this project, for contexts of `length` tokens."""
    # Imported here: the process must be prepared before jax is (see research/runtime.py).
    from research.language.decoder import DecoderLM
    from research.nn.attention import Attention
    from research.nn.mlp import GatedMLP
    from research.nn.rotary import Rotary
    from research.nn.transformer import Block

    attention = Attention(shape.heads, shape.width // shape.heads, rotary=Rotary())
    return DecoderLM(
        blocks=(Block(attention, GatedMLP(shape.hidden)),),
        num_layers=shape.layers,
        vocab_size=shape.vocab,
        width=shape.width,
        max_length=length,
        tied_head=tied_head,
    )
