"""Questions about spoken digits: dialogues of a source of recordings (`research.data.spoken`)."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from research.data.dialogues import Dialogue
from research.data.shapes import make_vocabulary
from research.data.spoken import SpokenSource
from research.data.tokenizer import Tokenizer

TOKENIZER = Path(__file__).with_name("hearing.json")


@functools.cache
def vocabulary() -> Tokenizer:
    """The tokenizer of `TOKENIZER`: the words of shapes.json, with their ids, and then those about speech."""
    return Tokenizer.load(TOKENIZER)


def make_hearing_vocabulary() -> Tokenizer:
    """What `TOKENIZER` was written from."""
    return make_vocabulary(("were", "said"))


@dataclasses.dataclass(frozen=True)
class SpokenQuestions:
    """Recordings, each with "which digits were said" and the digits, as "3 1".

    Args:
        silent: the sound is left out, so that what is learnt is what can be known without it.
    """

    source: SpokenSource
    silent: bool = False

    tokenizer = str(TOKENIZER)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Dialogue:
        wave, said = _heard(self.source, number)
        if self.silent:
            return Dialogue((), (("which digits were said", said),))
        return Dialogue((wave,), (("<audio> which digits were said", said),))


@functools.lru_cache(maxsize=1 << 12)
def _heard(source: SpokenSource, number: int) -> tuple[np.ndarray, str]:
    """-> the wave, and what is said; kept, as generated utterances take longer to make than to read."""
    recording = source[number]
    return recording.wave, " ".join(map(str, recording.digits))
