"""Classifier-free guidance of a conditional language model (arXiv 2207.12598; for token models 2306.17806, eq. 7).

    model, params = guided(model, params, scale=3.0, conditions=(256, 264), unconditional=264)
    Generator(model, params, proposer=...).generate([[256]])

Every sequence runs twice, once with its condition and once without, in one call of twice the batch, and

    logits = scale * (conditional - unconditional) + unconditional.

The result is a model like any other, so processors, verifiers and drafters see guided logits alone: what is drawn
from and what is tested are guided alike.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.nn.cache import Cache, Fresh
from research.nn.transformer import LayerStack, unscan_layers


class PairedCache(struct.PyTreeNode):
    """The cache of B sequences, each with a condition (rows 0..B-1 of `both`) and without (rows B..2B-1)."""

    both: Cache

    @property
    def length(self) -> jax.Array:
        """int32[B] committed tokens."""
        return self.both.length[: self.both.length.shape[0] // 2]

    def commit(self, fresh: tuple[Fresh, ...], path: jax.Array | None, count: jax.Array) -> "PairedCache":
        """As `Cache.commit`, the fresh rows being those of both halves."""
        return PairedCache(self.both.commit(fresh, None if path is None else _twice(path), _twice(count)))

    def rollback(self, length: jax.Array) -> "PairedCache":
        return PairedCache(self.both.rollback(_twice(length)))

    def select(self, rows: jax.Array) -> "PairedCache":
        return PairedCache(self.both.select(jnp.concatenate([rows, rows + self.length.shape[0]])))


@dataclasses.dataclass(frozen=True)
class Guided:
    """A decoder's contract (`init_cache`, `prefill`, `extend`, `logits`) with guided logits.

    Its parameters are {"model": the model's, "scale": float32[]}, so another scale needs no new compilation.
    Hidden states are those of both halves side by side [..., 2D].

    Args:
        model: the decoder, layers unrolled.
        conditions: (first, end) of the token ids that condition, wherever they stand in a prompt.
        unconditional: the token id that replaces them.
    """

    model: Any
    conditions: tuple[int, int]
    unconditional: int

    @property
    def max_length(self) -> int:
        return self.model.max_length

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def scan_layers(self) -> bool:
        return False

    def init_cache(self, batch: int, *args: Any, **options: Any) -> PairedCache:
        return PairedCache(self.model.init_cache(2 * batch, *args, **options))

    def apply(self, variables: dict[str, Any], *args: Any, method: str) -> Any:
        """`prefill`, `extend` and `logits` as linen's `apply` would call them."""
        methods = {"prefill": self._prefill, "extend": self._extend, "logits": self._logits}
        if method not in methods:
            raise UserError(
                f"a guided model has no {method!r}: a drafter that shares the target's parts can't draft for two halves"
            )
        return methods[method](variables["params"], *args)

    def _prefill(
        self, params: Any, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any]:
        first, end = self.conditions
        without = jnp.where((tokens >= first) & (tokens < end), self.unconditional, tokens)
        pair = jnp.concatenate([tokens, without])
        return self._guide(params, self._run(params, "prefill", pair, _twice(lengths)))

    def _extend(
        self,
        params: Any,
        tokens: jax.Array,
        cache: PairedCache,
        tree: jax.Array | None = None,
        depth: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Any]:
        tree = _twice(tree) if tree is not None and tree.ndim == 3 else tree
        depth = _twice(depth) if depth is not None and depth.ndim == 2 else depth
        return self._guide(params, self._run(params, "extend", _twice(tokens), cache.both, tree, depth))

    def _logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        return self._combine(
            params, *(self._run(params, "logits", half) for half in jnp.split(hidden, 2, -1))
        )

    def _run(self, params: Any, method: str, *args: Any) -> Any:
        return self.model.apply({"params": params["model"]}, *args, method=method)

    def _guide(
        self, params: Any, result: tuple[jax.Array, jax.Array, Any]
    ) -> tuple[jax.Array, jax.Array, Any]:
        logits, hidden, fresh = result
        return (
            self._combine(params, *jnp.split(logits, 2)),
            jnp.concatenate(jnp.split(hidden, 2), axis=-1),
            fresh,
        )

    def _combine(self, params: Any, conditional: jax.Array, unconditional: jax.Array) -> jax.Array:
        scale = params["scale"].astype(jnp.float32)
        return scale * (conditional - unconditional) + unconditional


def guided(
    model: LayerStack, params: Any, scale: float, *, conditions: tuple[int, int], unconditional: int
) -> tuple[Guided, dict[str, Any]]:
    """A model and its parameters under guidance; `Guided` says what the arguments are.

    scale 1 is the conditional model, 0 the unconditional one; above 1 the condition is overstated.

    Raises:
        UserError: a scale that is no number, or token ids outside the vocabulary.
    """
    if not abs(scale) < float("inf"):
        raise UserError(f"guidance scale {scale}: a number is expected")
    first, end = conditions
    if not 0 <= first < end <= model.vocab_size:
        raise UserError(
            f"conditions {conditions}: ids from 0 to the vocabulary of {model.vocab_size} are expected"
        )
    if not 0 <= unconditional < model.vocab_size:
        raise UserError(f"token {unconditional} is outside the vocabulary of {model.vocab_size}")
    model, params = unscan_layers(model, params)
    return Guided(model, conditions, unconditional), {"model": params, "scale": jnp.float32(scale)}


def _twice(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x])
