"""INF-LLaVA: a large picture cut into blocks and into thumbnails by stride, which read each other (arXiv 2407.16198).

A picture of (n s)^2 pixels, s the tower's side, is cut into n^2 blocks and n^2 samplings I[i::n, j::n], unblurred;
beside them stands the whole at s^2. One frozen tower reads the 2 n^2 + 1 views, h x w patches each. On the grid of
n h x n w

    C: the features of the blocks, side by side          S: those of the samplings, S[i::n, j::n]

are permutations, in which equal places mean the same part of the picture. With one attention of its own

    A(q, kv) = LN(W_o MHA(W_q q, W_k kv, W_v kv) + q)
    S'_b = A(S_b, C_b) in every contiguous block b               C'_ij = A(C_ij, S_ij) in every stride class i, j
    U = LN([f_c(C'), f_s(S')] + S' + C'),   f: dv -> dv / 16 -> GELU -> dv / 2

U is scaled to h x w (bilinear, float32), its mean with the features of the whole goes through a two-layer MLP: as many
tokens as for one view.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.multimodal.connectors import Projection, Read
from research.multimodal.media import Crop, Media, Planner
from research.multimodal.tower import Seen
from research.nn.linear import Linear
from research.nn.mlp import ACTIVATIONS
from research.nn.norm import LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlocksAndStrides(Planner):
    """The whole, n^2 blocks and n^2 samplings, row-major. Args: side, s; parts, n."""

    side: int
    parts: int = 2

    def __post_init__(self):
        if self.side % self.patch or self.parts < 1:
            raise UserError(
                f"BlocksAndStrides: side={self.side}, patch={self.patch}, parts={self.parts}: whole patches, at least 1"
            )

    @property
    def views(self) -> int:
        return 2 * self.parts**2 + 1

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def rows(self) -> int:
        return self.patches

    def plan(self, width: int, height: int) -> tuple[Crop, ...]:
        n, s = self.parts, self.side
        size = n * s, n * s
        cells = [(i, j) for i in range(n) for j in range(n)]
        blocks = [Crop(size, (j * s, i * s, (j + 1) * s, (i + 1) * s)) for i, j in cells]
        strides = [Crop(size, (j, i, n * s, n * s), n) for i, j in cells]
        return (Crop.whole(s, s), *blocks, *strides)

    def spell(self, crops: Sequence[Crop]) -> list[int | str]:
        return list(range(self.rows))


def cut_blocks(x: jax.Array, n: int) -> jax.Array:
    """[B, n h, n w, C] -> [B, n * n, h, w, C], contiguous blocks, row-major."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, n, height // n, n, width // n, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, n * n, height // n, width // n, channels)


def join_blocks(x: jax.Array, n: int) -> jax.Array:
    """The inverse of `cut_blocks`."""
    batch, _, height, width, channels = x.shape
    x = x.reshape(batch, n, n, height, width, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, n * height, n * width, channels)


def cut_strides(x: jax.Array, n: int) -> jax.Array:
    """[B, n h, n w, C] -> [B, n * n, h, w, C], [:, i::n, j::n], row-major."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // n, n, width // n, n, channels)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, n * n, height // n, width // n, channels)


def join_strides(x: jax.Array, n: int) -> jax.Array:
    """The inverse of `cut_strides`."""
    batch, _, height, width, channels = x.shape
    x = x.reshape(batch, n, n, height, width, channels)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(batch, n * height, n * width, channels)


class Enhancement(nn.Module):
    """C and S, [B, n h, n w, d] each -> U of the same shape."""

    parts: int
    num_heads: int = 8

    def setup(self) -> None:
        self.attention = Read(self.num_heads)
        self.attention_norm = LayerNorm()

    def attend(self, query: jax.Array, other: jax.Array) -> jax.Array:
        """A in every part: [B, n * n, h, w, d] twice -> the same."""
        flat = [x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1]) for x in (query, other)]
        out = self.attention(flat[0], flat[1], flat[1])
        return self.attention_norm(out + flat[0]).reshape(query.shape)

    def enhanced(self, local: jax.Array, spread: jax.Array) -> tuple[jax.Array, jax.Array]:
        """-> C', S'."""
        n = self.parts
        spread_ = join_blocks(self.attend(cut_blocks(spread, n), cut_blocks(local, n)), n)
        local_ = join_strides(self.attend(cut_strides(local, n), cut_strides(spread, n)), n)
        return local_, spread_

    @nn.compact
    def __call__(self, local: jax.Array, spread: jax.Array) -> jax.Array:
        local, spread = self.enhanced(local, spread)
        halves = [self._squeeze(x, name) for x, name in ((local, "local"), (spread, "spread"))]
        return LayerNorm(name="fused_norm")(jnp.concatenate(halves, axis=-1) + spread + local)

    def _squeeze(self, x: jax.Array, name: str) -> jax.Array:
        width = x.shape[-1]
        hidden = ACTIVATIONS["gelu"](Linear(max(width // 16, 1), True, name=f"{name}_down")(x))
        return Linear(width // 2, True, name=f"{name}_up")(hidden)


class DualPerspective(nn.Module):
    """Seen of 1 + 2 n^2 square views -> [B, I, P, width].

    perspectives: "both"; or with one of them in the other's place too, to compare.
    """

    width: int
    parts: int
    num_heads: int = 8
    perspectives: str = "both"

    @nn.compact
    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        batch, images, views, patches, dim = seen.tokens.shape
        n, side = self.parts, round(patches**0.5)
        x = seen.tokens.reshape(batch * images, views, side, side, dim)
        whole, local, spread = (
            x[:, 0],
            join_blocks(x[:, 1 : 1 + n * n], n),
            join_strides(x[:, 1 + n * n :], n),
        )
        if self.perspectives != "both":
            local, spread = {"blocks": (local, local), "strides": (spread, spread)}[self.perspectives]
        fused = Enhancement(n, self.num_heads, name="enhancement")(local, spread)
        small = jax.image.resize(fused.astype(jnp.float32), whole.shape, "bilinear", antialias=False)
        mean = (small.astype(whole.dtype) + whole) / 2
        return Projection(self.width, name="projection")(mean.reshape(batch, images, patches, dim))
