"""Speech and text as two streams of tokens: sequences of segments of either, and batches of spoken digits as such.

A segment is begun by its modality's <bos> and ended by its <eos>. Every token has a time, its place in the whole
sequence; each stream holds its own tokens alone, in order.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from research.data.pipeline import RecordDataset
from research.data.spoken import HOP, STACK, SpokenSource, units
from research.data.tokenizer import Tokenizer
from research.errors import UserError

Modality = Literal["text", "speech"]
MODALITIES: tuple[Modality, Modality] = ("text", "speech")
CHARACTERS = Path(__file__).with_name("characters.json")
PADDING = np.iinfo(np.int32).max  # the time where no token is
NUM_UNITS = 64
UNIT_BOS, UNIT_EOS, UNIT_VOCABULARY = NUM_UNITS, NUM_UNITS + 1, NUM_UNITS + 2


@functools.cache
def characters() -> Tokenizer:
    """The tokenizer of single characters in `CHARACTERS`: printable ASCII and the line break; any other is <unk>."""
    return Tokenizer.load(CHARACTERS)


def make_characters() -> Tokenizer:
    """What `CHARACTERS` was written from."""
    special = ("<pad>", "<bos>", "<eos>", "<unk>")
    vocabulary = dict.fromkeys((*special, "\n", *map(chr, range(32, 127))))
    backend = tokenizers.Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(special))
    return Tokenizer(backend)


@dataclasses.dataclass(frozen=True)
class Laid:
    """A stream of one sequence: tokens and times of equal length; written[i]: whether token i is to be learnt from what
    precedes it."""

    tokens: list[int]
    times: list[int]
    written: list[bool]


def lay_out(segments: Sequence[tuple[Modality, Sequence[int], bool]]) -> dict[Modality, Laid]:
    """(modality, tokens with their <bos> and <eos>, whether the model is to write them) in order -> both streams."""
    streams = {modality: Laid([], [], []) for modality in MODALITIES}
    time = 0
    for modality, tokens, written in segments:
        stream = streams[modality]
        stream.tokens.extend(tokens)
        stream.times.extend(range(time, time + len(tokens)))
        stream.written.extend([False] + [written] * (len(tokens) - 1))
        time += len(tokens)
    return streams


@functools.lru_cache(maxsize=1 << 14)
def spelled(source: SpokenSource, number: int) -> dict[Modality, tuple[int, ...]]:
    """A record as tokens: its text in `characters`, and its units."""
    recording = source[number]
    said = units(recording.wave).tolist()
    return {
        "text": tuple(characters().encode(recording.text, bos=True, eos=True)),
        "speech": (UNIT_BOS, *said, UNIT_EOS),
    }


@dataclasses.dataclass(frozen=True)
class Utterances(RecordDataset):
    """Pairs of speech and text. Of each modality m: `m/tokens`, `m/targets`, `m/times` int32[length of m] and
    `m/weights` f32[...], 1 where the target belongs to a segment that the model writes.

    Args:
        source: of recordings.
        orders: of a record's segments, the last of which is written; recording i has order (i + epoch) % len(orders).
            Speech before text is recognition, text before speech is synthesis.
        text_length, speech_length: tokens of a row; more are cut off.
    """

    source: SpokenSource
    orders: tuple[tuple[Modality, ...], ...] = (("speech", "text"),)
    text_length: int = 32
    speech_length: int = 80

    tokenizer_file = str(CHARACTERS)

    def __post_init__(self):
        if not self.orders or any(sorted(order) != sorted(MODALITIES) for order in self.orders):
            raise UserError(f"Utterances: orders={self.orders}: each is speech and text, in either order")

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        lengths = {"text": self.text_length, "speech": self.speech_length}
        return {
            f"{m}/{name}": jax.ShapeDtypeStruct((length,), np.float32 if name == "weights" else np.int32)
            for m, length in lengths.items()
            for name in ("tokens", "targets", "times", "weights")
        }

    def __len__(self) -> int:
        return len(self.source)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        batch = {k: np.zeros((len(numbers), *s.shape), s.dtype) for k, s in self.element_spec().items()}
        for row, number in enumerate(map(int, numbers)):
            epoch, place = divmod(number, len(self))
            said = spelled(self.source, place)
            order = self.orders[(place + epoch) % len(self.orders)]
            for m, laid in lay_out([(m, said[m], m == order[-1]) for m in order]).items():
                tokens, targets, times, weights = (
                    batch[f"{m}/{name}"][row] for name in ("tokens", "targets", "times", "weights")
                )
                kept = len(laid.tokens[: len(tokens)])
                tokens[:kept], times[:kept] = laid.tokens[:kept], laid.times[:kept]
                times[kept:] = PADDING
                following = len(laid.tokens[1 : len(tokens) + 1])
                targets[:following] = laid.tokens[1 : following + 1]
                weights[:following] = laid.written[1 : following + 1]
        return batch


@dataclasses.dataclass(frozen=True)
class UnitRows(RecordDataset):
    """Language batches (docs/architecture.md) of the units of a source alone, an utterance a row, cut off at `length`.

    `target_bytes` counts the samples of 8 kHz, 16 bits, that a unit stands for.
    """

    source: SpokenSource
    length: int = 80

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        names = ("tokens", "targets", "segments", "positions", "target_bytes")
        spec = {name: jax.ShapeDtypeStruct((self.length,), np.int32) for name in names}
        return {**spec, "weights": jax.ShapeDtypeStruct((self.length,), np.float32)}

    def __len__(self) -> int:
        return len(self.source)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        batch = {k: np.zeros((len(numbers), self.length), s.dtype) for k, s in self.element_spec().items()}
        batch["positions"][:] = np.arange(self.length)
        for row, number in enumerate(map(int, numbers)):
            said = spelled(self.source, number % len(self))["speech"]
            count = min(len(said) - 1, self.length)
            batch["tokens"][row, :count] = said[:count]
            batch["targets"][row, :count] = said[1 : count + 1]
            for name in ("segments", "weights"):
                batch[name][row, :count] = 1
            batch["target_bytes"][row, :count] = 2 * HOP * STACK
        return batch
