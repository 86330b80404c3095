"""EMMA: the instruction is mixed into the image's tokens before the projector (arXiv 2410.02080).

Both towers of a CLIP are frozen; I [P, dv] are the patches and Q [C, dt] the instruction's states, padding and all:

    Q' = GELU(W Q + b);   O = A [I; Q'] + c, over tokens;   rows = Projection(O)

A [P, P + C] is one matrix for all channels, [1 | 0] at first, and c [P] is 0: it begins as LLaVA, bit for bit in
float32. A's columns are places in the text, so an instruction is always C tokens (`WithText`). It is one question: of a
prompt with a history the last; of a dialogue in training the shortest, as in the released code. Q are the states behind
the text tower's last layer; the paper says that a layer is chosen, not which.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.multimodal.connectors import Projection
from research.multimodal.contrastive import SeenWithText
from research.multimodal.media import Media
from research.nn import weights
from research.nn.linear import Linear, parameter
from research.nn.mlp import ACTIVATIONS


class TokenMixing(nn.Module):
    """A z + c over tokens: z [..., S, d] -> [..., P, d]. Parameters: kernel [S, P], A transposed, and bias [P]."""

    count: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        def identity(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jnp.eye(*shape, dtype=dtype)

        kernel = parameter(self, "kernel", identity, (z.shape[-2], self.count))
        bias = parameter(self, "bias", nn.initializers.zeros, (self.count,))
        channels = z.swapaxes(-1, -2)
        mixed = weights.dot(channels.reshape(-1, channels.shape[-1]), kernel)
        return (mixed.reshape(*channels.shape[:-1], -1) + bias.astype(z.dtype)).swapaxes(-1, -2)


class EarlyFusion(nn.Module):
    """What both towers see -> [B, I, P, width]. Parameters: text/{kernel,bias}, W and b; mix/{kernel,bias}, A and c;
    projection/..."""

    width: int

    @nn.compact
    def __call__(self, seen: SeenWithText, media: Media) -> jax.Array:
        patches = seen.image.tokens[:, :, 0]
        if seen.image.tokens.shape[2] != 1:
            raise UserError(f"EarlyFusion mixes one view of an image, not {seen.image.tokens.shape[2]}")
        *leading, dim = seen.text.shape
        text = Linear(patches.shape[-1], True, name="text")(seen.text.reshape(-1, dim))
        text = ACTIVATIONS["gelu"](text).reshape(*leading, -1)
        mix = TokenMixing(patches.shape[-2], name="mix")
        mixed = mix(jnp.concatenate([patches, text.astype(patches.dtype)], axis=-2))
        return Projection(self.width, name="projection")(mixed)
