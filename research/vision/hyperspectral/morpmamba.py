"""MorpMamba: spatial-spectral morphological Mamba for hyperspectral images (arXiv 2408.01372).

A window x [B, H, W, C] of a whitened scene is classified by the pixel in its middle, [H // 2, W // 2]:

    T_spa = P [ero(x), dil(x)]                 tokens [B, H, W, D]; P, [2 C, D], is shared by both
    T_spe = P [ero(x'), dil(x')]'              x' [B, C, H, W]: filtered over bands and rows, a filter per column
    T'_k  = T_k * sigmoid(G_k c)               c: tokens of T_spa in the middle
    A     = softmax(Q T'_spa (K T'_spe)^T / sqrt(d)) V T'_spe             heads side by side, no output projection
    s_t   = (W_s s_{t-1} + b_s) + (W_u A_t + b_u)                         over the H W tokens, row by row
    logits = F relu(E s_HW)                    and `penalty` |E|^2 is added to the loss

The defaults are the released code, in which "dilation" is a depthwise convolution whose kernel starts as a box of ones,
"erosion" minus another such convolution, c is the middle *row* of tokens, whose column w gates row w, and the state is
no Mamba but a linear time-invariant recurrence. What the title promises is a field away: `morphology="grey"`,
`gate="centre"`, `state=SelectiveState()`. Kernels are drawn as everywhere in this project (the code: Glorot's uniform).
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.nn import weights
from research.nn.attention import Context
from research.nn.attention_kernels import DenseAttention
from research.nn.linear import Linear, parameter
from research.nn.masks import Full
from research.nn.norm import RMSNorm
from research.nn.reports import report_loss
from research.ssm.affine import AffineState
from research.ssm.mamba2 import Mamba2
from research.vision.hyperspectral.morphology import correlate, dilate, erode

Morphology = Literal["box", "grey", "none"]
Gate = Literal["row", "centre"]


class MorphologicalTokens(nn.Module):
    """x [B, H, W, C] -> spatial and spectral tokens [B, H, W, width] each.

    Args:
        width: D.
        morphology: "box" for the convolutions of the released code; "grey" for grey-scale erosion and dilation with
            learned structuring elements, flat at first; "none" to project x itself, then both are the same tokens.
        size: of the filters.
        spectral: False leaves out the spectral filters: both are the spatial tokens (the paper's SMM).

    Parameters: {spatial,spectral}_{erosion,dilation} [size, size, channels], projection/{kernel,bias}.
    """

    width: int
    morphology: Morphology
    size: int
    spectral: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        projection = Linear(self.width, use_bias=True, name="projection")
        if self.morphology == "none":
            tokens = projection(x)
            return tokens, tokens
        spatial = projection(self._filter(x, "spatial", (0, 1, 2, 3)))
        if not self.spectral:
            return spatial, spatial
        return spatial, projection(self._filter(x.transpose(0, 3, 1, 2), "spectral", (0, 2, 3, 1)))

    def _filter(self, x: jax.Array, name: str, back: tuple[int, ...]) -> jax.Array:
        """Erosion and dilation of x, axes turned `back`, side by side in the last one."""
        grey = self.morphology == "grey"
        init = nn.initializers.zeros if grey else nn.initializers.ones
        shape = (self.size, self.size, x.shape[-1])
        erosion = parameter(self, f"{name}_erosion", init, shape)
        dilation = parameter(self, f"{name}_dilation", init, shape)
        pair = (
            (erode(x, erosion), dilate(x, dilation))
            if grey
            else (-correlate(x, erosion), correlate(x, dilation))
        )
        return jnp.concatenate([y.transpose(back) for y in pair], axis=-1)


class SelectiveState(nn.Module):
    """x [B, T, width] -> the last token of x + mixer(norm(x)), [B, width]: a Mamba-2 block in place of the recurrence.

    The scan is causal, so only the last token has seen all others. Parameters: norm/scale, mixer/...
    """

    mixer: nn.Module = Mamba2(num_heads=4, head_dim=32, state_dim=32, chunk=16)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        context = Context(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
        y, _ = self.mixer(RMSNorm(name="norm")(x), context)
        return (x + y)[:, -1]


class MorpMamba(nn.Module):
    """Args:
        num_classes, width: outputs, and D.
        num_heads: of the attention; the head dimension is width / num_heads.
        hidden_dim: rows of E.
        morphology, filter_size, spectral: see `MorphologicalTokens`.
        gate: "row" for the middle row of the released code, which needs square windows; "centre" for the one token in
            the middle.
        state: [B, T, D] -> [B, S].
        dropout: of what the attention gives, active when `apply` is given a `dropout` key.
        penalty: of the squared kernel of E.

    Parameters: tokens, {spatial,spectral}_gate, {query,key,value}, state, hidden, head.
    """

    num_classes: int
    width: int = 64
    num_heads: int = 4
    hidden_dim: int = 128
    morphology: Morphology = "box"
    filter_size: int = 5
    spectral: bool = True
    gate: Gate = "row"
    state: nn.Module = AffineState()
    dropout: float = 0.1
    penalty: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads:
            raise UserError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, C] -> float32 logits [B, num_classes]."""
        batch, height, width, _ = images.shape
        tokens = MorphologicalTokens(
            self.width, self.morphology, self.filter_size, self.spectral, name="tokens"
        )
        spatial, spectral = tokens(images)
        middle = self._middle(spatial)
        spatial = spatial * nn.sigmoid(Linear(self.width, use_bias=True, name="spatial_gate")(middle))
        spectral = spectral * nn.sigmoid(Linear(self.width, use_bias=True, name="spectral_gate")(middle))

        flat = (batch, height * width, self.width)
        spatial, spectral = spatial.reshape(flat), spectral.reshape(flat)
        mixed = self._attention(spatial, spectral)
        if self.dropout:
            mixed = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(mixed)
        state = self.state(mixed)

        hidden = Linear(self.hidden_dim, use_bias=True, name="hidden")
        y = nn.relu(hidden(state))
        if self.penalty:
            kernel = weights.materialize(hidden.get_variable("params", "kernel")).astype(jnp.float32)
            report_loss(self, "penalty", self.penalty * jnp.sum(jnp.square(kernel)))
        return Linear(self.num_classes, use_bias=True, name="head")(y).astype(jnp.float32)

    def _middle(self, spatial: jax.Array) -> jax.Array:
        """The tokens in the middle, [B, rows or 1, 1, D]."""
        height, width = spatial.shape[1:3]
        row = spatial[:, height // 2]
        if self.gate == "centre":
            return row[:, width // 2, None, None]
        if height != width:
            raise UserError(
                f"gate='row' lays the {width} columns of the middle row on {height} rows: windows must be square; "
                "gate='centre' takes any"
            )
        return row[:, :, None]

    def _attention(self, spatial: jax.Array, spectral: jax.Array) -> jax.Array:
        """Queries of spatial [B, T, D], keys and values of spectral tokens -> [B, T, D]."""
        sources = {"query": spatial, "key": spectral, "value": spectral}
        heads = (*spatial.shape[:2], self.num_heads, self.width // self.num_heads)
        query, key, value = (
            Linear(self.width, use_bias=True, name=name)(x).reshape(heads).swapaxes(1, 2)
            for name, x in sources.items()
        )
        everything = dict(segments=None, prefix=None, softcap=None)
        out = DenseAttention()(query, key, value, Full(), scale=heads[-1] ** -0.5, **everything)
        return out.swapaxes(1, 2).reshape(spatial.shape)
