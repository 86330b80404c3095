"""Encoder-decoder: a source is read at once and a target written token by token (arXiv 1706.03762).

The decoder is a stack with causal self-attention and attention to the encoded source. It has the contract of
every decoder (docs/architecture.md, Models), so the one engine decodes it: the prompt is the source, and
`prefill` encodes it and reads the start token.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.nn.attention import Context
from research.nn.cache import Cache, Fresh
from research.nn.cross_attention import CrossContext, MemoryCache
from research.nn.linear import Embedding, Linear
from research.nn.norm import RMSNorm
from research.nn.reports import apply_reporting
from research.nn.transformer import LayerStack, VirtualRows, tree_places
from research.training.task import (
    Batch,
    Metrics,
    PyTree,
    add_reported,
    cast_floats,
    check_compute_dtype,
    cross_entropy,
    dropout_rngs,
)


class Encoder(LayerStack, kw_only=True):
    """A stack of blocks, whose mask rule is `Full`, and a final norm.

    Called with embedded tokens x [B, S, width] and real bool[B, S]; returns states [B, S, width].
    """

    final_norm: nn.Module = RMSNorm()

    def setup(self) -> None:
        self.make_layers()

    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), real.shape)
        hidden, _ = self.run_layers(x, Context(positions, real.astype(jnp.int32)))
        return self.final_norm(hidden)


class Prefilled(struct.PyTreeNode):
    """What `prefill` computed: (fresh rows of the start token, memory of the source) of every layer."""

    layers: tuple[tuple[Fresh, Fresh], ...]


class SourceCache(Cache):
    """The cache of a decoder with a source; `source` bool[B, S] are the places of it that are real.

    `length` counts the decoder's tokens, the start token among them.
    """

    source: jax.Array

    def commit(
        self, fresh: Prefilled | tuple[Fresh, ...], path: jax.Array | None, count: jax.Array
    ) -> "SourceCache":
        """As `Cache.commit`. What `prefill` gives is taken in whole: the source, `count` tokens of which are
        real, becomes the memory, and the start token the first of the decoder's."""
        if not isinstance(fresh, Prefilled):
            return self._with(super().commit(fresh, path, count))
        places = fresh.layers[0][1][0].shape[2]
        layers = tuple(
            MemoryCache(cache.own, jax.tree.map(lambda new, old: new.astype(old.dtype), memory, cache.memory))
            for cache, (_, memory) in zip(self.layers, fresh.layers, strict=True)
        )
        empty = self.replace(layers=layers, source=jnp.arange(places) < count[:, None])
        return empty.commit(tuple(own for own, _ in fresh.layers), None, jnp.ones_like(count))

    def select(self, rows: jax.Array) -> "SourceCache":
        return self._with(super().select(rows)).replace(source=self.source[rows])

    def _with(self, cache: Cache) -> "SourceCache":
        return self.replace(layers=cache.layers, length=cache.length)


