"""What the claims about aggressive decoding share: the corrector that ships, lines to correct, measuring.

Lines come from the built-in corpus' test files; their errors are made (`research.data.corrections`). They are decoded
one at a time, in float32.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.data.corrections import Corrections
from research.decoding.generator import Generator
from research.training.model_directory import Loaded
from research.training.workdir import PACKAGE, load_model

CORRECTOR = "package:language/corrector"
BYTES = str(PACKAGE / "language/corrector/tokenizer.json")
RATES = {"5%": 0.05, "25%": 0.25}
_TURNS = 3


@functools.cache
def corrector() -> Loaded:
    """The model that ships."""
    return load_model(CORRECTOR)


@functools.lru_cache(maxsize=16)
def lines(rate: float, seed: int, count: int, reverse: bool = False) -> list[tuple[list[int], str]]:
    """`count` test lines, each the tokens of its corrupted form, and what is right."""
    data = Corrections(
        split="test",
        length=64,
        rates=(rate, rate),
        tokenizer=corrector().tokenizer,
        seed=seed,
        reverse=reverse,
    )
    numbers = np.arange(count)
    records = data.take(numbers)
    sources = [row[:n].tolist() for row, n in zip(records["source"], records["source_lengths"], strict=True)]
    return list(zip(sources, (right for _, right in data.texts(numbers)), strict=True))


def generator(loaded: Loaded, **fields: Any) -> Generator:
    """Plain decoding of an encoder-decoder, or what `fields` (proposer, verifier) make of it."""
    return Generator(loaded.model, loaded.params, loaded.tokenizer, **fields)


def measure(found: Generator, plain: Generator, pairs: Sequence[tuple[list[int], str]]) -> dict[str, float]:
    """Decode the source of every pair.

    Returns:
        tokens_per_call   tokens gained in a call after prefill, the model's own included: plain is 1
        calls             a line, after prefill
        speed             seconds of plain decoding / seconds, both with prefill: of every line the best of some
                          turns that the two take
        decoding          the same without prefill
        equal             share of lines whose tokens are those of plain decoding
        exact             share of lines that come out right
        edited            share of a source's tokens that the output changes: edits from one to the other
    """
    for each in (found, plain):  # compiled and warm
        each.generate([pairs[0][0]], max_new_tokens=64)
    gained, calls, equal, exact, edits, length = 0, 0, 0, 0, 0, 0
    whole, after = np.zeros(2), np.zeros(2)  # seconds, plain and found
    for source, right in pairs:
        turns = [
            [each.generate([source], max_new_tokens=64) for each in (plain, found)] for _ in range(_TURNS)
        ]
        decoding = [[result.stats.decode_seconds for result in turn] for turn in turns]
        prefill = [[result.stats.prefill_seconds for result in turn] for turn in turns]
        whole += np.min(np.add(decoding, prefill), axis=0)
        after += np.min(decoding, axis=0)
        expected, result = turns[0]
        counts, output = result.stats.gained, result.samples[0]
        gained += sum((k + 1) * n for k, n in enumerate(counts))
        calls += sum(counts)
        equal += output.tokens == expected.samples[0].tokens
        exact += output.text == right
        edits += distance(source[1:], output.tokens)
        length += len(source) - 1
    return {
        "tokens_per_call": gained / calls,
        "calls": calls / len(pairs),
        "speed": whole[0] / whole[1],
        "decoding": after[0] / after[1],
        "equal": equal / len(pairs),
        "exact": exact / len(pairs),
        "edited": edits / length,
    }


def distance(a: Sequence[int], b: Sequence[int]) -> int:
    """The least number of tokens replaced, left out or put in that makes `a` into `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(above + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]
