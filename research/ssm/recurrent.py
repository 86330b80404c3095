"""What state-space mixers share: the convolution, the recurrence over a sequence or a tree, the cache of its states.

A mixer's cache is a state of fixed size: the last inputs of the convolution and S. As attention does, a mixer reads the
cache and returns the rows of new tokens; `Cache.commit` then advances the state along the accepted path alone, so nodes
of a tree cost no states of their own and a rejected draft leaves no trace. What a draft model has committed is another
matter, as it may have to be forgotten: `RecurrentCache.reversible` keeps the states behind the last tokens too.
"""

from typing import NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.ssd.reference import convolve, sum_taps
from research.nn.attention import Context
from research.nn.linear import parameter
from research.ssm.ssd import PLAIN, Scan, advance, ssd_tree


class Rows(NamedTuple):
    """What a mixer leaves of new tokens, each [B, *, T, *]: enough to advance its state along any path of them.

    conv [B, 1, T, channels], inputs of the convolution; x [B, H, T, P] with dt; b [B, G, T, N];
    log_decay [B, H, T, 1].
    """

    conv: jax.Array
    x: jax.Array
    b: jax.Array
    log_decay: jax.Array


class PromptRows(Protocol):
    """What a mixer leaves of a prompt whose states a kernel has computed."""

    def count(self) -> jax.Array:
        """int32[B], the tokens that `cache` is behind."""

    def cache(self) -> "RecurrentCache":
        """What an empty cache without a margin becomes."""

    def rows(self) -> Rows:
        """What leads to any other cache; computed when it is asked for."""


