"""An image tower and a text tower that are trained together by contrast (CLIP, arXiv 2103.00020), and their data.

What trains both are pairs of an image and a text about it: of a batch's images and texts, each is to find its own.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.data.dialogues import DialogueSource
from research.data.packing import permutation
from research.data.pipeline import RecordDataset
from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.multimodal.conversations import media_arrays
from research.multimodal.media import Media, Planner, Square
from research.multimodal.tower import Seen, Tower
from research.nn.attention import Context
from research.nn.linear import Embedding, Linear, parameter
from research.nn.norm import LayerNorm
from research.nn.transformer import LayerStack
from research.training.task import Batch, Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithText(Square):
    """A `Square` whose image keeps a text, always as `<bos>`, its tokens, the end token and zeros: `words` of `Media`.

    Args:
        context: C, tokens of the text; one that is longer loses its last words, never its end token.
        tokenizer: of the text, a tokenizer.json or its folder; that of the prompt by default.
        before, between: what stands in front of a question and behind it in a chat, as of `Conversations`. Of a prompt
            with a history the last question alone is kept.
    """

    context: int
    tokenizer: str | None = None
    before: str = ""
    between: str = ""

    def about(self, media: Media, text: str, tokenizer: Tokenizer) -> Media:
        own = tokenizer if self.tokenizer is None else _tokenizer(self.tokenizer)
        text = text.strip()
        if self.before.strip():
            text = text.rpartition(self.before.strip())[2].strip()
        ids = own.encode(text.removesuffix(self.between.strip()).strip(), bos=True, eos=True)
        if len(ids) > self.context:
            ids = [*ids[: self.context - 1], ids[-1]]
        return media.replace(words=np.pad(np.asarray(ids, np.int32), (0, self.context - len(ids))))

    def nothing(self, images: int) -> Media:
        return super().nothing(images).replace(words=np.zeros((images, self.context), np.int32))


@functools.lru_cache(maxsize=4)
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer.load(path)


class TextTower(LayerStack, kw_only=True):
    """CLIP's text encoder: tokens, learned positions, a stack of causal blocks, a norm of what the end token gives.

    Args:
        vocab_size, width, context: V, dt and C.
        end: the id of the end token.

    Parameters: embedding/table, positions, layer_i/..., final_norm.
    """

    vocab_size: int
    width: int
    context: int
    end: int
    final_norm: nn.Module = LayerNorm()

    def setup(self) -> None:
        self.embedding = Embedding(self.vocab_size, self.width)
        init = nn.initializers.normal(0.01)
        self.positions = parameter(self, "positions", init, (self.context, self.width))
        self.make_layers()

    def __call__(self, words: jax.Array) -> tuple[jax.Array, jax.Array]:
        """words int32[..., C] -> states behind the last layer [..., C, dt], padding's too, and what the first end token
        gives [..., dt]."""
        *leading, count = words.shape
        if count != self.context:
            raise UserError(f"TextTower: context={self.context}, and a text has {count} tokens")
        words = words.reshape(-1, count)
        x = self.embedding(words)
        x = x + self.positions.astype(x.dtype)
        x, _ = self.run_layers(x, Context(jnp.broadcast_to(jnp.arange(count), words.shape)))
        place = jnp.argmax(words == self.end, axis=1)[:, None, None]
        last = self.final_norm(jnp.take_along_axis(x, place, axis=1)[:, 0])
        return x.reshape(*leading, count, -1), last.reshape(*leading, -1)


class SeenWithText(struct.PyTreeNode):
    """image: what the image tower gives; text [B, I, C, dt] and last [B, I, dt]: what the text tower does."""

    image: Seen
    text: jax.Array
    last: jax.Array


class TowerPair(nn.Module):
    """A tower of both: media with a text -> `SeenWithText`. Parameters: image/..., text/..."""

    image: Tower
    text: TextTower

    def __call__(self, media: Media) -> SeenWithText:
        if media.words is None:
            raise UserError(
                "TowerPair reads an image with a text, which its planner must keep: take `WithText`"
            )
        return SeenWithText(self.image(media), *self.text(media.words))


class DualEncoder(nn.Module):
    """Media with texts -> unit vectors of images and texts float32[B * I, width], and the logits' scale.

    An image is what its class token gives, a text its end token. Parameters: tower/{image,text}/..., image_head,
    text_head and log_scale, 1 / 0.07 at first; `Contrast` keeps it from exceeding 100.
    """

    tower: TowerPair
    width: int

    @nn.compact
    def __call__(self, media: Media) -> tuple[jax.Array, jax.Array, jax.Array]:
        if not self.tower.image.class_token:
            raise UserError("DualEncoder: its image tower has class_token=True")
        seen = self.tower(media)
        first = seen.image.taps[-1][:, :, 0, 0]
        units = []
        for name, x in (("image_head", first), ("text_head", seen.last)):
            x = Linear(self.width, name=name)(x.reshape(-1, x.shape[-1])).astype(jnp.float32)
            units.append(x / jnp.linalg.norm(x, axis=-1, keepdims=True))
        scale = parameter(self, "log_scale", nn.initializers.constant(math.log(1 / 0.07)), ())
        return *units, jnp.exp(scale.astype(jnp.float32))


def info_nce(u: jax.Array, v: jax.Array, scale: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each pair the nats of finding v by u and u by v, their mean, and the share found: float32[N] each.

    u, v [N, D] unit vectors; weights f32[N]: pairs of weight 0 are no candidates.
    """
    real = weights > 0
    logits = jnp.where(real[None], scale * (u @ v.T), -1e30)
    back = jnp.where(real[None], scale * (v @ u.T), -1e30)
    own = jnp.arange(len(u))
    nats, found = 0.0, 0.0
    for x in (logits, back):
        nats = nats - 0.5 * jax.nn.log_softmax(x, axis=-1)[own, own]
        found = found + 0.5 * (jnp.argmax(x, axis=-1) == own)
    return jnp.where(real, nats, 0.0), jnp.where(real, found, 0.0)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Batches of `Pairs`. Metrics: `loss` in nats and `accuracy`, both of a batch's pairs among themselves."""

    model: DualEncoder
    planner: Planner

    def init(self, key: jax.Array) -> Any:
        media = jax.tree.map(lambda x: jnp.asarray(x)[None], self.planner.nothing(1))
        return self.model.init(key, media)["params"]

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> Metrics:
        return self.evaluate(params, batch)

    def evaluate(self, params: Any, batch: Batch) -> Metrics:
        media = Media(batch["patches"], batch["grid"], batch["marks"], batch["words"])
        nats, found = info_nce(*self.model.apply({"params": params}, media), batch["weights"])
        count = jnp.sum(batch["weights"])
        return {"loss": (jnp.sum(nats), count), "accuracy": (jnp.sum(found), count)}

    def variants(self, params: Any) -> dict[str, Any]:
        return {"": params}

    def remember(self, params: Any, metrics: Metrics) -> Any:
        """The parameters with a scale of 100 at most. As in CLIP it is the parameter that is clipped: a minimum in the
        loss has no gradient beyond 100, and the scale could never come back."""
        return {**params, "log_scale": jnp.minimum(params["log_scale"], math.log(100.0))}


