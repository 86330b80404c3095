"""Zipper: two decoders, of text and of speech, joined by gated cross-attention both ways (arXiv 2405.18669).

Each tower reads its own tokens alone; a time says where each stands in the sequence of both. Of tower A beside B:

    h_0 = ReLU(MLP_A(embed(x)))                                          section 3, input projection
    h_A <- h_A + tanh(g_A) XAttn(LN(h_A), LN(P h_B), s < t)              behind every i_A-th layer

and at once B from the h_A before it; the j-th fusion of A reads the j-th of B, so the towers go in lockstep. A token
at time t sees the other's tokens of times s < t. A tower alone, without projection and fusions, is its language model
bit for bit. No code was published; the tanh and its zero at the start are Flamingo's (arXiv 2204.14198, figure 4), the
pairing of the fusions and the update at once are inferred.

A model has the contract of every decoder for the tower that it `writes`; the other's stream stands beside the prompt:

    asked = Streams.of([[("speech", units), ("text", [bos])], ...], "text")
    Generator(model, params, tokenizer).generate(asked.tokens, beside=asked.beside)

`take_turns` writes segments of several modalities in order, with the caches of both towers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.data.utterances import MODALITIES, PADDING, Laid, Modality, lay_out
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.multimodal.task import FromParts
from research.nn.attention import Context
from research.nn.cache import Cache, DenseCache, Fresh
from research.nn.cross_attention import CrossAttention, CrossContext, Memory
from research.nn.linear import Linear
from research.nn.mlp import MLP
from research.nn.norm import RMSNorm
from research.nn.reports import apply_reporting
from research.nn.transformer import VirtualRows, tree_places
from research.training.task import (
    Batch,
    Metrics,
    add_reported,
    cast_floats,
    check_compute_dtype,
    cross_entropy,
    dropout_rngs,
)


class Strand(struct.PyTreeNode):
    """One modality's tokens int32[B, T] of a batch of sequences and their times int32[B, T], ascending, `PADDING` where
    there are none (on the right)."""

    tokens: jax.Array
    times: jax.Array


class Beside(struct.PyTreeNode):
    """What belongs to a prompt int32[B, T] of one tower: the prompt's own times int32[B, T], and the other's strand."""

    times: jax.Array
    other: Strand


class Prefilled(struct.PyTreeNode):
    """What `prefill` computed: fresh rows of the layers, then what the other tower reads of them at every fusion; the
    other tower's cache, None where the tower ran alone."""

    layers: tuple[Fresh, ...]
    other: Cache | None


class ZipperCache(Cache):
    """The cache of the tower that writes, and the other's, None where it runs alone.

    Behind the layers' caches of a tower are those of its tokens' keys and values in the other's fusions: all rows are
    only ever appended.
    """

    other: Cache | None = None

    def commit(
        self, fresh: Prefilled | tuple[Fresh, ...], path: jax.Array | None, count: jax.Array
    ) -> "ZipperCache":
        if not isinstance(fresh, Prefilled):
            return self._with(super().commit(fresh, path, count))
        own = self.replace(layers=self.layers[: len(fresh.layers)], other=fresh.other)
        return own.commit(fresh.layers, path, count)

    def select(self, rows: jax.Array) -> "ZipperCache":
        other = None if self.other is None else self.other.select(rows)
        return self._with(super().select(rows)).replace(other=other)

    def _with(self, cache: Cache) -> "ZipperCache":
        return self.replace(layers=cache.layers, length=cache.length)


class Fusion(nn.Module):
    """Where one tower reads the other. Args: width of the tower; num_heads, head_dim; norm: a template.

    Parameters: gate [] (0 at the start), norm, projection, memory_norm, memory/{key,value}, attention/{query,output}.
    """

    width: int
    num_heads: int
    head_dim: int
    norm: nn.Module = RMSNorm()

    def setup(self) -> None:
        self.gate = self.param("gate", nn.initializers.zeros, (), jnp.float32)
        self.own_norm, self.memory_norm = (self.norm.clone(parent=None) for _ in range(2))
        self.projection = Linear(self.width)
        self.memory = Memory(self.num_heads, self.head_dim)
        self.attention = CrossAttention(self.num_heads, self.head_dim)

    def rows(self, states: jax.Array) -> Fresh:
        """The other tower's hidden states [B, S, its width] -> keys and values [B, H, S, d]."""
        return self.memory(self.memory_norm(self.projection(states)))

    def __call__(self, x: jax.Array, context: Context, rows: Fresh, seen: jax.Array) -> jax.Array:
        """x [B, T, width] or flat; seen bool[B, T, S] or [B, S]: what each token sees of the other's -> as x."""
        context = CrossContext(context.positions, source=seen)
        read, _ = self.attention(self.own_norm(x), context, rows)
        return x + jnp.tanh(self.gate).astype(x.dtype) * read


