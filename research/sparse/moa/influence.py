"""Attention influence: the cost, to first order, of masking an entry of an attention matrix (arXiv 2406.14909, eq. 4).

With A = softmax of a row's scores, g = dL/dA, and the other entries renormalised,

    E_ij = A_ij / (1 - A_ij) * (sum_n g_in A_in - g_ij)

A kernel in the place of a layer's own computes E in the derivative of the loss: the model is not edited. It runs the
dense product forward; backward it has the output's cotangent dO, hence g_ij = <dO_i, v_j>, and gives the block sums of
|E| as the cotangent of an input that is zero.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.nn.attention import Attention
from research.nn.attention_kernels import NEGATIVE, DenseAttention, cap
from research.nn.masks import Causal, MaskRule
from research.nn.transformer import LayerStack, unscan_layers
from research.training.task import cross_entropy

PyTree = Any

# Nats per answer below which the gradient of a float32 softmax is mostly rounding.
_SATURATED = 1e-6


def influence(scores: jax.Array, gradient: jax.Array) -> jax.Array:
    """scores [..., T, T], masked ones at most NEGATIVE, and g = dL/dA -> E [..., T, T], 0 where masked.

    A row's only entry, which nothing could replace, has -g A. In the dtype of its arguments: float32 suffices, as
    1 - A is never taken where it would cancel.
    """
    top = jnp.max(scores, axis=-1, keepdims=True)
    weight = jnp.where(scores > NEGATIVE, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    mean = jnp.sum(weight * gradient, axis=-1, keepdims=True) / total
    # The largest entry alone can be near 1: for it the others are summed without it.
    largest = jnp.arange(scores.shape[-1]) == jnp.argmax(scores, axis=-1)[..., None]
    others = jnp.where(largest, 0.0, weight)
    rest = jnp.sum(others, axis=-1, keepdims=True)
    alone = rest == 0
    others_mean = jnp.sum(others * gradient, axis=-1, keepdims=True) / jnp.where(alone, 1.0, rest)
    of_largest = weight / total * (jnp.where(alone, 0.0, others_mean) - gradient)
    of_others = weight / jnp.where(largest, 1.0, total - weight) * (mean - gradient)
    return jnp.where(largest, of_largest, of_others)


@dataclasses.dataclass(frozen=True, eq=False)
class Tapped:
    """An `AttentionKernel`: dense causal attention whose derivative with respect to `tap` is the influence.

    tap: float32 zeros [H, nb, nb], whose cotangent is |E| summed over blocks of `block` x `block` and over the batch.
    """

    tap: jax.Array
    block: int

    def __call__(self, query, key, value, rule, *, segments, prefix, scale, softcap):
        if segments is not None or prefix is not None:
            raise UserError("attention influence is of whole rows: without segments or a prefix")
        return _tapped(query, key, value, self.tap, rule, self.block, scale, softcap)


def _dense(query, key, value, rule, scale, softcap):
    numbers = dict(segments=None, prefix=None, scale=scale, softcap=softcap)
    return DenseAttention()(query, key, value, rule, **numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _tapped(query, key, value, tap, rule, block, scale, softcap):
    return _dense(query, key, value, rule, scale, softcap)


def _tapped_forward(query, key, value, tap, rule, block, scale, softcap):
    return _dense(query, key, value, rule, scale, softcap), (query, key, value)


def _tapped_backward(
    rule: MaskRule, block: int, scale: float, softcap: float | None, saved: tuple, cotangent: jax.Array
):
    query, key, value = saved
    _, pull_back = jax.vjp(lambda *args: _dense(*args, rule, scale, softcap), *saved)
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    query, key, value, out = (x.astype(jnp.float32) for x in (query, key, value, cotangent))
    key, value = (jnp.repeat(x, groups, axis=1) for x in (key, value))
    scores = cap(jnp.einsum("bhid,bhjd->bhij", query, key) * scale, softcap)
    places = jnp.arange(length)[None]
    scores = jnp.where(rule.allowed(places, places, None), scores, NEGATIVE)
    entries = jnp.abs(influence(scores, jnp.einsum("bhid,bhjd->bhij", out, value)))
    blocks = length // block
    sums = entries.reshape(batch, heads, blocks, block, blocks, block).sum((0, 3, 5))
    return (*pull_back(cotangent), sums)


_tapped.defvjp(_tapped_forward, _tapped_backward)


def planned_layers(model: LayerStack) -> dict[int, Attention]:
    """{layer: its attention} where a plan chooses spans: in causal `Attention`. Raises UserError for none."""
    if not isinstance(model, LayerStack):
        raise UserError(f"a {type(model).__name__} is no stack of blocks: there are no spans to plan")
    mixers = [model.blocks[i % len(model.blocks)].attention for i in range(model.num_layers)]
    found = {
        i: mixer for i, mixer in enumerate(mixers) if type(mixer) is Attention and mixer.rule == Causal()
    }
    if not found:
        kinds = ", ".join(sorted({type(mixer).__name__ for mixer in mixers}))
        raise UserError(f"no layer of this model is causal Attention ({kinds}): there are no spans to plan")
    return found


def with_attention(model: LayerStack, changed: dict[int, Attention]) -> LayerStack:
    """The unrolled model with other attention in some layers."""
    blocks = [model.blocks[i % len(model.blocks)] for i in range(model.num_layers)]
    blocks = [b.clone(attention=changed[i]) if i in changed else b for i, b in enumerate(blocks)]
    return model.clone(blocks=tuple(blocks))


@functools.partial(jax.jit, static_argnums=(0, 5))
def _profile(
    model: LayerStack,
    params: PyTree,
    tokens: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    block: int,
) -> tuple[dict[int, jax.Array], jax.Array]:
    """-> {layer: |E| [H, nb, nb] summed over rows}, the rows' summed loss."""
    attention = planned_layers(model)
    blocks = tokens.shape[1] // block

    def loss(taps: dict[int, jax.Array]) -> jax.Array:
        kernels = {i: attention[i].clone(kernel=Tapped(tap, block)) for i, tap in taps.items()}
        logits = with_attention(model, kernels).apply({"params": params}, tokens)
        nats, _, _ = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        each = jnp.sum(nats.reshape(tokens.shape) * weights, axis=1)
        each = each / jnp.maximum(jnp.sum(weights, axis=1), 1.0)
        return jnp.sum(each)  # rows do not meet, so the cotangents in a row are those of its own mean

    taps = {i: jnp.zeros((a.num_heads, blocks, blocks)) for i, a in attention.items()}
    total, sums = jax.value_and_grad(loss)(taps)
    return sums, total


