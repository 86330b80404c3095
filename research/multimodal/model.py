"""A vision-language model: tower, connector, splice, and a decoder with hooks between its layers.

    media -> tower -> connector -> rows -+
    tokens -> embedding ------------------+-> splice -> decoder -> logits

Systems change one of the parts. With no hooks and no image it is the decoder, bit for bit. It has the contract of every
decoder (docs/architecture.md, Models), so every way to decode works on prompts with images: `prefill` takes a
`Pictures` beside the tokens, and nothing after it knows of images.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.multimodal.media import Media, MediaPlanner
from research.nn.attention import Context
from research.nn.cache import Cache, Fresh, LayerCache
from research.nn.masks import Steps, Window
from research.nn.transformer import Hook, VirtualRows, tree_places


class Pictures(struct.PyTreeNode):
    """What belongs to tokens [B, T] that have images among them.

    media; slot int32[B, T], which of the row's I * M image rows stands there, -1 for a token of text; positions
    int32[B, T], which may repeat or skip.
    """

    media: Media
    slot: jax.Array
    positions: jax.Array


class DecoderHook(Protocol):
    """A linen module that acts on the decoder's hidden states between its layers.

    places: before which layers, ascending; the number of layers is behind the last.
    """

    places: tuple[int, ...]

    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None, *, place: int, seen: Any
    ) -> tuple[jax.Array, Context, Fresh | None]:
        """As `research.nn.transformer.Hook`. seen: what the tower gives, None where the call has no images, as when
        a token is decoded."""

    def init_cache(
        self, place: int, batch: int, capacity: int, margin: int, dtype: jnp.dtype
    ) -> LayerCache | None:
        """None where the hook at this place has no rows to keep."""


class Prefilled(struct.PyTreeNode):
    """What `prefill` computed: fresh rows of the layers and hooks, and the position behind the prompt's last."""

    layers: tuple[Fresh, ...]
    following: jax.Array


class PictureCache(Cache):
    """A cache in which the next token's position is `length + shift`, int32[B], since images may share positions."""

    shift: jax.Array

    def commit(
        self, fresh: Prefilled | tuple[Fresh, ...], path: jax.Array | None, count: jax.Array
    ) -> "PictureCache":
        if not isinstance(fresh, Prefilled):
            return self._with(super().commit(fresh, path, count))
        whole = self._with(super().commit(fresh.layers, path, count))
        return whole.replace(shift=fresh.following - whole.length)

    def select(self, rows: jax.Array) -> "PictureCache":
        return self._with(super().select(rows)).replace(shift=self.shift[rows])

    def _with(self, cache: Cache) -> "PictureCache":
        return self.replace(layers=cache.layers, length=cache.length)


def splice(text: jax.Array, rows: jax.Array, slot: jax.Array) -> jax.Array:
    """text [B, T, D] with rows [B, N, D] in the places where slot int32[B, T] is not -1."""
    if text.shape[-1] != rows.shape[-1]:
        raise UserError(
            f"the connector gives rows {rows.shape[-1]} wide, and the decoder's tokens are {text.shape[-1]} wide"
        )
    chosen = jnp.take_along_axis(rows, jnp.maximum(slot, 0)[..., None], axis=1)
    return jnp.where(slot[..., None] >= 0, chosen.astype(text.dtype), text)


