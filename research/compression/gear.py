"""GEAR: keys and values in few bits, with a low-rank and a sparse part for what that loses (arXiv 2403.05527).

    Generator(*with_cache(model, params, Gear(bits=2)))

Tokens are kept as they are until `buffer` of them have come; those become a chunk X, compressed once, from the
originals, and never again (equation 3):

    X  ~  D + S + L
    S  the s / 2 least and s / 2 greatest entries of every vector, exact; vectors are a key channel over the chunk's
       tokens, and a value token over all channels
    D  the rest, with entries of S replaced by their vector's mean, in b bits: q = round((x - min) / step),
       step = (max - min) / (2^b - 1), for groups of g tokens of a key channel, of g channels of a value token
    L  for each head A B^T of rank r, a projection of R = X - (D + S) found by power iteration (algorithm 2)

D is overwritten by S where S is, so that R is 0 there; L is not, and may leak into those entries. With rank=0 and
outliers=0 this is KIVI's quantization (arXiv 2402.02750); with keys="token" as well, plain quantization by tokens.

Attention multiplies the parts and never forms L: q K^T = q (D + S)^T + (q B) A^T, p V = p (D + S) + (p A) B^T.

`prompt` is the room for a chunk of the prompt's own, as in the paper: the first append's tokens, as many as make whole
buffers, in one chunk with factors of `prompt_rank`; the remainder waits in the buffer. Rows of shorter prompts leave a
part of that room empty, and what is longer goes on in chunks. Without it (0, the default) a prompt is cut into the same
chunks as what is generated: at d = buffer, rank 2 a chunk takes the bits of rank 4 for a long prompt, and no room is
left empty. A chunk is compressed when `margin` tokens have come behind it, the longest
draft of the decoder, so that a roll-back never reaches into one. Tokens near the end of a draft may therefore see a
chunk as it was when plain decoding would have compressed it.

"Exact" and "full precision" are the cache's dtype, w bits; so are minima, steps and factors. Codes are packed.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kernels_pallas.quantized_matmul.packing import pack_codes, unpack_codes
from research.errors import UserError, nearest
from research.nn.cache import Fresh
from research.nn.packed import choose_tile
from research.nn.transformer import LayerStack, in_stack, unscan_layers
from research.nn.weights import array_bits

Along = Literal["channel", "token"]


@dataclasses.dataclass(frozen=True)
class Gear:
    """A `CacheKind`: how keys and values are compressed.

    Args:
        bits: of a code: 2, 4 or 8; 16 keeps the bulk as it is.
        group: g, tokens of a key channel and channels of a value token (heads side by side) that share a minimum and a
            step; None: the chunk's tokens, and all channels (the paper's KCVT).
        keys: whether keys are grouped by "channel", or by "token" as values are.
        rank: r, of each head's L in each chunk; 0: none.
        outliers: s, the share of S; each vector has at least one at either end. 0: none.
        buffer: n_b, tokens of a chunk.
        prompt: tokens of the prompt's own chunk, at most; a multiple of `buffer`. prompt_rank: r there.
        iterations: T of the power iteration.
        seed: of its random start.

    Raises UserError for values that do not go together.
    """

    bits: int = 2
    group: int | None = 64
    keys: Along = "channel"
    rank: int = 2
    outliers: float = 0.02
    buffer: int = 64
    iterations: int = 3
    seed: int = 0
    prompt: int = 0
    prompt_rank: int = 4

    def __post_init__(self):
        if self.bits not in (2, 4, 8, 16):
            raise UserError(f"Gear: bits={self.bits} is not one of 2, 4, 8, 16")
        if self.keys not in ("channel", "token"):
            raise UserError(f"Gear: keys={self.keys!r} is not channel or token")
        if self.buffer < 4 or self.buffer % 4:
            raise UserError(
                f"Gear: buffer={self.buffer}: a chunk has a multiple of 4 tokens, whose codes fill bytes"
            )
        if self.group is not None and (
            self.group < 2 or (self.keys == "channel" and self.buffer % self.group)
        ):
            raise UserError(f"Gear: group={self.group} does not divide the buffer of {self.buffer} tokens")
        if not 0 <= self.rank <= self.buffer or self.iterations < 1:
            raise UserError(
                f"Gear: rank={self.rank}, iterations={self.iterations}: 0 to {self.buffer}, the tokens of a chunk, "
                "and at least 1 are expected"
            )
        if not 0.0 <= self.outliers <= 1.0:
            raise UserError(f"Gear: outliers={self.outliers} is a share, from 0 to 1")
        if self.prompt < 0 or self.prompt % self.buffer:
            raise UserError(
                f"Gear: prompt={self.prompt} is no multiple of the buffer of {self.buffer} tokens"
            )
        if self.prompt and not 0 <= self.prompt_rank <= self.buffer:
            raise UserError(f"Gear: prompt_rank={self.prompt_rank}: 0 to {self.buffer} are expected")

    @property
    def of_prompt(self) -> "Gear":
        """How the prompt's own chunk is compressed."""
        return dataclasses.replace(self, buffer=self.prompt, rank=self.prompt_rank, prompt=0)

    def empty(
        self, batch: int, capacity: int, kv_heads: int, head_dim: int, margin: int, dtype: jnp.dtype
    ) -> "GearCache":
        for name in ("rank", "prompt_rank") if self.prompt else ("rank",):
            if getattr(self, name) > head_dim:
                raise UserError(
                    f"Gear: {name}={getattr(self, name)} is larger than heads of {head_dim} channels"
                )
        channels = kv_heads * head_dim
        if self.group is not None and channels % self.group:
            raise UserError(
                f"Gear: group={self.group} does not divide the {channels} channels of all {kv_heads} heads together"
            )

        def parts(kind: Gear, chunks: int) -> tuple[Compressed, Compressed]:
            rows = jax.ShapeDtypeStruct((batch, chunks, kv_heads, kind.buffer, head_dim), dtype)
            made = jax.eval_shape(
                lambda x: tuple(compress(x, kind, along) for along in (kind.keys, "token")), rows
            )
            return jax.tree.map(lambda x: jnp.zeros((batch, chunks, *x.shape[2:]), x.dtype), made)

        # At least one chunk, which stays empty where fewer tokens than that are kept.
        key, value = parts(self, max(capacity // self.buffer, 1))
        buffer = jnp.zeros((batch, kv_heads, self.buffer + margin - 1, head_dim), dtype)
        none = jnp.zeros((batch,), jnp.int32)
        prompt, begin = (parts(self.of_prompt, 1), none) if self.prompt else (None, None)
        return GearCache(key, value, buffer, buffer, none, prompt, begin, self, margin)

    def chunk_bits(self, kv_heads: int, head_dim: int, width: int) -> int:
        """Bits of a chunk's keys and values, by the formula: for each of the two, with N = buffer * channels elements,
        b N + 2 w (groups) + w r (buffer + d) H + (outliers) (w + bits of an index)."""
        channels = kv_heads * head_dim
        total = 0
        for along in (self.keys, "token"):
            vectors, length = _vectors(self, along, channels)
            total += (width if self.bits == 16 else self.bits) * self.buffer * channels
            if self.bits < 16:
                total += 2 * width * vectors * (length // (self.group or length))
            total += width * self.rank * (self.buffer + head_dim) * kv_heads
            index = 8 if length <= 256 else 16
            total += 2 * _count(self.outliers, length) * vectors * (width + index)
        return total


def _vectors(gear: Gear, along: Along, channels: int) -> tuple[int, int]:
    """(vectors of a chunk, their length)."""
    return (channels, gear.buffer) if along == "channel" else (gear.buffer, channels)


def _count(share: float, length: int) -> int:
    """Outliers at either end of a vector of this length."""
    return max(1, round(share / 2 * length)) if share else 0


class Compressed(struct.PyTreeNode):
    """The chunks of keys, or of values: D, S and L. H are key heads, d their channels, n the tokens of a chunk.

    codes uint8[B, C, H, n * bits / 8, d], or with 16 bits the rows themselves [B, C, H, n, d]; low and step
    [B, C, vectors, groups]; place uint8 or uint16 [B, C, vectors, 2k] within the vector, and exact, the values there;
    left [B, C, H, n, r] and right [B, C, H, d, r] are A and B. A part that is switched off has no entries.
    Vectors are H * d channels, or n tokens; see `_as_vectors`.
    """

    codes: jax.Array
    low: jax.Array
    step: jax.Array
    place: jax.Array
    exact: jax.Array
    left: jax.Array
    right: jax.Array
    along: Along = struct.field(pytree_node=False)
    bits: int = struct.field(pytree_node=False)

    @property
    def tokens(self) -> int:
        """Of all chunks."""
        return self.codes.shape[1] * self.left.shape[3]

    def dense(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """D + S, [B, C, H, n, d]."""
        count, heads = self.left.shape[3], self.codes.shape[2]
        if self.bits == 16:
            vectors = _as_vectors(self.codes.astype(dtype), self.along)
        else:
            rows = unpack_codes(self.codes, self.bits, choose_tile(count, self.bits, count))
            vectors = _as_vectors(rows, self.along).astype(dtype)
            grouped = vectors.reshape(*self.low.shape, -1)
            vectors = (
                grouped * self.step[..., None].astype(dtype) + self.low[..., None].astype(dtype)
            ).reshape(vectors.shape)
        if self.place.shape[-1]:
            index = self.place.astype(jnp.int32)
            vectors = jnp.put_along_axis(vectors, index, self.exact.astype(dtype), axis=-1, inplace=False)
        return _as_rows(vectors, self.along, heads)

    def materialize(self) -> jax.Array:
        """D + S + L in float32, [B, H, tokens, d]."""
        out = self.dense() + jnp.einsum(
            "bchnr,bchdr->bchnd", *(x.astype(jnp.float32) for x in (self.left, self.right))
        )
        return _join(out, 2)

    def scores(self, query: jax.Array) -> jax.Array:
        """query [B, H, M, d] -> [B, H, M, tokens]."""
        out = _einsum("bhmd,bchnd->bhmcn", query, self.dense(query.dtype))
        if self.left.shape[-1]:
            thin = _einsum("bhmd,bchdr->bhmcr", query, self.right.astype(query.dtype)).astype(query.dtype)
            out = out + _einsum("bhmcr,bchnr->bhmcn", thin, self.left.astype(query.dtype))
        return out.reshape(*query.shape[:3], -1)

    def mix(self, weights: jax.Array) -> jax.Array:
        """weights [B, H, M, tokens] -> [B, H, M, d]."""
        dtype = weights.dtype
        weights = weights.reshape(*weights.shape[:3], self.codes.shape[1], -1)
        out = _einsum("bhmcn,bchnd->bhmd", weights, self.dense(dtype))
        if self.left.shape[-1]:
            thin = _einsum("bhmcn,bchnr->bhmcr", weights, self.left.astype(dtype)).astype(dtype)
            out = out + _einsum("bhmcr,bchdr->bhmd", thin, self.right.astype(dtype))
        return out


def _einsum(formula: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(formula, *operands, preferred_element_type=jnp.float32)


def _join(x: jax.Array, axis: int) -> jax.Array:
    """Chunks [B, C, H, n, d] -> [B, H, C * n, d]."""
    moved = jnp.moveaxis(x, 1, axis)
    return moved.reshape(*moved.shape[:axis], -1, moved.shape[-1])


def _as_vectors(rows: jax.Array, along: Along) -> jax.Array:
    """[B, C, H, n, d] -> [B, C, H * d, n] of channels, [B, C, n, H * d] of tokens."""
    heads, count, dim = rows.shape[-3:]
    moved = jnp.moveaxis(rows, -2, -1) if along == "channel" else jnp.moveaxis(rows, -2, -3)
    return moved.reshape(
        *rows.shape[:-3], *((heads * dim, count) if along == "channel" else (count, heads * dim))
    )


def _as_rows(vectors: jax.Array, along: Along, heads: int) -> jax.Array:
    """The inverse of `_as_vectors`."""
    lead, (first, last) = vectors.shape[:-2], vectors.shape[-2:]
    if along == "channel":
        return jnp.moveaxis(vectors.reshape(*lead, heads, first // heads, last), -1, -2)
    return jnp.moveaxis(vectors.reshape(*lead, first, heads, last // heads), -3, -2)


def compress(rows: jax.Array, gear: Gear, along: Along, held: jax.Array | None = None) -> Compressed:
    """Chunks [B, C, H, n, d], all in float32 but what is stored in the dtype of `rows`.

    held int32[B]: of the tokens of a row's chunks only so many are there; the others have no part in any statistic, and
    nobody may read them. Whole groups of tokens, where `gear` has groups.
    """
    dtype, heads, count = rows.dtype, rows.shape[2], rows.shape[3]
    x = rows.astype(jnp.float32)
    vectors = _as_vectors(x, along)
    present = (
        held if along == "channel" else None
    )  # vectors of tokens that are not there are their own affair
    place, exact, bulk = _outliers(vectors, gear.outliers, present)
    if gear.bits == 16:
        codes, low = _as_rows(bulk, along, heads).astype(dtype), jnp.zeros((*vectors.shape[:-1], 0), dtype)
        step = low
    else:
        codes, low, step = _quantize(bulk, gear.bits, gear.group, dtype)
        codes = pack_codes(_as_rows(codes, along, heads), gear.bits, choose_tile(count, gear.bits, count))
    nothing = jnp.zeros((*x.shape[:-1], 0), dtype), jnp.zeros((*x.shape[:3], x.shape[-1], 0), dtype)
    made = Compressed(codes, low, step, place, exact.astype(dtype), *nothing, along=along, bits=gear.bits)
    if not gear.rank:
        return made
    residual = x - made.dense()
    if held is not None:
        residual = jnp.where(jnp.arange(count)[:, None] < held[:, None, None, None, None], residual, 0)
    left, right = power_iteration(residual, gear.rank, gear.iterations, jax.random.key(gear.seed))
    return made.replace(left=left.astype(dtype), right=right.astype(dtype))


def _outliers(
    vectors: jax.Array, share: float, held: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The least and greatest entries of vectors [..., n] -> their places and values [..., 2 * count], and the vectors
    with the mean in those places. held int32[B]: of a row's entries, the others being taken for the mean; as many as
    that share of them are outliers, the first of either end standing for the rest."""
    length = vectors.shape[-1]
    count, index = _count(share, length), jnp.uint8 if length <= 256 else jnp.uint16
    mean = jnp.mean(vectors, axis=-1, keepdims=True)
    low = high = vectors
    if held is not None:
        held = held[:, None, None, None]
        there = jnp.arange(length) < held
        total = jnp.sum(jnp.where(there, vectors, 0), axis=-1, keepdims=True)
        mean = total / jnp.maximum(held, 1)
        vectors, low, high = (jnp.where(there, vectors, other) for other in (mean, jnp.inf, -jnp.inf))
    ends = [jax.lax.top_k(-low, count)[1], jax.lax.top_k(high, count)[1]]
    if held is not None and count:
        own = jnp.maximum(jnp.round(share / 2 * held), 1)
        ends = [jnp.where(jnp.arange(count) < own, end, end[..., :1]) for end in ends]
    place = jnp.concatenate(ends, axis=-1)
    exact = jnp.take_along_axis(vectors, place, axis=-1)
    mean = jnp.broadcast_to(mean, exact.shape)
    bulk = jnp.put_along_axis(vectors, place, mean, axis=-1, inplace=False) if count else vectors
    return place.astype(index), exact, bulk


def _quantize(
    vectors: jax.Array, bits: int, group: int | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """vectors [..., n] -> codes uint8[..., n], and minima and steps [..., groups] as stored, which codes fit."""
    grouped = vectors.reshape(*vectors.shape[:-1], -1, group or vectors.shape[-1])
    low = jnp.min(grouped, axis=-1)
    step = ((jnp.max(grouped, axis=-1) - low) / (2**bits - 1)).astype(dtype)
    low = low.astype(dtype)
    wide, start = (y.astype(jnp.float32)[..., None] for y in (step, low))
    codes = jnp.round((grouped - start) / jnp.where(wide == 0, 1.0, wide))
    return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8).reshape(vectors.shape), low, step


def power_iteration(
    residual: jax.Array, rank: int, iterations: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """R [..., n, d] -> A [..., n, rank] with orthonormal columns and B = R^T A [..., d, rank]; A B^T projects R."""
    start = jax.random.normal(key, (residual.shape[-1], rank), jnp.float32)
    right = jnp.broadcast_to(start, (*residual.shape[:-2], *start.shape))
    with jax.default_matmul_precision("highest"):
        for i in range(iterations):
            last = i == iterations - 1
            if last:
                right = jnp.linalg.qr(right)[0]
            left = residual @ right
            if last:
                left = jnp.linalg.qr(left)[0]
            right = jnp.swapaxes(residual, -1, -2) @ left
    return left, right


class GearRows(struct.PyTreeNode):
    """Keys or values as a cache is read, `research.nn.cache.Rows`: compressed parts, and behind them the buffer."""

    parts: tuple[Compressed, ...]
    buffer: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        batch, heads, slots, dim = self.buffer.shape
        return batch, heads, sum(part.tokens for part in self.parts) + slots, dim

    def scores(self, query: jax.Array) -> jax.Array:
        new = _einsum("bhmd,bhsd->bhms", query, self.buffer.astype(query.dtype))
        return jnp.concatenate([*(part.scores(query) for part in self.parts), new], axis=-1)

    def mix(self, weights: jax.Array) -> jax.Array:
        *old, new = jnp.split(weights, np.cumsum([part.tokens for part in self.parts]), axis=-1)
        mixed = (part.mix(own) for part, own in zip(self.parts, old, strict=True))
        return sum(mixed, _einsum("bhms,bhsd->bhmd", new, self.buffer.astype(weights.dtype)))

    def materialize(self) -> jax.Array:
        """[B, H, S, d], float32."""
        compressed = (part.materialize() for part in self.parts)
        return jnp.concatenate([*compressed, self.buffer.astype(jnp.float32)], axis=2)


class GearCache(struct.PyTreeNode):
    """A `LayerCache`: slots are those of the prompt's chunk, of the others, token by token, and then of the buffer.

    held int32[B]: tokens in chunks. key_buffer, value_buffer [B, Hkv, buffer + margin - 1, d]: the tokens behind them.
    prompt: keys and values of the prompt's own chunk, and begin int32[B], how many of `held` it holds; None where there
    is none. A roll-back may go `margin` tokens back.
    """

    key: Compressed
    value: Compressed
    key_buffer: jax.Array
    value_buffer: jax.Array
    held: jax.Array
    prompt: tuple[Compressed, Compressed] | None
    begin: jax.Array | None
    kind: Gear = struct.field(pytree_node=False)
    margin: int = struct.field(pytree_node=False)

    def read(self, length: jax.Array) -> tuple[GearRows, GearRows, jax.Array, jax.Array]:
        held, slots = self.held[:, None], lambda count: jnp.arange(count)[None]
        begin = jnp.zeros_like(held) if self.begin is None else self.begin[:, None]
        chunked, buffered = begin + slots(self.key.tokens), held + slots(self.key_buffer.shape[2])
        index, valid = [chunked, buffered], [chunked < held, buffered < length[:, None]]
        key, value = (self.key,), (self.value,)
        if self.prompt is not None:
            key, value = ((first, *rest) for first, rest in zip(self.prompt, (key, value), strict=True))
            prompted = jnp.broadcast_to(slots(key[0].tokens), (len(held), key[0].tokens))
            index, valid = [prompted, *index], [prompted < begin, *valid]
        index, valid = (jnp.concatenate(parts, axis=1) for parts in (index, valid))
        return GearRows(key, self.key_buffer), GearRows(value, self.value_buffer), index, valid

    def append(self, fresh: Fresh, length: jax.Array, count: jax.Array) -> "GearCache":
        size, slots, added = self.kind.buffer, self.key_buffer.shape[2], fresh[0].shape[2]
        most = min((slots + added) // size, self.key.codes.shape[1])
        room = ((0, 0), (0, 0), (0, added + most * size), (0, 0))
        # Rows beyond `count` are covered by the next append. See `DenseCache.append` for why `count` is looked at.
        start = length - self.held + jnp.minimum(count, 0)
        key, value = (
            jax.vmap(lambda b, r, s: jax.lax.dynamic_update_slice(b, r, (0, s, 0)))(
                jnp.pad(buffer, room), rows.astype(buffer.dtype), start
            )
            for buffer, rows in zip((self.key_buffer, self.value_buffer), fresh, strict=True)
        )
        held, prompt, begin = self.held, self.prompt, self.begin
        if prompt is not None and added >= size + self.margin:  # else no prompt could be compressed
            whole = (count - self.margin) // size * size
            fresh_prompt = jnp.where(length == 0, jnp.clip(whole, 0, min(self.kind.prompt, added)), 0)
            prompt = self._prompt(prompt, (key, value), fresh_prompt)
            held, begin, start = held + fresh_prompt, begin + fresh_prompt, start - fresh_prompt
            key, value = (
                jax.vmap(lambda b, s: jnp.roll(b, -s, axis=1))(rows, fresh_prompt) for rows in (key, value)
            )
        full = jnp.maximum((start + count - self.margin) // size, 0)  # chunks that are compressed now

        def chunks_of(rows: jax.Array) -> jax.Array:
            rows = rows[:, :, : most * size]
            return rows.reshape(*rows.shape[:2], most, size, -1).swapaxes(1, 2)

        def compressed() -> tuple[Compressed, Compressed]:
            return compress(chunks_of(key), self.kind, self.kind.keys), compress(
                chunks_of(value), self.kind, "token"
            )

        def nothing() -> tuple[Compressed, Compressed]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compressed))

        number, behind = jnp.arange(most)[None], held if begin is None else held - begin
        place = jnp.where(number < full[:, None], behind[:, None] // size + number, self.key.codes.shape[1])
        row = jnp.arange(place.shape[0])[:, None]

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[row, place].set(new, mode="drop", unique_indices=True)

        made = jax.lax.cond(jnp.any(full > 0), compressed, nothing)
        chunks = [
            jax.tree.map(write, old, new) for old, new in zip((self.key, self.value), made, strict=True)
        ]
        key, value = (
            jax.vmap(lambda b, s: jax.lax.dynamic_slice_in_dim(b, s, slots, axis=1))(rows, full * size)
            for rows in (key, value)
        )
        made = dict(key=chunks[0], value=chunks[1], key_buffer=key, value_buffer=value)
        return self.replace(**made, held=held + full * size, prompt=prompt, begin=begin)

    def _prompt(
        self, old: tuple[Compressed, Compressed], rows: tuple[jax.Array, jax.Array], count: jax.Array
    ) -> tuple[Compressed, Compressed]:
        """The prompts' chunks: of the first count[b] of `rows` [B, H, .., d] where that is not 0, else `old`."""
        kind = self.kind.of_prompt

        def compressed() -> tuple[Compressed, Compressed]:
            room = ((0, 0), (0, 0), (0, kind.buffer), (0, 0))
            padded = (jnp.pad(x, room)[:, None, :, : kind.buffer] for x in rows)
            made = (
                compress(x, kind, along, count) for x, along in zip(padded, (kind.keys, "token"), strict=True)
            )
            mine = lambda new, old: jnp.where(count.reshape(-1, *[1] * (old.ndim - 1)) > 0, new, old)  # noqa: E731
            return jax.tree.map(mine, tuple(made), old)

        return jax.lax.cond(jnp.any(count > 0), compressed, lambda: old)

    def check_rollback(self, length: jax.Array) -> None:
        """Raise `UserError` for a roll-back into chunks, where the numbers are known."""
        if isinstance(self.held, jax.core.Tracer) or isinstance(length, jax.core.Tracer):
            return
        if bool(jnp.any(length < self.held)):
            raise UserError(
                f"a roll-back to {int(jnp.min(length))} tokens reaches into compressed chunks: this cache was made "
                f"to go back {self.margin} tokens; make it with a larger margin"
            )

    def select(self, rows: jax.Array) -> "GearCache":
        return jax.tree.map(lambda x: x[rows], self)

    def stored_bits(self) -> int:
        """Bits of the chunks' arrays, and of the room for a prompt; the buffer is not counted."""
        return sum(array_bits(leaf) for leaf in jax.tree.leaves((self.key, self.value, self.prompt)))


@in_stack
def with_cache(model: LayerStack, params: Any, kind: Gear) -> tuple[LayerStack, Any]:
    """The same trained decoder, whose layers that see all tokens keep them compressed; parameters are as they were, of
    unrolled layers.

    Raises UserError where no layer keeps all tokens in a way that could be another.
    """
    if not isinstance(model, LayerStack) or not hasattr(model, "extend"):
        raise UserError(f"a cache is of a decoder, and {type(model).__name__} is none")
    model, params = unscan_layers(model, params)
    blocks = tuple(
        block.clone(attention=block.attention.clone(cache_kind=kind))
        if hasattr(getattr(block, "attention", None), "cache_kind")
        else block
        for block in model.blocks
    )
    changed = model.clone(blocks=blocks)
    caches = jax.eval_shape(lambda: changed.init_cache(1, model.max_length)).layers
    if not any(isinstance(layer, GearCache) for layer in caches):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in caches}))
        raise UserError(f"no layer of this model has a cache that could be compressed: they have {kinds}")
    return changed, params


KINDS = {
    "gear": {},
    "kivi": dict(rank=0, prompt_rank=0, outliers=0.0),
    "tokens": dict(rank=0, prompt_rank=0, outliers=0.0, keys="token"),
}


def parse_cache(text: str) -> Gear:
    """`gear:bits=2,rank=4`; `kivi:...` has neither L nor S, `tokens:...` groups keys by token as well.

    Raises UserError for an unknown name or field, or a value that is no number where one is expected.
    """
    name, _, rest = text.partition(":")
    if name not in KINDS:
        found = nearest(name, KINDS)
        raise UserError(
            f"{text}: no cache {name!r}; "
            + (f"did you mean {found}?" if found else "there are gear, kivi, tokens")
        )
    fields: dict[str, Any] = dict(KINDS[name])
    known = [field.name for field in dataclasses.fields(Gear)]
    for part in filter(None, rest.split(",")):
        field, _, value = part.partition("=")
        if field not in known or field in KINDS[name]:
            free = [field for field in known if field not in KINDS[name]]
            found = nearest(field, free)
            hint = f"did you mean {found}?" if found else f"it has {', '.join(free)}"
            raise UserError(f"{text}: {name} has no {field!r}; {hint}")
        try:
            if field == "keys":
                fields[field] = value
            elif field == "group" and value == "none":
                fields[field] = None
            else:
                fields[field] = float(value) if field == "outliers" else int(value)
        except ValueError:
            raise UserError(f"{text}: {field}={value}: a number is expected") from None
    return Gear(**fields)
