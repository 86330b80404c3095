"""Sequences of speech and text: times, targets and weights by hand; units alone; single characters."""

import numpy as np
import pytest

from research.data.spoken import SpokenDigits, units
from research.data.utterances import (
    CHARACTERS,
    PADDING,
    UNIT_BOS,
    UNIT_EOS,
    UnitRows,
    Utterances,
    characters,
    lay_out,
    make_characters,
)
from research.errors import UserError

SOURCE = SpokenDigits(size=2)


def test_segments_are_laid_out_in_time():
    text, speech = (
        lay_out([("speech", [7, 8], False), ("text", [1, 5, 2], True), ("speech", [9], True)])[m]
        for m in ("text", "speech")
    )
    assert (text.tokens, text.times, text.written) == ([1, 5, 2], [2, 3, 4], [False, True, True])
    assert (speech.tokens, speech.times, speech.written) == ([7, 8, 9], [0, 1, 5], [False, False, False])


def test_pairs_are_recognition_and_synthesis_in_turn():
    data = Utterances(SOURCE, (("speech", "text"), ("text", "speech")), text_length=8, speech_length=24)
    batch = data.take(np.array([0, 1, 4, 2]))  # an epoch has two records
    for name, spec in data.element_spec().items():
        assert batch[name].shape == (4, *spec.shape) and batch[name].dtype == spec.dtype
        np.testing.assert_array_equal(batch[name][0], batch[name][2])
    # In the next epoch a recording has the next order.
    for row, number, order in ((0, 0, data.orders[0]), (1, 1, data.orders[1]), (3, 0, data.orders[1])):
        said = {
            "text": characters().encode(SOURCE[number].text, bos=True, eos=True),
            "speech": [UNIT_BOS, *units(SOURCE[number].wave), UNIT_EOS],
        }
        for m in order:
            tokens, targets, times, weights = (
                batch[f"{m}/{n}"][row].tolist() for n in ("tokens", "targets", "times", "weights")
            )
            count, start = len(said[m]), 0 if m == order[0] else len(said[order[0]])
            length = len(tokens)
            assert tokens == said[m] + [0] * (length - count)
            assert targets == [*said[m][1:], *[0] * (length - count + 1)]
            assert times == [*range(start, start + count), *[PADDING] * (length - count)]
            assert weights == [float(m == order[1])] * (count - 1) + [0.0] * (length - count + 1)
    short = Utterances(SOURCE, text_length=3).take(np.array([0]))
    for name in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(short[f"text/{name}"][0], batch[f"text/{name}"][0, :3])
    with pytest.raises(UserError, match="each is speech and text, in either order"):
        Utterances(SOURCE, orders=(("text",),))


def test_units_alone_are_language_batches():
    data = UnitRows(SOURCE, length=24)
    batch = data.take(np.array([1]))
    assert {k: (v.shape[1:], v.dtype) for k, v in batch.items()} == {
        k: (s.shape, s.dtype) for k, s in data.element_spec().items()
    }
    said = [UNIT_BOS, *units(SOURCE[1].wave), UNIT_EOS]
    count = len(said) - 1
    assert (
        batch["tokens"][0, :count].tolist() == said[:-1] and batch["targets"][0, :count].tolist() == said[1:]
    )
    assert batch["weights"][0].sum() == batch["segments"][0].sum() == count
    assert batch["target_bytes"][0].sum() == 480 * count  # 30 ms of 8 kHz, two bytes a sample
    cut = UnitRows(SOURCE, length=4).take(np.array([1]))
    np.testing.assert_array_equal(cut["targets"], batch["targets"][:, :4])


def test_characters_stand_alone():
    text = 'One "two"\n{3}~'
    ids = characters().encode(text, bos=True, eos=True)
    assert len(ids) == len(text) + 2 and characters().decode(ids) == text
    assert characters().encode("é") == characters().encode("ß") and characters().vocab_size == 100
    assert make_characters().backend.to_str(pretty=True) + "\n" == CHARACTERS.read_text(encoding="utf-8")