class Zipper(nn.Module):
    """Two towers with a fusion behind every `every`-th layer of each.

    Args:
        text, speech: decoders of unrolled layers.
        every: i of both; the layers are as many times i in both.
        num_heads, head_dim: of the cross-attention.
        norm: template of the fusions' norms.
        writes: the tower that is decoded, and that runs alone where there is no other stream.

    Parameters: text/..., speech/..., input_<modality>/{up,down}, fusion_<modality>_<j>/...
    """

    text: DecoderLM
    speech: DecoderLM
    every: tuple[int, int]
    num_heads: int
    head_dim: int
    norm: nn.Module = RMSNorm()
    writes: Modality = "text"

    scan_layers = False  # a stack's word for what it demands of its towers

    def __post_init__(self):
        # Objects that stand in both towers, such as a norm that is a default, would have one set of parameters.
        self.speech = self.speech.clone(parent=None, _deep_clone=True)
        super().__post_init__()

    def setup(self) -> None:
        counts = [self._tower(m).num_layers / self._every(m) for m in MODALITIES]
        if counts[0] != counts[1] or counts[0] % 1:
            raise UserError(
                f"Zipper: {self.text.num_layers} layers of text with a fusion behind every {self.every[0]}, "
                f"{self.speech.num_layers} of speech behind every {self.every[1]}: both must come to the same whole "
                "number of fusions"
            )
        if self.text.scan_layers or self.speech.scan_layers:
            raise UserError(
                "Zipper: fusions stand between unrolled layers: set scan_layers=False in both towers"
            )
        for m in MODALITIES:
            width = self._tower(m).width
            setattr(self, f"input_{m}", MLP(width, "relu"))
            for j in range(self.points):
                setattr(self, f"fusion_{m}_{j}", Fusion(width, self.num_heads, self.head_dim, self.norm))

    @property
    def points(self) -> int:
        """Fusions of each tower."""
        return self.text.num_layers // self.every[0]

    @property
    def tower(self) -> DecoderLM:
        """The one that writes."""
        return self._tower(self.writes)

    @property
    def reads(self) -> Modality:
        """The other one."""
        return _other(self.writes)

    @property
    def vocab_size(self) -> int:
        return self.tower.vocab_size

    @property
    def max_length(self) -> int:
        return self.tower.max_length

    @property
    def width(self) -> int:
        return self.tower.width

    @property
    def num_layers(self) -> int:
        return self.tower.num_layers

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """The tower that writes, alone: its language model. As `DecoderLM.__call__`."""
        if self.is_initializing():
            nothing = Strand(tokens, jnp.full(tokens.shape, PADDING))
            self.zipped(nothing, nothing)
        return self.tower(tokens, positions, segments)

    def zipped(self, text: Strand, speech: Strand) -> dict[Modality, jax.Array]:
        """-> float32 logits [B, T, V] of both towers."""
        hidden, _ = self.run({"text": text, "speech": speech})
        return {m: self._tower(m).logits(hidden[m]) for m in MODALITIES}

    def run(
        self, strands: dict[Modality, Strand]
    ) -> tuple[dict[Modality, jax.Array], dict[Modality, tuple[Fresh, ...]]]:
        """-> hidden states after the final norms [B, T, D]; fresh rows of each tower's layers, then of its tokens in
        the other's fusions."""
        contexts, streams, fresh, shared = {}, {}, {}, {m: [] for m in MODALITIES}
        for m, strand in strands.items():
            positions = jnp.broadcast_to(jnp.arange(strand.tokens.shape[1]), strand.tokens.shape)
            segments = (strand.times < PADDING).astype(jnp.int32)
            contexts[m] = self._tower(m).with_store(Context(positions, segments))
            streams[m], fresh[m] = self._enter(m, strand.tokens), []
        for j in range(self.points):
            for m in MODALITIES:
                streams[m] = self._span(m, j, streams[m], contexts[m], None, fresh[m])
                shared[m].append(self._fusion(_other(m), j).rows(_batched(streams[m].x, contexts[m])))
            # Both from the states before: neither tower is first.
            streams = {
                m: streams[m].replace(
                    x=self._fusion(m, j)(
                        streams[m].x,
                        contexts[m],
                        shared[_other(m)][j],
                        strands[_other(m)].times[:, None] < strands[m].times[..., None],
                    )
                )
                for m in MODALITIES
            }
        hidden = {m: self._tower(m).final_norm(_batched(streams[m].x, contexts[m])) for m in MODALITIES}
        return hidden, {m: (*fresh[m], *shared[m]) for m in MODALITIES}

    def read(self, strands: dict[Modality, Strand]) -> dict[Modality, Cache]:
        """-> both towers' caches, with as many slots as the strands have places."""
        hidden, fresh = self.run(strands)
        return {m: self._filled(m, strands[m].times, fresh[m], hidden[m].dtype) for m in MODALITIES}

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens int32[...] -> what enters the first layer of the tower alone [..., D]."""
        return self.tower.embed(tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] after the final norm -> float32 logits [..., V]."""
        return self.tower.logits(hidden)

    def prefill(
        self, tokens: jax.Array, lengths: jax.Array, beside: Beside | None = None
    ) -> tuple[jax.Array, jax.Array, Prefilled]:
        """As `DecoderLM.prefill`; without `beside` the tower runs alone, and goes on so."""
        if beside is None:
            logits, hidden, fresh = self.tower.prefill(tokens, lengths)
            return logits, hidden, Prefilled(fresh, None)
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        own = Strand(tokens, jnp.where(real, beside.times, PADDING))
        hidden, fresh = self.run({self.writes: own, self.reads: beside.other})
        hidden = hidden[self.writes]
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        other = self._filled(self.reads, beside.other.times, fresh[self.reads], hidden.dtype)
        return self.logits(last), hidden, Prefilled(fresh[self.writes], other)

    def extend(
        self,
        tokens: jax.Array,
        cache: ZipperCache,
        tree: jax.Array | None = None,
        depth: jax.Array | None = None,
        virtual: VirtualRows | None = None,
    ) -> tuple[jax.Array, jax.Array, tuple[Fresh, ...]]:
        """As `DecoderLM.extend`; the new tokens come after all of the other tower's."""
        if cache.other is None:
            return self.tower.extend(tokens, cache, tree, depth, virtual)
        if virtual is not None:
            raise UserError("Zipper: rows that join between layers are not known to its decoding")
        positions, tree = tree_places(cache.length, tokens.shape[1], tree, depth)
        context = self.tower.with_store(Context(positions, length=cache.length, tree=tree))
        stream, fresh, shared = self._enter(self.writes, tokens), [], []
        for j in range(self.points):
            stream = self._span(self.writes, j, stream, context, cache.layers, fresh)
            shared.append(self._fusion(self.reads, j).rows(_batched(stream.x, context)))
            read = cache.other.layers[self._tower(self.reads).num_layers + j]
            key, value, _, seen = read.read(cache.other.length)
            fused = self._fusion(self.writes, j)(stream.x, context, (key, value), seen)
            stream = stream.replace(x=fused)
        hidden = self.tower.final_norm(_batched(stream.x, context))
        return self.logits(hidden), hidden, (*fresh, *shared)

    def init_cache(
        self, batch: int, capacity: int, dtype: jnp.dtype = jnp.float32, margin: int = 64
    ) -> ZipperCache:
        """As `DecoderLM.init_cache`, for the tower that writes; the other's comes with what `prefill` gives."""
        own = self._empty(self.writes, batch, capacity, dtype, margin)
        return ZipperCache(own.layers, own.length)

    def _empty(
        self, modality: Modality, batch: int, capacity: int, dtype: jnp.dtype, margin: int = 64
    ) -> Cache:
        own = self._tower(modality).init_cache(batch, capacity, dtype, margin)
        read = (
            DenseCache.empty(batch, capacity, self.num_heads, self.head_dim, dtype)
            for _ in range(self.points)
        )
        return own.replace(layers=(*own.layers, *read))

    def _filled(
        self, modality: Modality, times: jax.Array, fresh: tuple[Fresh, ...], dtype: jnp.dtype
    ) -> Cache:
        count = jnp.sum(times < PADDING, axis=1, dtype=jnp.int32)
        return self._empty(modality, *times.shape, dtype).commit(fresh, None, count)

    def _enter(self, modality: Modality, tokens: jax.Array) -> Any:
        tower = self._tower(modality)
        return tower.enter(nn.relu(getattr(self, f"input_{modality}")(tower.embed(tokens))))

    def _span(
        self, modality: Modality, j: int, stream: Any, context: Context, cache: Any, fresh: list
    ) -> Any:
        """The layers before fusion j, whose rows join `fresh`."""
        every = self._every(modality)
        tower = self._tower(modality)
        stream, rows = tower.run_span(stream, context, cache, j * every, (j + 1) * every)
        fresh += rows
        return stream

    @nn.nowrap
    def _tower(self, modality: Modality) -> DecoderLM:
        return getattr(self, modality)

    @nn.nowrap
    def _every(self, modality: Modality) -> int:
        return self.every[MODALITIES.index(modality)]

    @nn.nowrap
    def _fusion(self, modality: Modality, j: int) -> Fusion:
        return getattr(self, f"fusion_{modality}_{j}")