def profile(
    model: LayerStack, params: PyTree, batch: dict[str, np.ndarray], block: int, batch_size: int = 8
) -> tuple[np.ndarray, float]:
    """Attention influence of the rows of `batch`, whose loss is the mean over the targets that have weight.

    tokens, targets int32[n, T], weights float32[n, T]; T is a multiple of `block`. Returns float64 [layers, Hkv, nb,
    nb], the mean over rows of the block sums of |E|, those of query heads that share a key head added up, for the
    layers of `planned_layers` in order; and the mean loss.

    Raises:
        UserError: the gradient vanishes in rounding, or is not finite.
    """
    model, params = unscan_layers(model, params)
    model = model.clone(remat="none")
    attention = list(planned_layers(model).values())
    heads, kv_heads = attention[0].num_heads, attention[0].kv_heads
    if any((each.num_heads, each.kv_heads) != (heads, kv_heads) for each in attention):
        raise UserError("the layers of this model differ in their numbers of heads: a plan needs them equal")
    rows = [np.asarray(batch[name]) for name in ("tokens", "targets", "weights")]
    if not (rows[2].sum(axis=1) > 0).all():
        raise UserError("a calibration row has no answer: every row needs targets with weight")
    count = len(rows[0])
    sums, loss = 0.0, 0.0
    for start in range(0, count, batch_size):
        # Rows of zeros fill the last batch; without weight they have no influence.
        part = [x[start : start + batch_size] for x in rows]
        part = [np.pad(x, ((0, batch_size - len(x)), (0, 0))) for x in part]
        found, total = _profile(model, params, *part, block)
        sums = sums + np.stack([np.asarray(found[i], np.float64) for i in sorted(found)])
        loss += float(total)
    if not loss / count > _SATURATED:
        raise UserError(
            f"the loss on the calibration answers is {loss / count:.1e} nats: their gradients are rounding, and a plan "
            "made of them would be noise"
        )
    if not np.isfinite(sums).all():
        raise UserError("the attention influence is not finite: are the parameters?")
    grouped = sums.reshape(len(attention), kv_heads, heads // kv_heads, *sums.shape[2:])
    return grouped.sum(2) / count, loss / count
