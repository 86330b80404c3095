"""mPLUG-video: a video tower and a visual abstractor that speak to a frozen language model (arXiv 2306.04362).

The tower (`video_tower.py`) begins as an image tower. The abstractor is one block of n_q learned queries Q that read
the patches of all frames and the class token, X:

    q = LN(Q);  k = LN(X);  q <- q + MHA(q, k, k);  q <- q + MLP(LN(q));  rows = W q + b

The first residual is of the *normalised* queries, and MHA has one learned key and value more. Rows stand in front of
the text, whose next words are the only loss; tower and abstractor are trained, the language model is not. A class is
chosen by the summed log-likelihood of its name (`score_names`). The paper's optional parts, a contrastive term (off in
its released configuration) and a linear head for classes, are not here.

In the reference, rows come first and `<bos>` follows, so that the first word is predicted from it; here `<bos>` is in
front of the rows, as in every prompt of this machine, and the first word is predicted from what stands before it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.multimodal.connectors import Read
from research.multimodal.media import Media
from research.multimodal.model import VLM, Pictures
from research.multimodal.prompts import Prompts
from research.multimodal.task import VisionLanguage, saved_part
from research.multimodal.tower import Seen
from research.multimodal.video_tower import begin_as_images
from research.nn.linear import Linear, parameter
from research.nn.mlp import ACTIVATIONS
from research.nn.norm import LayerNorm
from research.nn.transformer import unscan_layers


class QueryPool(nn.Module):
    """x [N, S, d] where mask bool[N, S] is set -> [N, queries, d], whatever the order of x. Args: as `Abstractor`."""

    queries: int
    num_heads: int
    hidden_dim: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        table = parameter(self, "queries", nn.initializers.normal(0.02), (self.queries, dim))
        query = LayerNorm(name="query_norm")(table.astype(x.dtype))
        query = jnp.broadcast_to(query, (x.shape[0], *query.shape))
        keys = LayerNorm(name="key_norm")(x)
        q = query + Read(self.num_heads, slot=True, name="read")(query, keys, keys, mask[:, None])
        hidden = Linear(self.hidden_dim, True, name="up")(LayerNorm(name="mlp_norm")(q))
        return q + Linear(dim, True, name="down")(ACTIVATIONS["gelu"](hidden))


class Abstractor(nn.Module):
    """[B, I, V, P, dv] and the class token, of the tower's last layer -> [B, I, queries, width].

    Args:
        queries, width: n_q, and the decoder's width.
        num_heads, hidden_dim: of the block, whose own width is the tower's.
        output_norm: a LayerNorm behind the last map.
    """

    queries: int
    width: int
    num_heads: int
    hidden_dim: int
    output_norm: bool = False

    @nn.compact
    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        batch, images, *_, dim = seen.tokens.shape
        last = seen.taps[-1]
        # One class token, which all views have, and then the patches.
        x = jnp.concatenate([last[:, :, 0, :1], last[:, :, :, 1:].reshape(batch, images, -1, dim)], axis=2)
        mask = jnp.pad(seen.mask.reshape(batch * images, -1), ((0, 0), (1, 0)), constant_values=True)
        pool = QueryPool(self.queries, self.num_heads, self.hidden_dim, name="pool")
        rows = Linear(self.width, True, name="output")(pool(x.reshape(batch * images, -1, dim), mask))
        if self.output_norm:
            rows = LayerNorm(name="output_norm")(rows)
        return rows.reshape(batch, images, self.queries, self.width)


@dataclasses.dataclass(frozen=True)
class VideoLanguage(VisionLanguage):
    """As `VisionLanguage`, of a model with a `VideoTower`.

    Args:
        image_tower: (run or model directory, subtree there), an image tower that the video tower begins as.
    """

    image_tower: tuple[str, str] | None = None

    @property
    def start(self) -> Callable[[jax.Array], Any]:
        if self.image_tower is None:
            return super().start
        begun = super().start if self.parts or self.start_from else jax.jit(self.init)

        def begin(key: jax.Array) -> Any:
            params = begun(key)
            image = saved_part(*self.image_tower, "VideoLanguage.image_tower")
            return params | {"tower": begin_as_images(params["tower"], image)}

        return begin


def score_names(
    model: VLM, params: Any, asked: Prompts, names: Sequence[str], tokenizer: Tokenizer
) -> np.ndarray:
    """log p(name, and the end | prompt) of every prompt and name, float32[B, C]; the largest is the class.

    Names are read by one `extend` over the prompts' cache, so tower and prompt are computed once.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    coded = [[*tokenizer.encode(name), *end] for name in names]
    if not coded or not all(coded):
        raise UserError("score_names: at least one name is expected, and none without a token")
    table = np.zeros((len(coded), max(map(len, coded))), np.int32)
    for row, ids in zip(table, coded, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(row) for row in asked.tokens])
    tokens = np.zeros((len(lengths), lengths.max()), np.int32)
    for row, ids in zip(tokens, asked.tokens, strict=True):
        row[: len(ids)] = ids
    (pictures,) = asked.beside(tokens.shape[1])
    sizes = np.array([len(ids) for ids in coded])
    model, params = unscan_layers(model, params)
    return np.asarray(_score(model, params, tokens, lengths, pictures, table, sizes))


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: VLM,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    pictures: Pictures,
    names: jax.Array,
    sizes: jax.Array,
) -> jax.Array:
    """tokens [B, T], names int32[C, N] of sizes int32[C] -> float32[B, C]."""
    (batch, length), (count, most) = tokens.shape, names.shape
    variables = {"params": params}
    first, _, fresh = model.apply(variables, tokens, lengths, pictures, method="prefill")
    cache = model.init_cache(batch, length + most).commit(fresh, None, lengths)
    each = jnp.repeat(jnp.arange(batch), count)
    chains = jnp.tile(names, (batch, 1))  # [B * C, N]
    logits = first[each][:, None]
    if most > 1:
        later, _, _ = model.apply(variables, chains[:, :-1], cache.select(each), method="extend")
        logits = jnp.concatenate([logits, later], axis=1)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), chains[..., None], axis=-1)[..., 0]
    real = jnp.arange(most) < jnp.tile(sizes, batch)[:, None]
    return jnp.sum(jnp.where(real, chosen, 0.0), axis=1).reshape(batch, count)
