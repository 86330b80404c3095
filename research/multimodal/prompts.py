"""Texts with images -> token ids, which image row stands where, positions; on the host.

written = write("<image>\nWhat is it?", [image], model.planner, tokenizer)
asked = Prompts.of([(text, images), ...], model.planner, tokenizer)
Generator(model, params, tokenizer).generate(asked.tokens, beside=asked.beside)
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.multimodal.media import Media, MediaPlanner
from research.multimodal.model import Pictures


@dataclasses.dataclass
class Written:
    """A text: tokens, slots (-1 for text) and positions of equal length, and its images' media in order."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    slots: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    media: list[Media] = dataclasses.field(default_factory=list)

    def say(self, ids: Sequence[int]) -> None:
        """Adds tokens of text."""
        start = self.positions[-1] + 1 if self.positions else 0
        self.tokens += ids
        self.slots += [-1] * len(ids)
        self.positions += range(start, start + len(ids))

    def show(self, image: np.ndarray, planner: MediaPlanner, tokenizer: Tokenizer, about: str) -> None:
        """Adds an image, as `planner.load` gives it, about which a text asks. What stands in `tokens` at its rows is
        never read."""
        media, spelled = planner.read(image)
        first = len(self.media) * planner.rows
        self.media.append(planner.about(media, about, tokenizer))
        group = None
        for piece in spelled:
            if isinstance(piece, str):
                self.say(tokenizer.encode(piece))
                group = None
                continue
            group = self.row(first, piece, planner.group(piece), group)

    def row(self, first: int, piece: int, group: int | None, before: int | None) -> int | None:
        """Adds a row of an image whose rows are counted from `first` on, of a group that shares a position (see
        `MediaPlanner.group`), behind one of the group `before`; -> its group."""
        start = self.positions[-1] + 1 if self.positions else 0
        self.positions.append(start - 1 if group is not None and group == before else start)
        self.tokens.append(0)
        self.slots.append(first + piece)
        return group


def write(
    text: str,
    images: Sequence[np.ndarray],
    planner: MediaPlanner,
    tokenizer: Tokenizer,
    *,
    to: Written | None = None,
    about: str | None = None,
) -> Written:
    """A text with the planner's mark, `<image>`, for every image. `to`: continues it; `about`: what is asked about the
    images, by default the text without them.

    Raises:
        UserError: the numbers of placeholders and images differ.
    """
    parts = text.split(planner.mark)
    if len(parts) - 1 != len(images):
        raise UserError(
            f"{len(parts) - 1} {planner.mark} in the text, but {len(images)} {planner.called} are given: {text[:60]!r}"
        )
    written = to or Written()
    about = "".join(parts) if about is None else about
    for number, part in enumerate(parts):
        if number:
            written.show(images[number - 1], planner, tokenizer, about)
        if part:
            written.say(tokenizer.encode(part))
    return written


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of prompts, some with images."""

    written: tuple[Written, ...]
    planner: MediaPlanner

    @classmethod
    def of(
        cls,
        prompts: Sequence[tuple[str, Sequence[np.ndarray]]],
        planner: MediaPlanner,
        tokenizer: Tokenizer,
    ) -> "Prompts":
        """Each begun with `<bos>` where the tokenizer has one."""
        made = []
        for text, images in prompts:
            start = Written()
            if tokenizer.bos_id is not None:
                start.say([tokenizer.bos_id])
            made.append(write(text, images, planner, tokenizer, to=start))
        return cls(tuple(made), planner)

    @property
    def tokens(self) -> list[list[int]]:
        """What `Generator.generate` takes as prompts."""
        return [written.tokens for written in self.written]

    def beside(self, length: int) -> tuple[Pictures]:
        """What the model's `prefill` takes beside tokens that are padded to a length."""
        images = max((len(written.media) for written in self.written), default=0)
        return (jax.tree.map(jnp.asarray, pictures(self.written, self.planner, max(images, 1), length)),)


def pictures(written: Sequence[Written], planner: MediaPlanner, images: int, length: int) -> Pictures:
    """Rows padded to `length` tokens and `images` images, as NumPy arrays."""
    shape = len(written), length
    slot, positions = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    media = []
    for i, row in enumerate(written):
        count = len(row.tokens)
        slot[i, :count] = row.slots
        positions[i, :count] = row.positions
        empty = planner.nothing(images - len(row.media))
        media.append(
            jax.tree.map(lambda e, *m: np.concatenate([*(x[None] for x in m), e]), empty, *row.media)
        )
    return Pictures(jax.tree.map(lambda *rows: np.stack(rows), *media), slot, positions)
