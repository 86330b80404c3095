"""What a plan is calibrated on: the dense model's own answers to questions that need far context.

Human answers, or all tokens alike, put the influence where the model does not look (arXiv 2406.14909, section 4.2).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.data.pipeline import Dataset
from research.errors import UserError
from research.nn.transformer import LayerStack, unscan_layers

PyTree = Any


def draw_rows(data: Dataset, count: int, batch_size: int = 32) -> dict[str, np.ndarray]:
    """The first `count` rows of `data` that are one document with an answer: tokens, targets, weights [count, T].

    Raises UserError where an epoch has fewer.
    """
    names = ("tokens", "targets", "weights")
    found: list[dict[str, np.ndarray]] = []
    kept = 0
    for batch in data.batches(0, batch_size, epochs=1):
        whole = (batch["segments"] == 1).all(axis=1) & (batch["weights"].sum(axis=1) > 0)
        found.append({name: np.asarray(batch[name])[whole] for name in names})
        kept += int(whole.sum())
        if kept >= count:
            return {name: np.concatenate([part[name] for part in found])[:count] for name in names}
    raise UserError(f"calibration: {count} rows of one document each are needed, the data has {kept}")


@functools.partial(jax.jit, static_argnums=(0, 4))
def _answer(
    model: LayerStack, params: PyTree, tokens: jax.Array, weights: jax.Array, start: int
) -> tuple[jax.Array, jax.Array]:
    """-> tokens and targets int32[B, T], the targets with weight chosen by the model; the first is at `start`."""
    batch, length = tokens.shape
    variables = {"params": params}
    lengths = jnp.full((batch,), start + 1)
    logits, _, fresh = model.apply(variables, tokens[:, : start + 1], lengths, method="prefill")
    cache = model.init_cache(batch, length, margin=1).commit(fresh, None, lengths)

    def step(carry: tuple, inputs: tuple) -> tuple:
        cache, chosen = carry
        given, answers = inputs  # the data's token, and whether the model's own stands in its place
        token = jnp.where(answers > 0, chosen, given)
        logits, _, fresh = model.apply(variables, token[:, None], cache, method="extend")
        cache = cache.commit(fresh, None, jnp.ones_like(lengths))
        best = jnp.argmax(logits[:, 0], axis=-1).astype(token.dtype)
        return (cache, best), (token, best)

    first = jnp.argmax(logits, axis=-1).astype(tokens.dtype)
    places = (tokens[:, start + 1 :].T, weights[:, start:-1].T)
    _, (later, best) = jax.lax.scan(step, (cache, first), places)
    tokens = jnp.concatenate([tokens[:, : start + 1], later.T], axis=1)
    best = jnp.concatenate([first[:, None], best.T], axis=1)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    own = jnp.where(weights[:, start:] > 0, best, targets[:, start:])
    return tokens, jnp.concatenate([targets[:, :start], own], axis=1)


def own_answers(
    model: LayerStack, params: PyTree, batch: dict[str, np.ndarray], batch_size: int = 16
) -> dict[str, np.ndarray]:
    """The batch with the targets that have weight, and the tokens after them, as the model answers greedily.

    Token by token through the cache, one program for all rows: what is not an answer (the next question) is given.

    Raises UserError for tokens outside the model's vocabulary.
    """
    model, params = unscan_layers(model, params)
    tokens, weights = np.asarray(batch["tokens"]), np.asarray(batch["weights"])
    count = len(tokens)
    if tokens.max() >= model.vocab_size:
        raise UserError(
            f"the calibration data has token {tokens.max()}, the model's vocabulary {model.vocab_size}"
        )
    start = int(np.argmax(weights.any(axis=0)))
    answered = []
    for first in range(0, count, batch_size):
        part = [x[first : first + batch_size] for x in (tokens, weights)]
        part = [np.pad(x, ((0, batch_size - len(x)), (0, 0))) for x in part]
        answered.append([np.asarray(x) for x in _answer(model, params, *part, start)])
    tokens, targets = (np.concatenate(parts)[:count] for parts in zip(*answered, strict=True))
    return {"tokens": tokens, "targets": targets, "weights": weights}
