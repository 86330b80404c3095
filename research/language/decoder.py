"""Decoder language model: Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3 (text) are configurations of it."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.attention import Context
from research.nn.cache import Cache, Fresh, LayerCache
from research.nn.linear import Embedding, Linear
from research.nn.norm import RMSNorm
from research.nn.transformer import Hook, LayerStack, VirtualRows, tree_places


class DecoderLM(LayerStack, kw_only=True):
    """Token embedding, a stack of blocks, a final norm and an output head.

    Args:
        vocab_size, width: V and D.
        max_length: the context length it was trained for; decoding refuses to go beyond.
        final_norm: template of the norm before the head.
        tied_head: the head is the transposed embedding; otherwise a Linear without bias.
        embedding_multiplier: factor of the embedded tokens (Gemma: sqrt(width)).
        logit_softcap: tanh soft cap of the logits (Gemma 2), or None.
    """

    vocab_size: int
    width: int
    max_length: int
    final_norm: nn.Module = RMSNorm()
    tied_head: bool = True
    embedding_multiplier: float = 1.0
    logit_softcap: float | None = None

    def setup(self) -> None:
        self.embedding = Embedding(self.vocab_size, self.width, self.embedding_multiplier)
        self.make_layers()
        if not self.tied_head:
            self.head = Linear(self.vocab_size)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> jax.Array:
        """tokens int32[B, T] -> float32 logits [B, T, V].

        positions int32[B, T] (default 0..T-1); segments int32[B, T], 0 on padding; prefix int32[B] for
        prefix LMs.
        """
        return self.logits(self.features(tokens, positions, segments, prefix)[0])

    def features(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        """-> hidden states after the final norm [B, T, D] and the key and value rows of every layer."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.run(self.embedding(tokens), Context(positions, segments, prefix), {})

    def run(
        self,
        x: jax.Array,
        context: Context,
        hooks: Mapping[int, Sequence[Hook]],
        cache: tuple[LayerCache, ...] | None = None,
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        """Embedded tokens [B, T, D], among which images may be -> hidden states after the final norm, and fresh rows;
        hooks and cache as in `run_hooked`."""
        hidden, fresh = self.run_hooked(x, context, hooks, cache)
        return self.final_norm(hidden), fresh

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens int32[...] -> what enters the first layer [..., D]."""
        return self.embedding(tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 logits [..., V]. A product over flat tokens: see `token_layout`."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = self.embedding.attend(flat) if self.tied_head else self.head(flat).astype(jnp.float32)
        if self.logit_softcap is not None:
            logits = self.logit_softcap * jnp.tanh(logits / self.logit_softcap)
        return logits.reshape(*hidden.shape[:-1], -1)

    def prefill(
        self, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array, tuple[Fresh, ...]]:
        """Prompts int32[B, T] padded on the right, lengths int32[B] -> logits of each row's last token
        float32[B, V], hidden [B, T, D], fresh rows for `Cache.commit(fresh, None, lengths)`."""
        segments = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
        hidden, fresh = self.features(tokens, None, segments)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.logits(last), hidden, fresh

    def extend(
        self,
        tokens: jax.Array,
        cache: Cache,
        tree: jax.Array | None = None,
        depth: jax.Array | None = None,
        virtual: VirtualRows | None = None,
    ) -> tuple[jax.Array, jax.Array, tuple[Fresh, ...]]:
        """Score N new tokens int32[B, N] behind a cached prefix; the cache is read and not written.

        tree bool[N, N] or [B, N, N]: which new tokens each may see (ancestors and itself; default a chain);
        depth int32[N] or [B, N]: distance from the committed prefix (default 0..N-1); virtual: rows that
        join the tokens between layers, behind them in `tree` and `depth`, whose N then counts both.
        -> float32 logits [B, N, V], hidden [B, N, D], fresh rows of the tokens alone.
        """
        count = tokens.shape[1] + (0 if virtual is None else virtual.size)
        positions, tree = tree_places(cache.length, count, tree, depth)
        context = Context(positions, length=cache.length, tree=tree)
        hidden, fresh = self.run_layers(self.embedding(tokens), context, cache.layers, virtual)
        hidden = self.final_norm(hidden)
        return self.logits(hidden), hidden, fresh

    def init_cache(
        self, batch: int, capacity: int, dtype: jnp.dtype = jnp.float32, margin: int = 64
    ) -> Cache:
        """An empty cache for `capacity` tokens a row. Every append writes all its rows before the surplus is
        forgotten, so capacity must cover the longest sequence plus the largest append; `margin` is how far
        windowed layers can roll back."""
        layers = self.init_layer_caches(batch, capacity, margin, dtype)
        return Cache(layers, jnp.zeros((batch,), jnp.int32))
