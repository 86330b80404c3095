"""What every head looks at: the attention probabilities of a trained decoder, read without editing it."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.nn.attention import Attention
from research.nn.attention_kernels import NEGATIVE, cap
from research.nn.transformer import holds_stack, stack_of, unscan_layers
from research.sparse.moa.influence import with_attention


class _Recorder:
    """An `AttentionKernel` for one trace, which keeps its probabilities, float32[B, H, T, T]."""

    probabilities: jax.Array

    def __call__(self, query, key, value, rule, *, segments, prefix, scale, softcap):
        if segments is not None:
            raise UserError("attention maps are of whole rows: without segments")
        groups = query.shape[1] // key.shape[1]
        key, value = (jnp.repeat(x, groups, axis=1) for x in (key, value))
        scores = jnp.einsum("bhid,bhjd->bhij", query, key, preferred_element_type=jnp.float32)
        places = jnp.arange(query.shape[2])[None]
        mask = rule.allowed(places, places, prefix)
        scores = jnp.where(mask, cap(scores * scale, softcap), NEGATIVE)
        self.probabilities = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum("bhij,bhjd->bhid", self.probabilities, value.astype(jnp.float32))
        return out.astype(query.dtype)


@functools.partial(jax.jit, static_argnums=0)
def attention_maps(model: nn.Module, params: Any, tokens: jax.Array, *beside: Any) -> dict[int, jax.Array]:
    """{layer: float32[B, H, T, T], row i what token i looks at} for tokens int32[B, T], of layers of `Attention`.

    beside: what the model takes beside tokens, as one that reads images its `Pictures`; its decoder's layers are meant.
    Raises UserError where no layer is one.
    """
    model, params = unscan_layers(model, params)
    stack, _ = stack_of(model, params)
    mixers = [stack.blocks[i % len(stack.blocks)].attention for i in range(stack.num_layers)]
    recorders = {i: _Recorder() for i, mixer in enumerate(mixers) if type(mixer) is Attention}
    if not recorders:
        kinds = ", ".join(sorted({type(mixer).__name__ for mixer in mixers}))
        raise UserError(f"no layer of this model is Attention ({kinds}): there is nothing to see")
    changed = {i: mixers[i].clone(kernel=each) for i, each in recorders.items()}
    recorded = with_attention(stack, changed).clone(remat="none")
    whole = model.clone(decoder=recorded) if holds_stack(model) else recorded
    whole.apply({"params": params}, tokens, *beside)
    return {i: recorder.probabilities for i, recorder in recorders.items()}
