"""Transformer block and the stack of blocks that decoders and encoders share."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.common import target_platform
from research.errors import UserError
from research.nn.attention import Context
from research.nn.cache import Fresh, LayerCache
from research.nn.cpu_kernels import PRODUCT
from research.nn.linear import check_sizes, check_softcap
from research.nn.mlp import feed_forward
from research.nn.norm import RMSNorm
from research.nn.reports import COLLECTIONS

Remat = Literal["none", "dots", "full"]

_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class VirtualRows(Protocol):
    """A pytree that makes rows which join the tokens of an `extend` between layers and are never committed.

    Group j has sizes[j] rows for every row of the batch and joins before layer layers[j] (0: beside the
    embedded tokens; ascending). size: rows of all groups together.
    """

    layers: tuple[int, ...]
    sizes: tuple[int, ...]
    size: int

    def rows(self, group: int, x: jax.Array) -> jax.Array:
        """x [B, N, width], the tokens' states there -> [B, sizes[group], width]."""


Hook = Callable[[jax.Array, Context, LayerCache | None], tuple[jax.Array, Context, Fresh | None]]
"""Acts between two layers: (hidden states [B, T, width], context, own cache) -> (hidden states, context, own fresh
rows). It may change the number of tokens, in which case the context says where the new ones are. One that returns None
for its rows has no cache, and takes no notice of the one it is given."""


class Block(nn.Module):
    """Pre-norm residual block: x + mix(norm(x)), then x + mlp(norm(x)).

    Args:
        attention: a mixer, (x, context, cache) -> (y, fresh rows).
        mlp: any x -> y, or (x, context) -> y where it `takes_context`; None: the block is its mixer alone (Mamba).
        norm: template of the block's norms.
        post_norms: also normalise what the mixer and the mlp add (Gemma 2 and 3).
        dropout: rate on both residual branches, active when `apply` is given a `dropout` key.
    """

    attention: nn.Module
    mlp: nn.Module | None
    norm: nn.Module = RMSNorm()
    post_norms: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, Fresh]:
        y, fresh = self.attention(self.norm.copy(name="attention_norm")(x), context, cache)
        x = x + self._branch(y, "attention")
        if self.mlp is None:
            return x, fresh
        y = feed_forward(self.mlp, self.norm.copy(name="mlp_norm")(x), context)
        return x + self._branch(y, "mlp"), fresh

    def _branch(self, y: jax.Array, name: str) -> jax.Array:
        if self.post_norms:
            y = self.norm.copy(name=f"{name}_post_norm")(y)
        if self.dropout:
            y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        return y


class _Repeat(nn.Module):
    """One period of the block pattern, the body of the scan."""

    blocks: tuple[nn.Module, ...]
    remat: Remat

    @nn.compact
    def __call__(self, stream: "Stream", context: Context) -> tuple["Stream", tuple[Fresh, ...]]:
        fresh = []
        for i, block in enumerate(self.blocks):
            stream, rows = run_block(block.copy(name=f"layer_{i}"), stream, context, None, self.remat)
            fresh.append(rows)
        return stream, tuple(fresh)


class Stream(struct.PyTreeNode):
    """What runs through the layers: the hidden states, and beside them what some blocks carry through depth.

    x [B, T, width] (or flat); depth: any pytree of arrays with the leading axes of x, or None.
    """

    x: jax.Array
    depth: Any = None


def run_block(
    block: nn.Module, stream: Stream, context: Context, cache: LayerCache | None, remat: Remat
) -> tuple[Stream, Fresh]:
    """One block. A block with `init_depth` takes and returns the whole stream, any other the hidden states."""
    carries = hasattr(block, "init_depth")
    run = block if remat == "none" else _rematerialized(block, remat)
    out, fresh = run(stream if carries else stream.x, context, cache)
    return (out if carries else stream.replace(x=out)), fresh


def _rematerialized(block: nn.Module, remat: Remat) -> Callable[..., Any]:
    lifted = nn.remat(lambda module, *args: module(*args), policy=_POLICIES[remat])
    return functools.partial(lifted, block)