class EncoderDecoder(LayerStack, kw_only=True):
    """One embedding for both sides, an encoder, a stack of `CrossBlock`s, a final norm and an output head.

    `blocks`, `num_layers` and the other fields of `LayerStack` are the decoder's. With a rule other than
    `Causal` in them the decoder is not autoregressive.

    Args:
        encoder: an `Encoder`.
        vocab_size, width: V and D.
        source_length, max_length: the most tokens of a source, and of a target with its start token.
        bos: the start token.
        final_norm: template of the norm before the head.
        tied_head: the head is the transposed embedding; otherwise a Linear without bias.

    Parameters: those of a decoder (layer_i/cross_attention_norm and layer_i/cross_attention are new), and
    encoder/layer_i/..., encoder/final_norm.
    """

    encoder: nn.Module
    vocab_size: int
    width: int
    source_length: int
    max_length: int
    bos: int = 1
    final_norm: nn.Module = RMSNorm()
    tied_head: bool = True

    def setup(self) -> None:
        self.embedding = Embedding(self.vocab_size, self.width)
        self.make_layers()
        if not self.tied_head:
            self.head = Linear(self.vocab_size)

    def __call__(
        self,
        source: jax.Array,
        lengths: jax.Array | None = None,
        tokens: jax.Array | None = None,
        target_lengths: jax.Array | None = None,
    ) -> jax.Array:
        """source int32[B, S] with lengths int32[B] (default: all real), and what the decoder reads, int32[B,
        T] with target_lengths (default: the start token alone) -> float32 logits [B, T, V]."""
        states, real = self.encode(source, lengths)
        if tokens is None:
            tokens = jnp.full((source.shape[0], 1), self.bos, jnp.int32)
        return self.logits(self.features(tokens, target_lengths, states, real)[0])

    def encode(self, source: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """-> states [B, S, D] and which places are real, bool[B, S]."""
        places = jnp.arange(source.shape[1])
        if lengths is None:
            lengths = jnp.full(source.shape[:1], source.shape[1], jnp.int32)
        real = places < lengths[:, None]
        return self.encoder(self.embedding(source), real), real

    def features(
        self, tokens: jax.Array, lengths: jax.Array | None, states: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, tuple[tuple[Fresh, Fresh], ...]]:
        """What the decoder reads, int32[B, T] of lengths int32[B] (None: all real), and what `encode` gives
        -> hidden states after the final norm [B, T, D]; rows of the tokens and memory of every layer."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = None if lengths is None else (positions < lengths[:, None]).astype(jnp.int32)
        context = CrossContext(positions, segments, source=real, states=states)
        hidden, fresh = self.run_layers(self.embedding(tokens), context)
        return self.final_norm(hidden), fresh

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens int32[...] -> what enters the first layer [..., D]."""
        return self.embedding(tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 logits [..., V]. A product over flat tokens: see `token_layout`."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = self.embedding.attend(flat) if self.tied_head else self.head(flat).astype(jnp.float32)
        return logits.reshape(*hidden.shape[:-1], -1)

    def prefill(self, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array, Prefilled]:
        """Sources int32[B, S] padded on the right, lengths int32[B] -> logits float32[B, V] of the first
        token of the target, states [B, S, D] of the source, and what `SourceCache.commit(fresh, None,
        lengths)` takes."""
        states, real = self.encode(tokens, lengths)
        start = jnp.full((tokens.shape[0], 1), self.bos, jnp.int32)
        hidden, fresh = self.features(start, None, states, real)
        return self.logits(hidden[:, 0]), states, Prefilled(fresh)

    def extend(
        self,
        tokens: jax.Array,
        cache: SourceCache,
        tree: jax.Array | None = None,
        depth: jax.Array | None = None,
        virtual: VirtualRows | None = None,
    ) -> tuple[jax.Array, jax.Array, tuple[Fresh, ...]]:
        """Score N new tokens of the target; arguments and results as in `DecoderLM.extend`."""
        count = tokens.shape[1] + (0 if virtual is None else virtual.size)
        positions, tree = tree_places(cache.length, count, tree, depth)
        context = CrossContext(positions, length=cache.length, tree=tree, source=cache.source)
        hidden, fresh = self.run_layers(self.embedding(tokens), context, cache.layers, virtual)
        hidden = self.final_norm(hidden)
        return self.logits(hidden), hidden, tuple(own for own, _ in fresh)

    def init_cache(
        self, batch: int, capacity: int, dtype: jnp.dtype = jnp.float32, margin: int = 64
    ) -> SourceCache:
        """An empty cache for `capacity` tokens of the target a row, as for `DecoderLM`; the memory comes with
        what `prefill` gives."""
        nothing = jnp.zeros((batch, 1, 0, 1), dtype)
        own = self.init_layer_caches(batch, capacity, margin, dtype)
        layers = tuple(MemoryCache(cache, (nothing, nothing)) for cache in own)
        return SourceCache(layers, jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, 0), bool))


@dataclass(frozen=True)
class SequenceToSequence:
    """The task: write `targets` int32[B, T] given `source` int32[B, S] of `source_lengths` int32[B].

    The decoder reads the start token and the targets but the last. Metrics: `loss` (nats per token where
    `weights` f32[B, T] is 1) and `accuracy`. With label_smoothing s the loss mixes the target with the
    uniform distribution, (1 - s) onehot + s / V, in training only, where the plain nats are then reported as
    `cross_entropy`. compute_dtype, and what layers report, as in `LanguageModelling`.
    """

    model: nn.Module
    compute_dtype: str = "float32"
    label_smoothing: float = 0.0

    def __post_init__(self):
        check_compute_dtype(self.compute_dtype, "SequenceToSequence")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"SequenceToSequence.label_smoothing: {self.label_smoothing} is not in [0, 1)")

    def init(self, key: jax.Array) -> PyTree:
        return self.model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def loss(self, params: PyTree, batch: Batch, key: jax.Array) -> Metrics:
        metrics, logits, losses = self._metrics(params, batch, key)
        if self.label_smoothing:
            (total, weight), s = metrics["loss"], self.label_smoothing
            uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
            smooth = (1 - s) * total + s * jnp.sum(batch["weights"].reshape(-1) * uniform)
            metrics |= {"loss": (smooth, weight), "cross_entropy": (total, weight)}
        return add_reported(metrics, losses)

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        return self._metrics(params, batch, None)[0]

    def variants(self, params: PyTree) -> dict[str, PyTree]:
        return {"": params}

    def _metrics(
        self, params: PyTree, batch: Batch, key: jax.Array | None
    ) -> tuple[Metrics, jax.Array, dict[str, jax.Array]]:
        """-> the metrics, the logits [B * T, V], the losses that layers report."""
        targets, weights = batch["targets"], batch["weights"].reshape(-1)
        variables = {"params": cast_floats(params, self.compute_dtype)}
        read = shift_right(targets, self.model.bos)
        logits, losses, measured = apply_reporting(
            self.model, variables, batch["source"], batch["source_lengths"], read, rngs=dropout_rngs(key)
        )
        logits = logits.reshape(-1, logits.shape[-1])
        nats, _, correct = cross_entropy(logits, targets.reshape(-1))
        weight = jnp.sum(weights)
        metrics = {
            "loss": (jnp.sum(weights * nats), weight),
            "accuracy": (jnp.sum(weights * correct), weight),
            **measured,
        }
        return metrics, logits, losses


def shift_right(targets: jax.Array, bos: int) -> jax.Array:
    """targets int32[B, T] -> what a decoder reads to write them: the start token and all but the last."""
    return jnp.concatenate([jnp.full_like(targets[:, :1], bos), targets[:, :-1]], axis=1)
