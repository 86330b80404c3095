"""One training step as a pure function of (state, batch)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.training.partitioning import batch_sharding
from research.training.stages import Stage, merge, split
from research.training.state import State, step_key
from research.training.task import Batch, Metrics, Task

PyTree = Any


def make_step(
    task: Task,
    stage: Stage,
    transformation: optax.GradientTransformation,
    mask: PyTree,
    mesh: jax.sharding.Mesh,
    *,
    first_step: int,
    clip: float | None,
    ema: float | None,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step of a stage: gradient of the objective, clipping, update, moving average.

    first_step: updates done before the stage, to log the rate of the schedule. clip: the largest global norm
    of the gradient. ema: decay of the moving average, min(ema, (1 + t) / (10 + t)) at update t, so that a
    young average is not all initialisation.

    To the task's metrics the step adds `gradient_norm` (before clipping), `learning_rate` and, for a stage
    with loss weights, their weighted sum as `objective`; each with weight 1.
    """
    rate = stage.optimizer.schedule.over(stage.steps)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        trainable, frozen = split(state.params, mask)
        gradient, metrics = objective_gradient(task, stage, trainable, frozen, batch, step_key(state), mesh)
        norm = optax.tree.norm(gradient)
        if clip is not None:
            factor = jnp.where(norm > clip, clip / norm, 1.0)
            gradient = jax.tree.map(lambda g: g * factor, gradient)
        updates, opt_state = transformation.update(gradient, state.opt_state, trainable)
        params = merge(optax.apply_updates(trainable, updates), frozen)
        average = state.ema
        if ema is not None:
            done = state.step.astype(jnp.float32) + 1.0
            gain = 1.0 - jnp.minimum(ema, (1.0 + done) / (10.0 + done))
            average = jax.tree.map(
                lambda keep, a, p: a + gain * (p - a) if keep else a, mask, average, params
            )
        if hasattr(task, "remember"):
            params = task.remember(params, metrics)
            average = None if average is None else task.remember(average, metrics)
        one = jnp.ones((), jnp.float32)
        extra = {"gradient_norm": norm, "learning_rate": jnp.float32(rate(state.step - first_step))}
        if stage.loss_weights:
            means = {name: metrics[name][0] / metrics[name][1] for name in stage.loss_weights}
            extra["objective"] = sum(weight * means[name] for name, weight in stage.loss_weights.items())
        metrics |= {name: (value, one) for name, value in extra.items()}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=average), metrics

    return step


def objective_gradient(
    task: Task,
    stage: Stage,
    trainable: PyTree,
    frozen: PyTree,
    batch: Batch,
    key: jax.Array,
    mesh: jax.sharding.Mesh,
) -> tuple[PyTree, Metrics]:
    """(gradient with respect to `trainable`, the metrics of the whole batch), exact for any `accumulate`.

    The objective is sum_k w_k S_k / W_k, where S_k and W_k are the sum and weight of term k over all
    microbatches. A microbatch contributes the gradient of sum_k w_k (W_0 / W_k) s_k; the total is divided by
    W_0 once, at the end. With a single term that is the gradient of the sum of sums over the sum of weights.
    """
    weights = stage.weights()
    names = tuple(weights)

    def terms(trainable: PyTree, batch: Batch, key: jax.Array) -> tuple[dict[str, jax.Array], Metrics]:
        metrics = _float32(task.loss(merge(trainable, frozen), batch, key))
        return {name: metrics[name][0] for name in names}, metrics

    def contribution(batch: Batch, key: jax.Array, totals: Metrics | None) -> tuple[PyTree, Metrics]:
        sums, pullback, metrics = jax.vjp(lambda t: terms(t, batch, key), trainable, has_aux=True)
        cotangents = _cotangents(weights, metrics if totals is None else totals)
        return pullback({name: cotangents[name].astype(sums[name].dtype) for name in names})[0], metrics

    if stage.accumulate == 1:
        gradient, metrics = contribution(batch, key, None)
    else:
        parts = jax.tree.map(lambda x: _microbatches(x, stage.accumulate, mesh), batch)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(stage.accumulate))
        totals = None
        if len(names) > 1:
            # Weights depend on the batch alone, so all of this pass but their sums is dead code.
            totals = _sum_over(lambda part, k: terms(trainable, part, k)[1], parts, keys)
        gradient, metrics = _sum_over(lambda part, k: contribution(part, k, totals), parts, keys)
    total_weight = metrics[names[0]][1]
    return jax.tree.map(lambda g: g / total_weight, gradient), metrics


def _cotangents(weights: dict[str, float], metrics: Metrics) -> dict[str, jax.Array]:
    first = next(iter(weights))
    cotangents = {first: jnp.float32(weights[first])}
    for name in list(weights)[1:]:
        cotangents[name] = weights[name] * jax.lax.stop_gradient(metrics[first][1] / metrics[name][1])
    return cotangents


def _microbatches(x: jax.Array, count: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """[batch, ...] -> [count, batch / count, ...]. Row i goes to microbatch i mod count, on its device."""
    parts = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(parts, batch_sharding(mesh, leading=1))


def _sum_over(function: Callable[[Batch, jax.Array], PyTree], parts: Batch, keys: jax.Array) -> PyTree:
    """The sum of `function(microbatch, key)` over the microbatches, one at a time."""
    first = jax.tree.map(lambda x: x[0], (parts, keys))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *first))

    def body(total: PyTree, xs: Sequence[Any]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(*xs)), None

    return jax.lax.scan(body, zeros, (parts, keys))[0]


def _float32(metrics: Metrics) -> Metrics:
    return {name: (jnp.float32(total), jnp.float32(weight)) for name, (total, weight) in metrics.items()}