class LayerStack(nn.Module):
    """Base of models that are a stack of blocks. Subclasses call `run_layers` from their own methods.

    Between the layers goes a `Stream`: a block with a method `init_depth(x) -> state` carries its own state through
    depth, (stream, context, cache) -> (stream, fresh rows); what the first such block of the pattern makes of the
    embedded tokens is what all of them pass on, and blocks without the method leave it alone.

    Args:
        blocks: the pattern of blocks; layer i is a copy of blocks[i % len(blocks)].
        num_layers: how many.
        scan_layers: compile one period of the pattern and loop over it (`lax.scan`); parameters are then
            stacked below `layers/`. Unrolled layers run faster on CPU, scanned ones compile faster when there
            are many.
        remat: what the backward pass recomputes: nothing, all but matrix products ("dots"), all ("full").
        token_layout: "flat" keeps activations as [batch * length, width] outside attention, which saves CPU a
            transposition in every weight gradient; "batched" keeps [batch, length, width], needed where the
            length is sharded; "auto" is flat on CPU.
    """

    blocks: tuple[nn.Module, ...]
    num_layers: int
    scan_layers: bool = False
    remat: Remat = "none"
    token_layout: Literal["auto", "flat", "batched"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.blocks:
            raise UserError(f"{type(self).__name__}.blocks is empty; the pattern needs at least one block")
        # No layers are a model too, but none to train: see `research.training.feed.check_fit`.
        check_sizes(self, "width", "vocab_size", "max_length", "num_classes", "patch")
        check_softcap(self, "logit_softcap")

    def make_layers(self) -> None:
        """Call in `setup`: creates the layers under their names."""
        period = len(self.blocks)
        if self.scan_layers:
            if self.num_layers % period:
                raise UserError(
                    f"scan_layers needs num_layers ({self.num_layers}) to be a multiple of the pattern "
                    f"({period})"
                )
            scan = nn.scan(
                _Repeat,
                variable_axes={"params": 0, **dict.fromkeys(COLLECTIONS, 0)},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.num_layers // period,
            )
            self.layers = scan(self.blocks, self.remat)
        else:
            self.layers = [self.blocks[i % period].copy(name=f"layer_{i}") for i in range(self.num_layers)]

    def run_layers(
        self,
        x: jax.Array,
        context: Context,
        cache: tuple[LayerCache, ...] | None = None,
        virtual: VirtualRows | None = None,
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        """x [B, T, width] -> hidden states and the fresh rows of every layer.

        With `virtual` rows, which need a cache, the hidden states are those of the T tokens and then of the
        virtual rows, for all of which `context` has places; the fresh rows are those of the tokens.
        """
        context = self.with_store(context)
        if self.scan_layers:
            if cache is not None:
                raise UserError("decoding runs unrolled layers: convert with `unscan_layers` first")
            shape = x.shape
            stream, stacked = self.layers(self.enter(x), context)
            repeats = self.num_layers // len(self.blocks)
            fresh = tuple(jax.tree.map(lambda y: y[i], rows) for i in range(repeats) for rows in stacked)  # noqa: B023
            return stream.x.reshape(shape), fresh
        stream = self.enter(x)
        if virtual is None:
            stream, fresh = self.run_span(stream, context, cache, 0, self.num_layers)
            return stream.x.reshape(x.shape), tuple(fresh)
        batch, tokens, width = x.shape
        fresh, start, count = [], 0, tokens
        for group, boundary in enumerate((*virtual.layers, self.num_layers)):
            # Layers below a boundary run without the rows that join there.
            stream, rows = self.run_span(stream, _leading(context, count), cache, start, boundary)
            fresh += jax.tree.map(lambda y: y[:, :, :tokens], rows)
            x = stream.x.reshape(batch, count, width)
            if group < len(virtual.layers):
                joining = self.enter(virtual.rows(group, x[:, :tokens]).astype(x.dtype))
                stream = jax.tree.map(functools.partial(_join, batch), stream, joining)
                count += virtual.sizes[group]
            start = boundary
        return x, tuple(fresh)

    def run_hooked(
        self,
        x: jax.Array,
        context: Context,
        hooks: Mapping[int, Sequence[Hook]],
        cache: tuple[LayerCache, ...] | None = None,
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        """As `run_layers`; hooks[i] act in their order before layer i, those of `num_layers` behind the last.

        The fresh rows, and the cache, are those of the layers and then those of the hooks that have any. Without hooks
        it is `run_layers`.
        """
        if not hooks:
            return self.run_layers(x, context, cache)
        if self.scan_layers:
            raise UserError("hooks act between unrolled layers: set scan_layers=False")
        if wrong := [place for place in hooks if not 0 <= place <= self.num_layers]:
            raise UserError(f"a hook before layer {wrong[0]}: there are {self.num_layers} layers")
        context = self.with_store(context)
        own = None if cache is None else cache[self.num_layers :]
        stream, fresh, added, start = self.enter(x), [], [], 0
        for place in sorted({*hooks, self.num_layers}):
            stream, rows = self.run_span(stream, context, cache, start, place)
            fresh, start = fresh + rows, place
            x = stream.x.reshape(*context.positions.shape, -1)
            for hook in hooks.get(place, ()):
                held = own[len(added)] if own is not None and len(added) < len(own) else None
                x, context, rows = hook(x, context, held)
                added += [] if rows is None else [rows]
            flat = x.reshape(-1, x.shape[-1]) if stream.x.ndim == 2 else x
            if stream.depth is not None and flat.shape != stream.x.shape:
                raise UserError("blocks carry a state through depth here: no token can join between layers")
            stream = stream.replace(x=flat)
        return x, (*fresh, *added)

    def init_layer_caches(
        self, batch: int, capacity: int, margin: int, dtype: jnp.dtype
    ) -> tuple[LayerCache, ...]:
        """The empty cache of every layer's attention."""
        period = len(self.blocks)
        return tuple(
            self.blocks[i % period].attention.init_cache(batch, capacity, margin, dtype)
            for i in range(self.num_layers)
        )

    def with_store(self, context: Context) -> Context:
        """Broadcast to the layers, scanned ones too: what they share is there once."""
        if not self.has_variable("params", "store"):
            return context
        return context.replace(store=self.get_variable("params", "store"))

    def run_span(
        self, stream: Stream, context: Context, cache: tuple[LayerCache, ...] | None, start: int, stop: int
    ) -> tuple[Stream, list[Fresh]]:
        """Layers start .. stop - 1, of what `enter` gives and a context `with_store`: for who acts between the
        layers of several stacks in turn."""
        fresh = []
        for i in range(start, stop):
            layer_cache = None if cache is None else cache[i]
            stream, rows = run_block(self.layers[i], stream, context, layer_cache, self.remat)
            fresh.append(rows)
        return stream, fresh

    def enter(self, x: jax.Array) -> Stream:
        """x [B, T, width] in the token layout, with the depth state that the first block with one begins with."""
        flat = self.token_layout == "flat" or (self.token_layout == "auto" and target_platform() == "cpu")
        x = x.reshape(-1, x.shape[-1]) if flat else x
        carrying = (block for block in self.blocks if hasattr(block, "init_depth"))
        first = next(carrying, None)
        return Stream(x, None if first is None else first.init_depth(x))


def tree_places(
    length: jax.Array, count: int, tree: jax.Array | None, depth: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Of `count` new rows behind int32[B] committed ones: positions int32[B, N] and tree bool[b, N, N].

    tree bool[N, N] or [B, N, N] and depth int32[N] or [B, N] as in a decoder's `extend`: a chain by default.
    """
    if depth is None:
        depth = jnp.arange(count)
    if tree is None:
        tree = jnp.tril(jnp.ones((count, count), bool))
    positions = length[:, None] + jnp.broadcast_to(depth, (length.shape[0], count))
    return positions, tree if tree.ndim == 3 else tree[None]


def _join(batch: int, old: jax.Array, new: jax.Array) -> jax.Array:
    """Rows of `new` behind those of `old` for every sequence; [B, T, ...] or [B * T, width] alike."""
    shape = old.shape[old.ndim - 1 :]
    both = jnp.concatenate([y.reshape(batch, -1, *shape) for y in (old, new)], axis=1)
    return both.reshape(-1, *shape) if old.ndim == 2 else both


def _leading(context: Context, count: int) -> Context:
    """The places of the first `count` rows of a call with a cache."""
    return context.replace(positions=context.positions[:, :count], tree=context.tree[:, :count, :count])


def scan_params(params: dict, period: int) -> dict:
    """Parameters of unrolled layers -> scanned ones (`layer_i/...` -> `layers/layer_j/...`, stacked)."""
    count = sum(bool(re.fullmatch(r"layer_\d+", name)) for name in params)
    if count % period:
        raise UserError(f"{count} layers are not a multiple of the pattern of {period}")
    rest = {name: value for name, value in params.items() if not re.fullmatch(r"layer_\d+", name)}
    stacked = {}
    for j in range(period):
        trees = [params[f"layer_{i}"] for i in range(j, count, period)]
        shapes = [jax.tree.map(jnp.shape, tree) for tree in trees]
        if any(shape != shapes[0] for shape in shapes):
            raise UserError(f"layers {list(range(j, count, period))} differ in shape and can't be scanned")
        stacked[f"layer_{j}"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    return {**rest, "layers": stacked}


def unscan_params(params: dict) -> dict:
    """Inverse of `scan_params`."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    period = len(params["layers"])
    for j in range(period):
        tree = params["layers"][f"layer_{j}"]
        repeats = jax.tree.leaves(tree)[0].shape[0]
        for r in range(repeats):
            rest[f"layer_{r * period + j}"] = jax.tree.map(lambda leaf: leaf[r], tree)  # noqa: B023
    return rest


def holds_stack(model: nn.Module) -> bool:
    """Whether a model is no stack, but has one as its part `decoder` (one that reads images)."""
    return not isinstance(model, LayerStack) and isinstance(getattr(model, "decoder", None), LayerStack)


def stack_of(model: nn.Module, params: dict) -> tuple[nn.Module, dict]:
    """The decoder that a model holds, with its parameters; the arguments where it holds none."""
    return (model.decoder, params["decoder"]) if holds_stack(model) else (model, params)


def in_stack(change: Callable[..., tuple[nn.Module, dict]]) -> Callable[..., tuple[nn.Module, dict]]:
    """Decorates (model, params, ...) -> (model, params) of a stack: a model that holds one is changed there."""

    @functools.wraps(change)
    def changed(model: nn.Module, params: dict, *args: Any, **options: Any) -> tuple[nn.Module, dict]:
        part, own = change(*stack_of(model, params), *args, **options)
        if not holds_stack(model):
            return part, own
        return model.clone(decoder=part), params | {"decoder": own}

    return changed


@in_stack
def unscan_layers(model: LayerStack, params: dict) -> tuple[LayerStack, dict]:
    """The same model with unrolled layers; returns its arguments where it is unrolled already."""
    if not model.scan_layers:
        return model, params
    return model.clone(scan_layers=False), unscan_params(params)