class RecurrentCache(struct.PyTreeNode):
    """Slot s holds what is behind the newest number of tokens n with n % slots == s; `slots` is 1 plus the margin.

    conv [B, slots, conv_width - 1, channels], the newest inputs last; state float32 [B, slots, H, P, N]. A roll-back
    of at most the margin finds the very state that was there; with a margin of 0 there is none.
    """

    conv: jax.Array
    state: jax.Array

    @classmethod
    def empty(
        cls, batch: int, conv: tuple[int, int], state: tuple[int, int, int], dtype: jnp.dtype
    ) -> "RecurrentCache":
        """Of a size that no length changes. conv (conv_width - 1, channels), state (H, P, N)."""
        return cls(jnp.zeros((batch, 1, *conv), dtype), jnp.zeros((batch, 1, *state), jnp.float32))

    @property
    def margin(self) -> int:
        """By how many tokens it can be rolled back."""
        return self.state.shape[1] - 1

    def reversible(self, margin: int) -> "RecurrentCache":
        """The same state, of which what follows can be rolled back by `margin` tokens."""
        return jax.tree.map(lambda y: jnp.repeat(y[:, -1:], 1 + margin, axis=1), self)

    def read(self, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Behind length int32[B] tokens: conv [B, conv_width - 1, channels] and state [B, H, P, N]."""
        if not self.margin:
            return self.conv[:, 0], self.state[:, 0]
        rows = jnp.arange(length.shape[0])
        return self.conv[rows, length % (1 + self.margin)], self.state[rows, length % (1 + self.margin)]

    def append(self, fresh: Rows | PromptRows, length: jax.Array, count: jax.Array) -> "RecurrentCache":
        """The states behind rows 0 .. count[b] of fresh; what lies before `length` is already in them."""
        if not isinstance(fresh, Rows):
            return self._append_prompt(fresh, length, count)
        conv, state = self.read(length)
        x, b, log_decay = (y.swapaxes(1, 2) for y in (fresh.x, fresh.b, fresh.log_decay))
        tokens = x, log_decay[..., 0], b
        inputs = jnp.concatenate([conv, fresh.conv[:, 0].astype(conv.dtype)], axis=1)
        if not self.margin:
            state = advance(state, *tokens, count)
            return RecurrentCache(self._window(inputs, count)[:, None], state[:, None])
        # One token after the other, as far back as a roll-back may reach; what is before that at once.
        singly = min(self.margin, x.shape[1])
        first = jnp.maximum(count - singly, 0)
        cache = self
        if x.shape[1] > singly:
            state = advance(state, *tokens, first)
            cache = cache._write(inputs, state, length, first)

        def step(carry: tuple["RecurrentCache", jax.Array], number: jax.Array) -> tuple:
            cache, state = carry
            place = (first + number)[:, None]
            one = (jnp.take_along_axis(y, place.reshape(-1, *(1,) * (y.ndim - 1)), axis=1) for y in tokens)
            state = advance(state, *one, jnp.minimum(count - place[:, 0], 1))
            return (cache._write(inputs, state, length, jnp.minimum(place[:, 0] + 1, count)), state), None

        return jax.lax.scan(step, (cache, state), jnp.arange(singly))[0][0]

    def _append_prompt(self, fresh: PromptRows, length: jax.Array, count: jax.Array) -> "RecurrentCache":
        def by_rows() -> "RecurrentCache":
            return self.append(fresh.rows(), length, count)

        def known() -> "RecurrentCache":
            return jax.tree.map(lambda y, own: y.astype(own.dtype), fresh.cache(), self)

        if self.margin:
            return by_rows()
        return jax.lax.cond(jnp.all((length == 0) & (count == fresh.count())), known, by_rows)

    def select(self, rows: jax.Array) -> "RecurrentCache":
        return RecurrentCache(self.conv[rows], self.state[rows])

    def _write(
        self, inputs: jax.Array, state: jax.Array, length: jax.Array, count: jax.Array
    ) -> "RecurrentCache":
        """With the state [B, H, P, N] behind `count` tokens more than `length`, both int32[B]."""
        rows, slot = jnp.arange(length.shape[0]), (length + count) % (1 + self.margin)
        conv = self.conv.at[rows, slot].set(self._window(inputs, count))
        return RecurrentCache(conv, self.state.at[rows, slot].set(state))

    def _window(self, inputs: jax.Array, count: jax.Array) -> jax.Array:
        """What the convolution needs behind count[b] tokens: inputs [B, conv_width - 1 + T, channels] from there."""
        kept = count[:, None] + jnp.arange(self.conv.shape[2])
        return jnp.take_along_axis(inputs, kept[..., None], axis=1)


class Convolution(nn.Module):
    """Depthwise causal convolution over the tokens of a segment, or along the paths of a tree behind a cache.

    inputs [B, T, channels] -> the same. Parameters: kernel [width, channels], the last tap on the token itself, and
    bias [channels].
    """

    width: int
    use_bias: bool

    @nn.compact
    def __call__(self, inputs: jax.Array, context: Context, cache: RecurrentCache | None) -> jax.Array:
        channels = inputs.shape[-1]
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=())
        kernel = parameter(self, "kernel", init, (self.width, channels)).astype(inputs.dtype)
        if cache is None:
            y = convolve(inputs, kernel, context.segments)
        else:
            conv = cache.read(context.length)[0]
            y = sum_taps(inputs, kernel, lambda back: _up(inputs, back, context, conv))
        if self.use_bias:
            y = y + parameter(self, "bias", nn.initializers.zeros, (channels,)).astype(y.dtype)
        return y


def recur(
    x: jax.Array,
    log_decay: jax.Array,
    b: jax.Array,
    c: jax.Array,
    context: Context,
    cache: RecurrentCache | None,
    chunk: int,
    scan: Scan = PLAIN,
) -> jax.Array:
    """y [B, T, H, P] of the recurrence over the tokens of a segment, or along the paths of a tree behind a cache.

    Shapes as in `research.ssm.ssd`, x times dt.
    """
    if cache is None:
        return scan(x, log_decay, b, c, chunk=chunk, segments=context.segments)[0]
    state = cache.read(context.length)[1]
    return ssd_tree(x, log_decay, b, c, tree=context.tree, state=state)


def init_dt(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """softplus^-1 of a step size that is log-uniform in [0.001, 0.1]."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(0.1)))
    return dt + jnp.log(-jnp.expm1(-dt))


def init_a(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """log of a rate that is uniform in [1, 16]."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def _up(inputs: jax.Array, back: int, context: Context, cached: jax.Array) -> jax.Array:
    """The inputs `back` places further up each node's path: of an ancestor, or of a committed token."""
    batch, count = context.positions.shape
    tree = jnp.broadcast_to(context.tree, (batch, count, count))
    depth = context.positions - context.length[:, None]
    # A path has one node at each depth.
    ancestor = tree & (depth[:, None, :] == depth[:, :, None] - back)
    found = jnp.einsum("bji,bic->bjc", ancestor.astype(inputs.dtype), inputs)
    place = cached.shape[1] + depth - back  # behind the root there is what was committed
    committed = jnp.take_along_axis(cached, jnp.clip(place, 0, cached.shape[1] - 1)[..., None], axis=1)
    return found + jnp.where((place < cached.shape[1])[..., None], committed.astype(inputs.dtype), 0)
