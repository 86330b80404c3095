"""Decoder layers of a drafter that follow the target's sequence with a cache of their own.

Place t of a follower takes in h_t, the target's hidden state there, and e(x_{t+1}), the embedding of the token
the target has chosen after it. So while the newest token, the root, is not yet in the target's cache, the
follower's last place is the one that takes in the root, and both caches are equally long. After every call
the follower reads what was accepted, with the target's true hidden states; what it computes while drafting
is never committed.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.decoding.proposers import Outcome, Prompt, Target
from research.errors import UserError
from research.nn.attention import Context
from research.nn.cache import Cache, Fresh
from research.nn.transformer import LayerStack, tree_places, unscan_layers
from research.nn.weights import Weight, materialize


class Follower(LayerStack):
    """Base of a drafter's network. Subclasses define `setup`, which calls `make_layers`, and `merge`."""

    def merge(self, hidden: jax.Array, embedded: jax.Array) -> jax.Array:
        """hidden, embedded [B, T, D] -> what enters the first layer [B, T, D]."""
        raise NotImplementedError

    def finish(self, states: jax.Array) -> jax.Array:
        """What leaves the last layer -> the states that are drafted from, both [B, T, D]."""
        return states

    def __call__(
        self,
        hidden: jax.Array,
        embedded: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        """Whole sequences: hidden, embedded [B, T, D] -> states [B, T, D] and the rows of every layer.

        positions int32[B, T] (default 0..T-1); segments int32[B, T], 0 on padding.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2])
        states, fresh = self.run_layers(self.merge(hidden, embedded), Context(positions, segments))
        return self.finish(states), fresh

    def extend(
        self,
        hidden: jax.Array,
        embedded: jax.Array,
        cache: Cache,
        tree: jax.Array | None = None,
        depth: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        """N places behind the cache, which is not written; `tree` and `depth` as for `DecoderLM.extend`."""
        positions, tree = tree_places(cache.length, hidden.shape[1], tree, depth)
        context = Context(positions, length=cache.length, tree=tree)
        states, fresh = self.run_layers(self.merge(hidden, embedded), context, cache.layers)
        return self.finish(states), fresh

    def init_cache(self, batch: int, capacity: int, margin: int, dtype: jnp.dtype) -> Cache:
        """Empty, with `capacity` slots a row."""
        layers = self.init_layer_caches(batch, capacity, margin, dtype)
        return Cache(layers, jnp.zeros((batch,), jnp.int32))


class Following(struct.PyTreeNode):
    """Where a follower is: its cache, and its state [B, D] at the place that takes in the root."""

    cache: Cache
    state: jax.Array


def read_prompt(follower: Follower, params: Any, target: Target, prompt: Prompt, margin: int) -> Following:
    """Runs the follower over the prompt and the root; `margin` is the most rows that a call appends."""
    batch, length = prompt.tokens.shape
    place = jnp.arange(length)
    last = prompt.lengths - 1
    following = jnp.where(place == last[:, None], prompt.root[:, None], jnp.roll(prompt.tokens, -1, axis=1))
    segments = (place < prompt.lengths[:, None]).astype(jnp.int32)
    states, fresh = follower.apply(
        {"params": params}, prompt.hidden, target.embed(following), segments=segments
    )
    cache = follower.init_cache(batch, prompt.capacity, margin, prompt.hidden.dtype)
    return Following(cache.commit(fresh, None, prompt.lengths), _at(states, last))


def read_accepted(
    follower: Follower, params: Any, target: Target, following: Following, outcome: Outcome
) -> Following:
    """Appends the accepted nodes, each with the target's hidden state there and the token after it."""
    path, count = outcome.accept.path, outcome.accept.count
    place = jnp.arange(path.shape[1])
    tokens = jnp.roll(jnp.take_along_axis(outcome.draft.tokens, path, axis=1), -1, axis=1)
    tokens = jnp.where(place == count[:, None] - 1, outcome.accept.token[:, None], tokens)
    hidden = jnp.take_along_axis(outcome.hidden, path[..., None], axis=1)
    states, fresh = follower.apply(
        {"params": params}, hidden, target.embed(tokens), following.cache, method="extend"
    )
    return Following(following.cache.commit(fresh, None, count), _at(states, jnp.maximum(count - 1, 0)))


def _at(x: jax.Array, place: jax.Array) -> jax.Array:
    """x [B, T, D] -> x[b, place[b]]."""
    return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]


def last_block(model: Any) -> nn.Module:
    """The template of a decoder's last layer. Raises UserError for a model that is no stack of layers."""
    if not isinstance(model, LayerStack):
        raise UserError(
            f"a {type(model).__name__} is no stack of layers, the last of which a drafter could copy"
        )
    return model.blocks[(model.num_layers - 1) % len(model.blocks)]


def last_layer(target: Target) -> Any:
    """Float32 copy of the parameters of the target's last layer, structured kernels multiplied out."""
    model, params = unscan_layers(target.model, target.params)
    layer = params[f"layer_{model.num_layers - 1}"]
    is_weight = lambda leaf: isinstance(leaf, Weight)  # noqa: E731
    return jax.tree.map(lambda leaf: materialize(leaf).astype(jnp.float32), layer, is_leaf=is_weight)
