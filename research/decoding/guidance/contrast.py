"""Contrast of a strong and a weak pass over the same tokens, with adaptive plausibility (arXiv 2210.15097).

    model, params = contrasted(strong, weak, params, beta=0.5, alpha=0.1)
    Generator(model, params).generate(["def main("])

Both passes read every token, each with a cache of its own, and with z_s, z_w their logits

    V = {i: z_s[i] >= max(z_s) + log alpha},   z = (1 + beta) z_s - beta z_w on V, nothing elsewhere.

The result is a model like any other: processors, verifiers and drafters see contrasted logits alone. What makes the
weak pass weak is the caller's: `research.moe.scmoe` routes its experts differently.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.nn.cache import Cache, Fresh
from research.nn.transformer import LayerStack, unscan_layers

EXCLUDED = -1e30  # finite: the softmax of a row in which only one token is plausible stays free of NaN


class TwoCaches(struct.PyTreeNode):
    """What the strong and the weak pass remember of the same B sequences."""

    strong: Cache
    weak: Cache

    @property
    def length(self) -> jax.Array:
        """int32[B] committed tokens."""
        return self.strong.length

    def commit(
        self, fresh: tuple[tuple[Fresh, ...], tuple[Fresh, ...]], path: jax.Array | None, count: jax.Array
    ) -> "TwoCaches":
        """As `Cache.commit`; the same path in both."""
        return TwoCaches(self.strong.commit(fresh[0], path, count), self.weak.commit(fresh[1], path, count))

    def rollback(self, length: jax.Array) -> "TwoCaches":
        return TwoCaches(self.strong.rollback(length), self.weak.rollback(length))

    def select(self, rows: jax.Array) -> "TwoCaches":
        return TwoCaches(self.strong.select(rows), self.weak.select(rows))


@dataclasses.dataclass(frozen=True)
class Contrasted:
    """A decoder's contract (`init_cache`, `prefill`, `extend`, `logits`) with contrasted logits.

    Its parameters are {"model": those that both passes share, "beta": f32[], "log_alpha": f32[], "rngs": keys of the
    weak pass by stream}, so other numbers need no new compilation. Hidden states are those of both passes side by
    side [..., 2D].

    Args:
        strong, weak: two decoders of one parameter tree, layers unrolled.
    """

    strong: Any
    weak: Any

    @property
    def max_length(self) -> int:
        return self.strong.max_length

    @property
    def vocab_size(self) -> int:
        return self.strong.vocab_size

    @property
    def scan_layers(self) -> bool:
        return False

    def init_cache(self, *args: Any, **options: Any) -> TwoCaches:
        return TwoCaches(self.strong.init_cache(*args, **options), self.weak.init_cache(*args, **options))

    def apply(self, variables: dict[str, Any], *args: Any, method: str) -> Any:
        """`prefill`, `extend` and `logits` as linen's `apply` would call them."""
        methods = {"prefill": self._prefill, "extend": self._extend, "logits": self._logits}
        if method not in methods:
            raise UserError(
                f"a contrasted model has no {method!r}: drafters that share the target's parts can't serve two passes"
            )
        return methods[method](variables["params"], *args)

    def _prefill(
        self, params: Any, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any]:
        strong = self.strong.apply({"params": params["model"]}, tokens, lengths, method="prefill")
        weak = self._weak(params, tokens, lengths, method="prefill")
        return self._contrast(params, strong, weak)

    def _extend(
        self,
        params: Any,
        tokens: jax.Array,
        cache: TwoCaches,
        tree: jax.Array | None = None,
        depth: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Any]:
        variables = {"params": params["model"]}
        strong = self.strong.apply(variables, tokens, cache.strong, tree, depth, method="extend")
        weak = self._weak(params, tokens, cache.weak, tree, depth, method="extend")
        return self._contrast(params, strong, weak)

    def _weak(self, params: Any, *args: Any, method: str) -> Any:
        return self.weak.apply({"params": params["model"]}, *args, rngs=params["rngs"], method=method)

    def _logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        both = (
            model.apply({"params": params["model"]}, half, method="logits")
            for model, half in zip((self.strong, self.weak), jnp.split(hidden, 2, -1), strict=True)
        )
        return contrast(*both, params["beta"], params["log_alpha"])

    def _contrast(self, params: Any, strong: Any, weak: Any) -> tuple[jax.Array, jax.Array, Any]:
        logits = contrast(strong[0], weak[0], params["beta"], params["log_alpha"])
        return logits, jnp.concatenate([strong[1], weak[1]], axis=-1), (strong[2], weak[2])


def contrast(strong: jax.Array, weak: jax.Array, beta: jax.Array, log_alpha: jax.Array) -> jax.Array:
    """Logits f32[..., V] of both passes -> (1 + beta) strong - beta weak where plausible, else `EXCLUDED`."""
    strong, weak = strong.astype(jnp.float32), weak.astype(jnp.float32)
    plausible = strong >= strong.max(axis=-1, keepdims=True) + log_alpha
    # strong + beta (strong - weak): equal passes and beta = 0 give the strong logits to the bit.
    return jnp.where(plausible, strong + beta * (strong - weak), EXCLUDED)


def contrasted(
    strong: LayerStack,
    weak: LayerStack,
    params: Any,
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    rngs: dict[str, jax.Array] | None = None,
) -> tuple[Contrasted, dict[str, Any]]:
    """A model and its parameters that decode by contrast.

    Args:
        strong, weak: models of the same parameters, scanned or not.
        beta: how far to go from the weak logits beyond the strong ones; 0 is plain decoding of the plausible.
        alpha: a token is plausible if the strong pass finds it at least alpha times as probable as its best.
        rngs: typed keys for a weak pass that draws; the same in every call.

    Raises:
        UserError: beta below zero, or alpha outside (0, 1].
    """
    if not 0.0 <= beta < math.inf:
        raise UserError(f"beta={beta}: a number from 0 is expected")
    if not 0.0 < alpha <= 1.0:
        raise UserError(f"alpha={alpha}: a number in (0, 1] is expected")
    weak, _ = unscan_layers(weak, params)
    strong, params = unscan_layers(strong, params)
    numbers = {"beta": jnp.float32(beta), "log_alpha": jnp.float32(math.log(alpha))}
    return Contrasted(strong, weak), {"model": params, "rngs": rngs or {}, **numbers}
