"""Task heads: what reads the tokens of an encoder, and the loss of what it says."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.nn.linear import Linear
from research.nn.pool import largest
from research.training.task import Batch, Metrics, classification_metrics

Pool = Literal["class", "mean", "class_max", "flat"]


def pool_tokens(x: jax.Array, mask: jax.Array | None, pool: Pool) -> jax.Array:
    """x [B, 1 + S, D], the class token first, mask bool[B, 1 + S] -> [B, D], or [B, 2 D] and [B, S D].

    "class": the class token. "mean": of the others that are there. "class_max": the class token and the maximum of the
    others side by side (point clouds). "flat": all others side by side, those that are not there 0. Where there are no
    others, mean and maximum are 0.
    """
    if pool == "class":
        return x[:, 0]
    tokens = x[:, 1:]
    there = jnp.ones(tokens.shape[:2], bool) if mask is None else mask[:, 1:]
    if pool == "class_max":
        low = jnp.finfo(tokens.dtype).min
        most = largest(jnp.where(there[..., None], tokens, low), axis=1)
        most = jnp.where(jnp.any(there, axis=1)[:, None], most, 0)
        return jnp.concatenate([x[:, 0], most], axis=-1)
    tokens = jnp.where(there[..., None], tokens, 0)
    if pool == "flat":
        return tokens.reshape(x.shape[0], -1)
    return jnp.sum(tokens, axis=1) / jnp.maximum(jnp.sum(there, axis=1), 1)[:, None].astype(tokens.dtype)


class ClassHead(nn.Module):
    """[B, 1 + S, D] -> float32 logits [B, num_classes]. Metrics: `loss` (nats), `accuracy`; of `labels`."""

    num_classes: int
    pool: Pool = "mean"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        pooled = pool_tokens(x, mask, self.pool)
        return Linear(self.num_classes, use_bias=True, name="out")(pooled).astype(jnp.float32)

    def measure(self, outputs: jax.Array, batch: Batch) -> Metrics:
        return classification_metrics(outputs, batch)


class NumberHead(nn.Module):
    """[B, 1 + S, D] -> f32[B, outputs]. Metrics: `loss` (mean squared error), `error` (mean absolute); of `targets`."""

    outputs: int = 1
    pool: Pool = "mean"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        pooled = pool_tokens(x, mask, self.pool)
        return Linear(self.outputs, use_bias=True, name="out")(pooled).astype(jnp.float32)

    def measure(self, outputs: jax.Array, batch: Batch) -> Metrics:
        return number_metrics(outputs, batch)


class ForecastHead(nn.Module):
    """[B, 1 + L, D], a token a step -> f32[B, horizon, channels], what comes next; metrics as of `NumberHead`.

    Every step gives its channels, and every future step is a mixture of those, the same for all channels.
    """

    horizon: int
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        steps = Linear(self.channels, use_bias=True, name="channels_out")(x[:, 1:])
        future = Linear(self.horizon, use_bias=True, name="time")(steps.swapaxes(1, 2))
        return future.swapaxes(1, 2).astype(jnp.float32)

    def measure(self, outputs: jax.Array, batch: Batch) -> Metrics:
        return number_metrics(outputs, batch)


def number_metrics(outputs: jax.Array, batch: Batch) -> Metrics:
    """outputs f32[B, ...] and `targets` of that shape -> {"loss": squared error, "error": absolute error}, means over a
    record."""
    if outputs.shape != batch["targets"].shape:
        found, said = (list(x.shape[1:]) for x in (batch["targets"], outputs))
        raise UserError(f"targets of a record are {found}; its head says {said}")
    difference = (outputs - batch["targets"]).reshape(outputs.shape[0], -1)
    weights = batch["weights"]
    weight = jnp.sum(weights)
    return {
        "loss": (jnp.sum(weights * jnp.mean(jnp.square(difference), axis=1)), weight),
        "error": (jnp.sum(weights * jnp.mean(jnp.abs(difference), axis=1)), weight),
    }