def _other(modality: Modality) -> Modality:
    return MODALITIES[1 - MODALITIES.index(modality)]


def _batched(x: jax.Array, context: Context) -> jax.Array:
    """Hidden states [B, T, D] or [B * T, D] -> [B, T, D]."""
    return x.reshape(*context.positions.shape, x.shape[-1])


@dataclasses.dataclass(frozen=True)
class Streams:
    """A batch of sequences of segments on the host, as prompts of the tower that writes next, beside the other's."""

    rows: tuple[dict[Modality, Laid], ...]
    writes: Modality

    @classmethod
    def of(cls, sequences: Sequence[Sequence[tuple[Modality, Sequence[int]]]], writes: Modality) -> "Streams":
        """sequences: of each row its segments (modality, tokens with their marks) in order. The last is of the tower
        that writes, and has at least its <bos>."""
        if wrong := [i for i, s in enumerate(sequences, 1) if not s or s[-1][0] != writes or not s[-1][1]]:
            raise UserError(
                f"sequence {wrong[0]} does not end with a begun segment of {writes}, which is to be written"
            )
        return cls(
            tuple(lay_out([(m, tokens, False) for m, tokens in segments]) for segments in sequences), writes
        )

    @property
    def tokens(self) -> list[list[int]]:
        """What `Generator.generate` takes as prompts."""
        return [row[self.writes].tokens for row in self.rows]

    def strand(self, modality: Modality, length: int) -> Strand:
        """Padded to a length."""
        tokens = np.zeros((len(self.rows), length), np.int32)
        times = np.full_like(tokens, PADDING)
        for i, row in enumerate(self.rows):
            count = len(row[modality].tokens)
            tokens[i, :count], times[i, :count] = row[modality].tokens, row[modality].times
        return Strand(jnp.asarray(tokens), jnp.asarray(times))

    def beside(self, length: int) -> tuple[Beside]:
        """What the model's `prefill` takes beside tokens that are padded to a length; the other's strand is padded to a
        multiple of it, so that not every length of it is compiled."""
        other = _other(self.writes)
        count = max(1, *(len(row[other].tokens) for row in self.rows))
        strand = self.strand(other, -(-count // length) * length)
        return (Beside(self.strand(self.writes, length).times, strand),)


@functools.partial(jax.jit, static_argnames=("model", "order", "marks", "most"))
def take_turns(
    model: Zipper,
    params: Any,
    text: Strand,
    speech: Strand,
    *,
    order: tuple[Modality, ...],
    marks: tuple[tuple[int, int], tuple[int, int]],
    most: int,
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Segments of the modalities in `order` behind what is given, greedily and in one program.

    A tower writes until its <eos>, or `most` tokens; then the next one reads that from the cache. marks: (<bos>,
    <eos>) of text and of speech.
    -> of every segment its tokens int32[B, most] without marks, 0 behind the last, and their number int32[B].
    """
    variables = {"params": params}
    given = {"text": text, "speech": speech}
    for m in MODALITIES:
        room = ((0, 0), (0, order.count(m) * (most + 2)))
        tokens, times = jnp.pad(given[m].tokens, room), jnp.pad(given[m].times, room, constant_values=PADDING)
        given[m] = Strand(tokens, times)
    caches = model.apply(variables, given, method="read")
    written = []
    for m in order:
        begin, end = marks[MODALITIES.index(m)]
        cache = ZipperCache(caches[m].layers, caches[m].length, caches[_other(m)])
        cache, *segment = _write_segment(model.clone(writes=m), variables, cache, begin, end, most)
        caches = {m: Cache(cache.layers, cache.length), _other(m): cache.other}
        written.append(tuple(segment))
    return tuple(written)


def _write_segment(
    model: Zipper, variables: Any, cache: ZipperCache, begin: int, end: int, most: int
) -> tuple[ZipperCache, jax.Array, jax.Array]:
    """-> the cache with the segment and its marks in it, the tokens and their number."""
    batch = cache.length.shape[0]

    def body(carry: tuple) -> tuple:
        step, cache, root, done, tokens, count = carry
        logits, _, fresh = model.apply(variables, root[:, None], cache, method="extend")
        cache = cache.commit(fresh, None, jnp.where(done, 0, 1))
        done |= root == end  # it is read, for the other tower to see, and nothing follows it
        chosen = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        chosen = jnp.where(step >= most, end, chosen)
        kept = ~done & (chosen != end)
        tokens = tokens.at[:, step].set(jnp.where(kept, chosen, 0), mode="drop")
        return step + 1, cache, chosen, done, tokens, count + kept

    none = jnp.zeros((batch,), jnp.int32)
    carry = (jnp.int32(0), cache, none + begin, none > 0, jnp.zeros((batch, most), jnp.int32), none)
    _, cache, _, _, tokens, count = jax.lax.while_loop(lambda carry: ~jnp.all(carry[3]), body, carry)
    return cache, tokens, count


@dataclasses.dataclass(frozen=True)
class Interleaved(FromParts):
    """Batches of `research.data.utterances.Utterances`: each tower predicts its own next tokens where they are to be
    written, and the nats of both have one weight.

    Metrics: `loss` (nats a token), `accuracy`, and `segments`, the share of rows whose tokens to be written are all
    the most probable ones. compute_dtype, start_from, and what layers report, as in `LanguageModelling`.

    Args:
        parts: what a run begins with, see `FromParts`: (("text", "runs/text", ""), ("speech", "runs/speech", "")).
    """

    model: Zipper
    compute_dtype: str = "float32"
    start_from: str | None = None
    parts: tuple[tuple[str, str, str], ...] = ()

    def __post_init__(self):
        check_compute_dtype(self.compute_dtype, "Interleaved")

    def init(self, key: jax.Array) -> Any:
        return self.model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> Metrics:
        return add_reported(*self._metrics(params, batch, key))

    def evaluate(self, params: Any, batch: Batch) -> Metrics:
        return self._metrics(params, batch, None)[0]

    def variants(self, params: Any) -> dict[str, Any]:
        return {"": params}

    def _metrics(
        self, params: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[Metrics, dict[str, jax.Array]]:
        logits, losses, measured = apply_reporting(
            self.model,
            {"params": cast_floats(params, self.compute_dtype)},
            **{m: Strand(batch[f"{m}/tokens"], batch[f"{m}/times"]) for m in MODALITIES},
            method="zipped",
            rngs=dropout_rngs(key),
        )
        total = count = hits = jnp.float32(0)
        whole, written = True, False  # of each row
        for m in MODALITIES:
            weights = batch[f"{m}/weights"]
            flat = logits[m].reshape(-1, logits[m].shape[-1])
            nats, _, right = cross_entropy(flat, batch[f"{m}/targets"].reshape(-1))
            nats, right = nats.reshape(weights.shape), right.reshape(weights.shape)
            total += jnp.sum(weights * nats)
            hits += jnp.sum(weights * right)
            count += jnp.sum(weights)
            whole &= jnp.all((right > 0) | (weights == 0), axis=1)
            written |= jnp.any(weights > 0, axis=1)
        metrics = {
            "loss": (total, count),
            "accuracy": (hits, count),
            "segments": (
                jnp.sum(whole & written, dtype=jnp.float32),
                jnp.sum(written, dtype=jnp.float32),
            ),
        }
        return metrics | measured, losses
