"""Batches of dialogues about images, videos or sounds."""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np

from research.data.dialogues import Dialogue, DialogueSource
from research.data.packing import permutation
from research.data.pipeline import RecordDataset
from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.multimodal.media import Media, MediaPlanner
from research.multimodal.prompts import Written, pictures, write


@dataclasses.dataclass(eq=False)
class Conversations(RecordDataset):
    """Language batches (docs/architecture.md) with `slot` int32[T], `patches` f32[I, V, P, p * p * 3], `grid`
    int32[I, V, 2], `marks` int32[I, V] and, where the planner keeps a text, `words` int32[I, C] as of `Media`, and
    `step_ends` int32[T] where `steps` is not "causal".

    A row is `pack` dialogues, which don't see each other: `<bos>`, and for every turn `before`, the question,
    `between`, the answer and the end token. Answers and their ends alone have weight. Text that exceeds `length` is
    cut off; an image is never cut.

    Args:
        source: of the dialogues.
        planner: how images are cut and spelled.
        tokenizer: a tokenizer.json or its folder; the source's own by default, or else the one that ships.
        length: tokens of a row.
        images: the most images of a row.
        blind: leaves images out, with what stands in their places: text for a decoder alone.
        steps: "causal"; "images": the rows of an image see each other; "prefix": all before the first answer does.
        seed, shuffle: of the order, another one in every epoch.
    """

    source: DialogueSource
    planner: MediaPlanner
    length: int
    tokenizer: str | None = None
    images: int = 1
    pack: int = 1
    before: str = ""
    between: str = " "
    blind: bool = False
    steps: Literal["causal", "images", "prefix"] = "causal"
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self):
        if self.pack < 1 or self.length < 2 or self.images < 1:
            raise UserError(
                f"Conversations: length={self.length}, images={self.images}, pack={self.pack}: at least 2, 1 and 1"
            )
        self._order = functools.lru_cache(maxsize=2)(self._compute_order)

    @functools.cached_property
    def text(self) -> Tokenizer:
        """What encodes the texts."""
        return Tokenizer.load(self.tokenizer_file)

    @property
    def tokenizer_file(self) -> str | None:
        """None: the one that ships."""
        return self.tokenizer or getattr(self.source, "tokenizer", None)

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        names = ("tokens", "targets", "segments", "positions", "target_bytes", "slot")
        names += () if self.steps == "causal" else ("step_ends",)
        spec = {name: jax.ShapeDtypeStruct((self.length,), np.int32) for name in names}
        spec["weights"] = jax.ShapeDtypeStruct((self.length,), np.float32)
        if not self.blind:
            media = self.planner.nothing(self.images)
            for name, x in media_arrays(media).items():
                spec[name] = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return spec

    def __len__(self) -> int:
        """Rows of an epoch."""
        return max(len(self.source) // self.pack, 1)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        rows = [self._row(*divmod(int(number), len(self))) for number in numbers]
        written = [row for row, _, _ in rows]
        seen = pictures(written, self.planner, self.images, self.length)
        filled = {
            name: np.zeros((len(rows), self.length), np.int32) for name in ("tokens", "targets", "segments")
        }
        weights = np.zeros((len(rows), self.length), np.float32)
        for i, (row, segments, answers) in enumerate(rows):
            count = len(row.tokens)
            filled["tokens"][i, :count], filled["segments"][i, :count] = row.tokens, segments
            filled["targets"][i, : count - 1] = row.tokens[1:]
            same = np.equal(segments[1:], segments[:-1])
            weights[i, : count - 1] = np.asarray(answers[1:]) & same
        bytes_ = self.text.token_bytes[filled["targets"]] * (weights > 0)
        batch = filled | {
            "slot": seen.slot,
            "positions": seen.positions,
            "target_bytes": bytes_.astype(np.int32),
            "weights": weights,
        }
        if self.steps != "causal":
            batch["step_ends"] = np.stack([self._step_ends(*row) for row in rows])
        return batch if self.blind else batch | media_arrays(seen.media)

    def dialogue(self, number: int) -> Dialogue:
        """What is written of record `number` of the source."""
        return self.source[number]

    def _row(self, epoch: int, place: int) -> tuple[Written, list[int], list[bool]]:
        """-> what is written, the segment of each token and whether it is of an answer."""
        order = self._order(epoch)
        row, segments, answers = Written(), [], []
        for k in range(self.pack):
            dialogue = self.dialogue(int(order[(place * self.pack + k) % len(order)]))
            start, flags = len(row.tokens), self._write(dialogue, row)
            count = len(row.tokens) - start
            # Positions of a packed dialogue begin at 0.
            row.positions[start:] = [p - row.positions[start] for p in row.positions[start:]] if count else []
            segments += [k + 1] * count
            answers += flags
        if len(row.media) > self.images:
            raise UserError(f"Conversations: a row has {len(row.media)} images, and images={self.images}")
        if any(slot >= 0 for slot in row.slots[self.length :]):
            raise UserError(
                f"Conversations: a row of {len(row.tokens)} tokens has an image behind length={self.length}"
            )
        for tokens in (row.tokens, row.slots, row.positions, segments, answers):
            del tokens[self.length :]
        return row, segments, answers

    def _write(self, dialogue: Dialogue, to: Written) -> list[bool]:
        """Adds a dialogue; -> which of its tokens are of answers."""
        answers: list[bool] = []
        images = list(dialogue.images)
        start = len(to.tokens)
        # A planner that keeps a question keeps one of a dialogue's, the shortest.
        about = min((question.replace(self.planner.mark, "") for question, _ in dialogue.turns), key=len)
        if self.text.bos_id is not None:
            to.say([self.text.bos_id])
        for question, answer in dialogue.turns:
            count = question.count(self.planner.mark)
            arrays = [x if isinstance(x, np.ndarray) else self.planner.load(x) for x in images[:count]]
            if self.blind:
                question, arrays = question.replace(self.planner.mark, ""), []
            del images[:count]
            text = self.before + question + self.between
            write(text, arrays, self.planner, self.text, to=to, about=about)
            answers += [False] * (len(to.tokens) - start - len(answers))
            end = [] if self.text.eos_id is None else [self.text.eos_id]
            to.say([*self.text.encode(answer), *end])
            answers += [True] * (len(to.tokens) - start - len(answers))
        if images:
            raise UserError(
                f"Conversations: a dialogue shows {len(dialogue.images)}, and its questions have {self.planner.mark} "
                f"for {len(dialogue.images) - len(images)}: {dialogue.turns[0][0][:60]!r}"
            )
        return answers

    def _step_ends(self, row: Written, segments: list[int], answers: list[bool]) -> np.ndarray:
        ends = np.arange(1, self.length + 1, dtype=np.int32)
        index = np.arange(len(row.tokens))
        slots, parts = np.asarray(row.slots), np.asarray(segments)
        groups = np.where(slots >= 0, slots // self.planner.rows, -1)
        if self.steps == "prefix":
            groups = np.full(len(index), -1)
            for part in set(segments):
                inside = index[parts == part]
                answer = inside[np.asarray(answers)[inside]]
                groups[inside[inside < (answer[0] if len(answer) else inside[-1] + 1)]] = part
        for group in set(groups.tolist()) - {-1}:
            members = index[groups == group]
            # An image's run: separators among its rows belong to it.
            ends[members[0] : members[-1] + 1] = members[-1] + 1
        return ends

    def _compute_order(self, epoch: int) -> np.ndarray:
        count = len(self.source)
        return permutation(count, self.seed, epoch) if self.shuffle else np.arange(count)


def media_arrays(media: Media) -> dict[str, np.ndarray]:
    """As they stand in a batch."""
    arrays = {field.name: getattr(media, field.name) for field in dataclasses.fields(media)}
    return {name: x for name, x in arrays.items() if x is not None}
