"""Evaluation token by token, through the cache, as decoding goes: for models whose `extend` is not their forward pass.

Sparse decoding prefills as the dense model does, so a forward pass over a whole text tests nothing of it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import UserError
from research.training.task import Batch, LanguageModelling, Metrics, language_metrics

PyTree = Any


def stepwise_logits(
    model: Any, params: PyTree, tokens: jax.Array, prompt: int, block: int = 1, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """tokens int32[B, T], the first `prompt` read at once and the others one by one -> float32 logits
    [B, T - prompt, V] behind each of the others. One compiled step, a scan.

    block: how many of the others a call reads, a divisor of their number; the same for caches that keep rows as they
    come in between. dtype: of the cache.
    """
    batch, length = tokens.shape
    variables = {"params": params}
    given = jnp.full((batch,), prompt, jnp.int32)
    _, _, fresh = model.apply(variables, tokens[:, :prompt], given, method="prefill")
    cache = model.init_cache(batch, length, dtype, margin=1).commit(fresh, None, given)

    def step(cache: Any, new: jax.Array) -> tuple[Any, jax.Array]:
        logits, _, fresh = model.apply(variables, new, cache, method="extend")
        # That the count depends on the logits orders the cache's write after its reads: it then happens in place.
        count = block + jnp.minimum(jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), 0)
        return cache.commit(fresh, None, count), logits

    _, logits = jax.lax.scan(step, cache, tokens[:, prompt:].reshape(batch, -1, block).swapaxes(0, 1))
    return logits.swapaxes(0, 1).reshape(batch, length - prompt, -1)


@dataclass(frozen=True)
class Stepwise(LanguageModelling):
    """Language modelling that is evaluated token by token behind the first `prompt` tokens of every row.

    Only targets of the later tokens count. Segments are not looked at: documents packed into a row see each other.
    Trains as `LanguageModelling`.
    """

    prompt: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.prompt < 1:
            raise UserError(f"Stepwise.prompt: {self.prompt}; at least 1 token is given")

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        length = batch["tokens"].shape[1]
        if self.prompt >= length:
            raise UserError(f"Stepwise.prompt: {self.prompt} of rows of {length} leave nothing to decode")
        logits = stepwise_logits(self.model, params, batch["tokens"], self.prompt)
        rest = {name: x[:, self.prompt :] for name, x in batch.items() if x.ndim > 1}
        return language_metrics(logits, rest)[0]