@dataclasses.dataclass(eq=False)
class Pairs(RecordDataset):
    """Image batches of `Media`'s arrays, with I = 1, and `weights`: a dialogue's first image with its first answer, as
    of captions.

    Args:
        source: of the dialogues.
        planner: keeps texts.
        tokenizer: as of `Conversations`.
        seed: of the order, another one in every epoch.
    """

    source: DialogueSource
    planner: Planner
    tokenizer: str | None = None
    seed: int = 0

    def __post_init__(self):
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: permutation(len(self.source), self.seed, epoch)
        )

    @functools.cached_property
    def text(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer or getattr(self.source, "tokenizer", None))

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        arrays = media_arrays(self.planner.nothing(1)) | {"weights": np.float32(1.0)}
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}

    def __len__(self) -> int:
        return len(self.source)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        read = [self._read(*divmod(int(number), len(self))) for number in numbers]
        media = jax.tree.map(lambda *x: np.stack(x)[:, None], *read)
        return media_arrays(media) | {"weights": np.ones(len(numbers), np.float32)}

    def _read(self, epoch: int, place: int) -> Media:
        dialogue = self.source[int(self._order(epoch)[place])]
        if not dialogue.images:
            raise UserError("Pairs: a dialogue has no image")
        image = dialogue.images[0]
        pixels = image if isinstance(image, np.ndarray) else self.planner.load(image)
        return self.planner.about(self.planner.read(pixels)[0], dialogue.turns[0][1], self.text)
