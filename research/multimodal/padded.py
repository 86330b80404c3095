"""Batches whose rows are padded, on the left or on the right, as processors of transformers give them.

    batch = Padded.of(input_ids, attention_mask, images, model.planner, tokenizer, placeholder=32000)
    logits = batch.back(model.apply(variables, batch.tokens, batch.pictures, segments=batch.segments))
    Generator(model, params, tokenizer).generate(batch.asked.tokens, beside=batch.asked.beside)

Rows are moved to the front, so what stands in them is what stands in a row of its own, for every system: masks count
tokens from a row's begin (windows with sinks), and a token that joins in front (eP-ALM) stands in front of the first.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.multimodal.media import MediaPlanner
from research.multimodal.model import Pictures
from research.multimodal.prompts import Prompts, Written


@dataclasses.dataclass(frozen=True)
class Padded:
    """Rows [B, T] without the padding in front of them.

    asked: the rows without any padding, for `Generator` and `score_names`. tokens int32[B, T] padded on the right,
    lengths int32[B] and pictures: for the model's `prefill`, and for a call of it. begins int32[B]: where each row
    began in what was given.
    """

    asked: Prompts
    tokens: np.ndarray
    lengths: np.ndarray
    pictures: Pictures
    begins: np.ndarray

    @classmethod
    def of(
        cls,
        tokens: np.ndarray,
        mask: np.ndarray,
        images: Sequence[np.ndarray],
        planner: MediaPlanner,
        tokenizer: Tokenizer,
        *,
        placeholder: int,
    ) -> "Padded":
        """Tokens int[B, T] with a `placeholder` for every row that the planner spells of an image, mask [B, T], 1 where
        a token is, and the images of all rows in order, as the planner reads them.

        tokenizer: of the tokens, for planners that keep what is said about an image (EMMA).

        Raises:
            UserError: shapes that differ or are empty, a row without tokens or with padding inside, or placeholders
                that are not those of the images.
        """
        tokens, there = np.asarray(tokens), np.asarray(mask) != 0
        if tokens.ndim != 2 or tokens.shape != there.shape or not tokens.size:
            raise UserError(
                f"tokens {list(tokens.shape)} and mask {list(there.shape)}: [batch, length] is expected of both"
            )
        begins, lengths = there.argmax(axis=1), there.sum(axis=1)
        left, written = iter(images), []
        for number, (begin, length) in enumerate(zip(begins.tolist(), lengths.tolist(), strict=True), 1):
            if not length or not there[number - 1, begin : begin + length].all():
                what = "padding between its tokens" if length else "no tokens"
                raise UserError(f"row {number} of the batch has {what}")
            ids = tokens[number - 1, begin : begin + length].tolist()
            written.append(_written(ids, left, planner, tokenizer, placeholder, f"row {number} of the batch"))
        if unseen := sum(1 for _ in left):
            raise UserError(
                f"{len(images)} images are given, and the batch has places for {len(images) - unseen}"
            )
        asked = Prompts(tuple(written), planner)
        moved = np.zeros(tokens.shape, np.int32)
        for row, ids in zip(moved, asked.tokens, strict=True):
            row[: len(ids)] = ids
        (pictures,) = asked.beside(tokens.shape[1])
        return cls(asked, moved, lengths.astype(np.int32), pictures, begins.astype(np.int32))

    @property
    def segments(self) -> np.ndarray:
        """int32[B, T], 1 where a token is, of `tokens`."""
        return (np.arange(self.tokens.shape[1]) < self.lengths[:, None]).astype(np.int32)

    def back(self, x: jax.Array) -> jax.Array:
        """What the model makes of `tokens`, [B, T, ...], at the places where the tokens were given. What it has at
        padding means nothing."""
        places = np.arange(self.tokens.shape[1]) - self.begins[:, None]
        places = places.reshape(*places.shape, *[1] * (x.ndim - 2)) % self.tokens.shape[1]
        return jnp.take_along_axis(x, places, axis=1)


def _written(
    ids: list[int],
    images: Iterator[np.ndarray],
    planner: MediaPlanner,
    tokenizer: Tokenizer,
    placeholder: int,
    where: str,
) -> Written:
    """A row without padding, with the next of the images where its placeholders are."""
    written, spelled, group = Written(), iter(()), None
    about = tokenizer.decode([token for token in ids if token != placeholder])
    places, left, used = ids.count(placeholder), 0, 0
    for token in ids:
        if token != placeholder:
            written.say([token])
            group = None
            continue
        if not left:
            image = next(images, None)
            if image is None:
                raise UserError(
                    f"{where}: there is no image for {places - used} of its {places} placeholders"
                )
            media, pieces = planner.read(image)
            # Texts between them stand among the tokens.
            rows = [piece for piece in pieces if not isinstance(piece, str)]
            spelled, left, group = iter(rows), len(rows), None
            first = len(written.media) * planner.rows
            written.media.append(planner.about(media, about, tokenizer))
        piece = next(spelled)
        group = written.row(first, piece, planner.group(piece), group)
        left, used = left - 1, used + 1
    if left:
        raise UserError(f"{where} ends {left} placeholders before its image {len(written.media)} does")
    return written
