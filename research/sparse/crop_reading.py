"""A small model that reads a large picture by its thumbnail and crops, to try GlobalCom2 on.

    thumbnail and crops -> ViT with a class token -> Linear -> [thumbnail ; crops with newlines ; question] -> decoder

The encoder learns in a stage of its own to name what its class token sees (`loss_weights={"naming": 1.0}`), and is
frozen when the decoder learns to answer (`frozen=("encoder",)`). Answers are learned with all tokens; a rule drops some
in evaluation, untrained, as the method wants.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import UserError
from research.nn.attention import Context
from research.nn.transformer import LayerStack
from research.sparse.globalcom2 import GlobalCom2, Kept, Layout, assemble, compress, encode
from research.training.task import Batch, Metrics, classification_metrics

Chooser = Callable[..., Kept]
"""(thumbnail [n, d], crops [m, n, d], thumbnail scores [n], crop scores [m, n], newline [d], key) -> Kept."""


def views(images: jax.Array, grid: int) -> jax.Array:
    """images [B, s, s, c] -> the thumbnail, a mean over grid x grid pixels, and the crops: [B, 1 + grid^2, s / grid,
    s / grid, c]."""
    batch, side, _, channels = images.shape
    part = side // grid
    crops = images.reshape(batch, grid, part, grid, part, channels).swapaxes(2, 3)
    small = images.reshape(batch, part, grid, part, grid, channels).mean(axis=(2, 4))
    return jnp.concatenate([small[:, None], crops.reshape(batch, grid * grid, part, part, channels)], axis=1)


def keep_all(layout: Layout, thumbnail, crops, scores, crop_scores, newline, key=None) -> Kept:
    """Every token in raster order: what compression is compared with."""
    keep = jnp.asarray(layout.to_crops(layout.valid))
    budget = int(layout.counts.sum())
    return assemble(
        thumbnail, crops, scores, keep, newline, layout, GlobalCom2(1.0), budget, jnp.ones(layout.crops)
    )


def read(decoder: LayerStack, embedded: jax.Array, there: jax.Array, question: jax.Array) -> jax.Array:
    """To be called as a method of a bound decoder: embedded [B, T, D], of which some are `there` bool [B, T], then the
    question int32[B], a token -> float32 logits [B, V] behind it."""
    asked = decoder.embed(question[:, None]).astype(embedded.dtype)
    x = jnp.concatenate([embedded, asked], axis=1)
    there = jnp.pad(there, ((0, 0), (0, 1)), constant_values=True).astype(jnp.int32)
    context = Context(jnp.cumsum(there, axis=1) - 1, there)
    hidden, _ = decoder.run_layers(x, context)
    return decoder.logits(decoder.final_norm(hidden[:, -1]))


@dataclasses.dataclass(frozen=True)
class CropReading:
    """Batches of `research.data.glyphs.GlyphCanvases`. Metrics: `loss` and `accuracy` of the answers, `naming`, the
    binary cross-entropy of what the class token names, and in evaluation `tokens`, how many the decoder reads.

    Args:
        encoder: a ViT with a class token and a class for each shape; patches as its own.
        decoder: a DecoderLM, whose vocabulary has the shapes, as questions, and then the colours, as answers.
        grid: crops along each side.
        side: pixels of a picture along each side.
        rule: what drops tokens in evaluation; None: nothing.
        softmaxed: scores are shares of attention, see `encode`.
    """

    encoder: LayerStack
    decoder: LayerStack
    grid: int = 2
    side: int = 96
    rule: GlobalCom2 | None = None
    softmaxed: bool = False

    def __post_init__(self):
        if self.side % (self.grid * self.encoder.patch):
            raise UserError(
                f"CropReading: side={self.side} does not divide into {self.grid} crops of patches of "
                f"{self.encoder.patch}"
            )

    @property
    def layout(self) -> Layout:
        return Layout((self.grid, self.grid), self.side // self.grid // self.encoder.patch)

    @property
    def model(self) -> LayerStack:
        """What a run is known by: the encoder."""
        return self.encoder

    def init(self, key: jax.Array) -> Any:
        keys = jax.random.split(key, 4)
        part = self.side // self.grid
        wide, narrow = self.decoder.width, self.encoder.width
        return {
            "encoder": self.encoder.init(keys[0], jnp.zeros((1, part, part, 3)))["params"],
            "decoder": self.decoder.init(keys[1], jnp.zeros((1, 2), jnp.int32))["params"],
            "projector": jax.random.normal(keys[2], (narrow, wide)) / narrow**0.5,
            "newline": jax.random.normal(keys[3], (wide,)) / wide**0.5,
        }

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> Metrics:
        return self.answer(params, batch, functools.partial(keep_all, self.layout))[0]

    def evaluate(self, params: Any, batch: Batch) -> Metrics:
        chooser = functools.partial(keep_all, self.layout) if self.rule is None else self.compressed
        metrics, there = self.answer(params, batch, chooser)
        rows = jnp.sum(batch["weights"])
        return metrics | {"tokens": (jnp.sum(batch["weights"] * jnp.sum(there, axis=1)), rows)}

    def compressed(self, *inputs: jax.Array) -> Kept:
        """A `Chooser` by the rule."""
        return compress(*inputs[:-1], self.layout, self.rule)

    def variants(self, params: Any) -> dict[str, Any]:
        return {"": params}

    def answer(self, params: Any, batch: Batch, chooser: Chooser) -> tuple[Metrics, jax.Array]:
        """-> metrics, and which of the places before the question hold tokens, bool [B, T]."""
        parts = views(batch["images"], self.grid)
        shape = parts.shape[:2]
        features, scores, names = encode(
            self.encoder, params["encoder"], parts.reshape(-1, *parts.shape[2:]), self.softmaxed
        )
        features = (features @ params["projector"]).reshape(*shape, -1, self.decoder.width)
        scores = scores.reshape(*shape, -1)
        keys = jax.random.split(jax.random.key(0), shape[0])
        kept = jax.vmap(lambda x, s, key: chooser(x[0], x[1:], s[0], s[1:], params["newline"], key))(
            features, scores, keys
        )
        logits = self.decoder.apply(
            {"params": params["decoder"]}, kept.tokens, kept.valid, batch["question"], method=read
        )
        labels = self.encoder.num_classes + batch["labels"]
        metrics = classification_metrics(logits, {"labels": labels, "weights": batch["weights"]})
        names = names.reshape(batch["present"].shape)
        nats = jax.nn.softplus(names) - names * batch["present"]
        weights = batch["weights"][:, None, None]
        naming = jnp.sum(weights * nats), jnp.sum(batch["weights"]) * nats[0].size
        return metrics | {"naming": naming}, kept.valid
