"""Point clouds: farthest points as centres, their neighbours as patches (arXiv 2307.10802)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from research.errors import UserError
from research.multimodal.tokenize.contract import Tokens
from research.nn.linear import Linear
from research.nn.pool import largest


def squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [B, M, 3], b [B, N, 3] -> f32[B, M, N], from differences: exact where those are."""
    difference = a[:, :, None].astype(jnp.float32) - b[:, None].astype(jnp.float32)
    return jnp.sum(jnp.square(difference), axis=-1)


def farthest_points(points: jax.Array, count: int) -> jax.Array:
    """points [B, N, 3] -> int32[B, count]: point 0, then always the one farthest from all chosen so far."""
    batch, total, _ = points.shape

    def choose(i: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chosen, distance = state
        last = jnp.take_along_axis(points, chosen[:, i - 1, None, None], axis=1)
        distance = jnp.minimum(distance, squared_distances(last, points)[:, 0])
        return chosen.at[:, i].set(jnp.argmax(distance, axis=-1).astype(jnp.int32)), distance

    start = jnp.zeros((batch, count), jnp.int32), jnp.full((batch, total), jnp.inf, jnp.float32)
    return lax.fori_loop(1, count, choose, start)[0]


class PointTokens(nn.Module):
    """Patches of a cloud f32[N, 3]: x_i = max_j MLP(p_j - c_i) over the nearest points p_j of a centre c_i.

    Centres are farthest points from point 0 on, so any order of the others gives the same tokens, and what is in
    `x` does not change when the cloud is moved. Where a patch lies, MLP(c_i), is added before every block.

    Args:
        width: D.
        points: N.
        centres, neighbours: S, and the points of a patch, its centre among them (256 and 32 in the paper).
        hidden_dim: of both MLPs, of two layers.

    Parameters: patch_{up,down}, place_{up,down}.
    """

    width: int
    points: int
    centres: int
    neighbours: int
    hidden_dim: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.centres <= self.points or not 1 <= self.neighbours <= self.points:
            raise UserError(
                f"PointTokens: {self.centres} centres with {self.neighbours} neighbours of {self.points} points: no "
                "more than there are points are expected"
            )

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"points": jax.ShapeDtypeStruct((self.points, 3), jnp.float32)}

    @property
    def count(self) -> int:
        return self.centres

    @nn.compact
    def __call__(self, record: Mapping[str, jax.Array]) -> Tokens:
        points = record["points"]
        chosen = farthest_points(points, self.centres)
        centres = jnp.take_along_axis(points, chosen[..., None], axis=1)
        _, near = lax.top_k(-squared_distances(centres, points), self.neighbours)
        patches = jax.vmap(lambda cloud, index: cloud[index])(points, near) - centres[:, :, None]
        hidden = nn.relu(Linear(self.hidden_dim, use_bias=True, name="patch_up")(patches))
        x = largest(Linear(self.width, use_bias=True, name="patch_down")(hidden), axis=2)
        hidden = nn.gelu(Linear(self.hidden_dim, use_bias=True, name="place_up")(centres))
        return Tokens(x, places=Linear(self.width, use_bias=True, name="place_down")(hidden))
