"""What a Data-to-Sequence tokenizer is: any data -> tokens of one width (Meta-Transformer, arXiv 2307.10802).

A tokenizer is a small linen module, called with one modality's part of a batch. It knows the shapes of its data.
"""

from collections.abc import Mapping
from typing import Protocol

import jax
from flax import struct


class Tokens(struct.PyTreeNode):
    """What a tokenizer makes of a batch.

    x [B, S, D]. mask bool[B, S], which are there, or None: all. places [B, S, D], what is added before *every* block
    (where the points of a cloud are), or None.
    """

    x: jax.Array
    mask: jax.Array | None = None
    places: jax.Array | None = None


class Tokenizer(Protocol):
    """spec: the arrays of one record that it reads. count: S. width: D."""

    width: int

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]: ...

    @property
    def count(self) -> int: ...

    def __call__(self, record: Mapping[str, jax.Array]) -> Tokens: ...