class VLM(nn.Module):
    """A decoder that reads images.

    Args:
        decoder: a DecoderLM, unrolled where there are hooks.
        planner: how images are cut and spelled, on the host.
        tower: Media -> what the connector and the hooks read.
        connector: (what the tower gives, Media) -> [B, I, M, D], M the planner's `rows`.
        hooks: `DecoderHook`s.
        steps: what sees ahead in a prompt, as in the `Conversations` that it learned from; beyond "causal" the rule
            of the decoder is `Steps`.

    Parameters: decoder/..., tower/..., connector/..., hooks_0/...
    """

    decoder: DecoderLM
    planner: MediaPlanner
    tower: nn.Module
    connector: nn.Module
    hooks: tuple[nn.Module, ...] = ()
    steps: Literal["causal", "images", "prefix"] = "causal"

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def max_length(self) -> int:
        return self.decoder.max_length

    @property
    def width(self) -> int:
        return self.decoder.width

    @property
    def num_layers(self) -> int:
        return self.decoder.num_layers

    def __call__(
        self,
        tokens: jax.Array,
        pictures: Pictures | None = None,
        segments: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> jax.Array:
        """tokens int32[B, T] -> float32 logits [B, T, V]; segments and prefix as of the decoder."""
        if pictures is None and self.is_initializing():
            pictures = self.blank(*tokens.shape)
        return self.logits(self.features(tokens, pictures, segments, prefix)[0])

    def features(
        self,
        tokens: jax.Array,
        pictures: Pictures | None,
        segments: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        """-> hidden states after the final norm [B, T, D], fresh rows of the layers and hooks."""
        x, seen, positions = self.enter(tokens, pictures)
        return self.run(x, Context(positions, segments, prefix), seen)

    def enter(self, tokens: jax.Array, pictures: Pictures | None) -> tuple[jax.Array, Any, jax.Array]:
        """-> what enters the first layer [B, T, D], what the tower sees, positions."""
        x = self.embed(tokens)
        if pictures is None:
            return x, None, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        seen, rows = self.see(pictures.media)
        return splice(x, rows, pictures.slot), seen, pictures.positions

    def see(self, media: Media) -> tuple[Any, jax.Array]:
        """-> what the tower gives, and the connector's rows [B, I * M, D]."""
        seen = self.tower(media)
        rows = self.connector(seen, media)
        self.check_rows(rows)
        return seen, rows.reshape(rows.shape[0], -1, rows.shape[-1])

    @nn.nowrap
    def check_rows(self, rows: jax.Array) -> None:
        """Raise UserError unless the connector's rows [B, I, M, D] are as many as the planner spells."""
        if rows.shape[-2] != self.planner.rows:
            raise UserError(
                f"the connector makes {rows.shape[-2]} rows of an image, and {type(self.planner).__name__} spells "
                f"{self.planner.rows}"
            )

    def run(
        self, x: jax.Array, context: Context, seen: Any, cache: tuple[LayerCache, ...] | None = None
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        """The decoder with the hooks between its layers, and its final norm."""
        return self.decoder.run(x, context, self.acting(seen), cache)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens int32[...] -> what enters the first layer [..., D]."""
        return self.decoder.embed(tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] after the final norm -> float32 logits [..., V]."""
        return self.decoder.logits(hidden)

    def prefill(
        self, tokens: jax.Array, lengths: jax.Array, pictures: Pictures | None = None
    ) -> tuple[jax.Array, jax.Array, Prefilled]:
        """As `DecoderLM.prefill`, of prompts with images."""
        places = jnp.arange(tokens.shape[1])
        segments = (places[None] < lengths[:, None]).astype(jnp.int32)
        hidden, fresh = self.features(tokens, pictures, segments, self.ahead(places, lengths, pictures))
        end = (lengths - 1)[:, None]
        last = jnp.take_along_axis(hidden, end[..., None], axis=1)[:, 0]
        following = lengths
        if pictures is not None:
            following = jnp.take_along_axis(pictures.positions, end, axis=1)[:, 0] + 1
        return self.logits(last), hidden, Prefilled(fresh, following)

    @nn.nowrap
    def ahead(self, places: jax.Array, lengths: jax.Array, pictures: Pictures | None) -> jax.Array | None:
        """Of prompts at places [T]: the index behind the last token of each one's step, int32[B, T], or None."""
        self.check_steps(self.steps != "causal")
        if self.steps == "causal" or (self.steps == "images" and pictures is None):
            return None
        shape = len(lengths), len(places)
        if self.steps == "prefix":
            return jnp.broadcast_to(lengths[:, None], shape)
        images = jnp.arange(pictures.media.grid.shape[1])
        member = (pictures.slot[..., None] >= 0) & (pictures.slot[..., None] // self.planner.rows == images)
        index = places[:, None]
        first = jnp.min(jnp.where(member, index, shape[1]), axis=1, keepdims=True)
        end = jnp.max(jnp.where(member, index + 1, 0), axis=1, keepdims=True)
        # Separators among an image's rows belong to it.
        inside = (first <= index) & (index < end)
        return jnp.max(jnp.where(inside, end, index + 1), axis=-1)

    @nn.nowrap
    def check_steps(self, wanted: bool) -> None:
        """Raise UserError unless tokens see ahead in this model, or do not, as wanted."""
        rules = [getattr(block.attention, "rule", None) for block in self.decoder.blocks]
        if wanted and (self.steps == "causal" or not any(isinstance(rule, Steps) for rule in rules)):
            raise UserError(
                f"what sees ahead (Conversations.steps) needs {type(self).__name__}.steps, now {self.steps!r}, to say "
                "the same, and the rule Steps in the decoder"
            )
        if not wanted and self.steps != "causal":
            raise UserError(
                f"{type(self).__name__}.steps={self.steps!r}, but in Conversations.steps nothing sees ahead"
            )

    def extend(
        self,
        tokens: jax.Array,
        cache: PictureCache,
        tree: jax.Array | None = None,
        depth: jax.Array | None = None,
        virtual: VirtualRows | None = None,
    ) -> tuple[jax.Array, jax.Array, tuple[Fresh, ...]]:
        """As `DecoderLM.extend`."""
        if virtual is not None:
            raise UserError(
                f"{type(self).__name__}: rows that join between layers are not known to its decoding"
            )
        positions, tree = tree_places(cache.length, tokens.shape[1], tree, depth)
        context = Context(positions + cache.shift[:, None], length=cache.length, tree=tree)
        hidden, fresh = self.run(self.embed(tokens), context, None, cache.layers)
        return self.logits(hidden), hidden, fresh

    def init_cache(
        self, batch: int, capacity: int, dtype: jnp.dtype = jnp.float32, margin: int = 64
    ) -> PictureCache:
        """As `DecoderLM.init_cache`; behind the layers' caches are those of the hooks."""
        decoder = self.decoder
        rules = [getattr(block.attention, "rule", None) for block in decoder.blocks]
        if getattr(self.planner, "share", "none") != "none" and any(isinstance(r, Window) for r in rules):
            raise UserError("shared positions and windows: a window counts tokens by their positions")
        caches = decoder.init_cache(batch, capacity, dtype, margin).layers
        for place, hook in self.hook_places():
            own = hook.init_cache(place, batch, capacity, margin, dtype)
            caches += () if own is None else (own,)
        zero = jnp.zeros((batch,), jnp.int32)
        return PictureCache(caches, zero, zero)

    @nn.nowrap
    def hook_places(self) -> list[tuple[int, Any]]:
        """(place, hook) in the order in which they act."""
        return sorted(((p, h) for h in self.hooks for p in h.places), key=lambda pair: pair[0])

    @nn.nowrap
    def acting(self, seen: Any) -> dict[int, Sequence[Hook]]:
        """The hooks as a stack takes them."""
        by_place: dict[int, list[Hook]] = {}
        for place, hook in self.hook_places():
            by_place.setdefault(place, []).append(functools.partial(hook, place=place, seen=seen))
        return by_place

    @nn.nowrap
    def blank(self, batch: int, length: int) -> Pictures:
        """One place for an image in every row, without an image."""
        nothing = self.planner.nothing(1)
        media = jax.tree.map(lambda x: jnp.zeros((batch, *x.shape), x.dtype), nothing)
        places = jnp.broadcast_to(jnp.arange(length), (batch, length))
        return Pictures(media, jnp.full((batch, length), -1), places)
