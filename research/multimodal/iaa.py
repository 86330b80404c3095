"""Inner-Adaptor: layers inserted between those of a frozen decoder, for prompts with images alone (arXiv 2408.12902).

A workflow has its own projector, word table, inserted layers, final norm and head:

    h <- LM_l(h);   h <- Inserted_l(h) where l is in S      the inserted layer's output is what LM_{l+1} reads

Inserted layers are full decoder layers with their own caches. Text alone takes the decoder as it was: its logits are
the same bits before and after any training of a workflow. Workflows don't meet; a model is one workflow at a time.

Inserted layers begin as the identity (zero output projections), the table, norm and head as copies of the decoder's: a
workflow begins as the language model.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.multimodal.model import VLM
from research.nn.attention import Context
from research.nn.cache import Fresh, LayerCache
from research.nn.linear import Embedding, Linear
from research.nn.transformer import Block


class InsertedLayers(nn.Module):
    """A hook of decoder layers. Args: block, what each is; behind, S: the decoder's layers that one follows.

    Parameters: layer_l/... for l in S.
    """

    block: Block
    behind: tuple[int, ...]

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(layer + 1 for layer in self.behind)

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None, *, place: int, seen: Any
    ) -> tuple[jax.Array, Context, Fresh]:
        x, fresh = self.block.copy(name=f"layer_{place - 1}")(x, context, cache)
        return x, context, fresh

    def init_cache(
        self, place: int, batch: int, capacity: int, margin: int, dtype: jnp.dtype
    ) -> LayerCache | None:
        return self.block.attention.init_cache(batch, capacity, margin, dtype)


class IAA(VLM):
    """One workflow: a VLM with `InsertedLayers` as its hook, and its own table, norm and head.

    `IAA.decoder` with the parameters `decoder` is the workflow of text. Parameters add embedding/table,
    final_norm/scale and head/kernel.
    """

    def setup(self) -> None:
        decoder = self.decoder
        self.embedding = Embedding(decoder.vocab_size, decoder.width, decoder.embedding_multiplier)
        self.final_norm = decoder.final_norm.clone(parent=None)
        self.head = Linear(decoder.vocab_size)

    def __call__(self, tokens: jax.Array, *arguments: Any, **keywords: Any) -> jax.Array:
        if self.is_initializing():
            self.decoder(tokens)  # the decoder's own table and head, which only text alone uses
        return super().__call__(tokens, *arguments, **keywords)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding(tokens)

    def run(
        self, x: jax.Array, context: Context, seen: Any, cache: tuple[LayerCache, ...] | None = None
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        hidden, fresh = self.decoder.run_hooked(x, context, self.acting(seen), cache)
        return self.final_norm(hidden), fresh

    def logits(self, hidden: jax.Array) -> jax.Array:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self.head(flat).astype(jnp.float32).reshape(*hidden.shape[:-1], -1)


def begin_workflow(params: dict) -> dict:
    """Parameters of an IAA -> the same, with a workflow that is the language model: see the head of this file."""
    decoder = params["decoder"]
    table = decoder["embedding"]["table"]
    head = decoder["head"]["kernel"] if "head" in decoder else table.T
    inserted = {
        name: layer
        | {
            "attention": layer["attention"]
            | {"output": jax.tree.map(jnp.zeros_like, layer["attention"]["output"])},
            "mlp": layer["mlp"] | {"down": jax.tree.map(jnp.zeros_like, layer["mlp"]["down"])},
        }
        for name, layer in params["hooks_0"].items()
    }
    own = {"embedding": {"table": table}, "final_norm": decoder["final_norm"], "head": {"kernel": head}}
    return params | own | {"hooks_0": inserted}
