"""The word-swap attack: which words, how many, and nothing but the inputs."""

import numpy as np
import pytest

from research.config import build, of
from research.data.text import TokenDataset
from research.data.token_swap import TokenSwap
from research.data.tokenizer import train
from research.errors import UserError

BYTES = train([], vocab_size=259)
TEXT = "one two_2 (three) four, 5 six!\n"


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 40)
    return TokenDataset(str(tmp_path / "text.txt"), split="all", length=80, tokenizer=BYTES, shuffle=False)


def attacked(rows, numbers, **fields):
    return rows.take(numbers), TokenSwap(rows, **fields).take(numbers)


def test_all_words_and_nothing_else(rows):
    """With a byte a token the text shows what was replaced: signs, spaces and the first <bos> are left."""
    clean, swapped = attacked(rows, np.arange(1), rate=1.0)
    assert clean["tokens"][0, 0] == BYTES.bos_id == swapped["tokens"][0, 0]
    assert BYTES.decode(swapped["tokens"][0, 1:32]) == "??? ????? (?????) ????, ? ???!\n"
    for name, value in clean.items():
        if name != "tokens":
            np.testing.assert_array_equal(swapped[name], value)
    _, tokens = attacked(rows, np.arange(1), rate=1.0, unit="token", generic="#")
    assert BYTES.decode(tokens["tokens"][0, 1:32]) == "#" * 31


def test_a_word_is_replaced_whole_and_the_share_is_the_rate(rows):
    numbers = np.arange(3 * len(rows))
    clean, swapped = attacked(rows, numbers, rate=0.25)
    words = replaced = 0
    for before, after in zip(clean["tokens"], swapped["tokens"], strict=True):
        text, attack = (BYTES.decode(row, skip_special=False) for row in (before, after))
        start = text.index(">") + 1 if text.startswith("<") else 0
        for one, other in zip(text[start:].split(), attack[start:].split(), strict=True):
            letters = "".join(c for c in one if c.isalnum() or c == "_")
            if letters:
                words += 1
                replaced += other != one
                assert other in (one, one.replace(letters, "?" * len(letters)))
    assert replaced / words == pytest.approx(0.25, abs=0.02)


def test_a_record_depends_on_its_number_alone(rows):
    swap = TokenSwap(rows, rate=0.2)
    whole = swap.take(np.arange(6))["tokens"]
    np.testing.assert_array_equal(swap.take(np.asarray([4, 1]))["tokens"], whole[[4, 1]])
    again = np.concatenate([batch["tokens"] for batch in swap.batches(2, 2, epochs=1)])
    np.testing.assert_array_equal(again[:4], whole[2:])
    assert (TokenSwap(rows, rate=0.2, seed=1).take(np.arange(6))["tokens"] != whole).any()
    clean = rows.take(np.arange(6))["tokens"]
    more = TokenSwap(rows, rate=0.4).take(np.arange(6))["tokens"]
    assert (more != clean)[whole != clean].all()  # what a smaller rate replaces stays replaced
    np.testing.assert_array_equal(TokenSwap(rows, rate=0.0).take(np.arange(6))["tokens"], clean)
    assert len(swap) == len(rows) and swap.element_spec() == rows.element_spec()


def test_words_of_several_tokens_and_padding():
    """In the shipped vocabulary a word may be several tokens; the last row is padded and stays so."""
    rows = TokenDataset("builtin", split="test", length=64, shuffle=False)
    swap = build(of(TokenSwap, data=of(TokenDataset, split="test", length=64, shuffle=False), rate=1.0))
    ids = rows.tokenizer.encode("x = self._everything + some_name2(arg)")
    pieces = [rows.tokenizer.decode([i]) for i in ids]
    assert pieces == [
        "x",
        " =",
        " self",
        "._",
        "e",
        "ver",
        "ything",
        " +",
        " some",
        "_name",
        "2",
        "(arg",
        ")",
    ]
    units = swap._units(np.asarray([ids]), np.ones((1, len(ids)), int))
    assert units.tolist() == [[0, -1, 1, 2, 2, 2, 2, -1, 3, 3, 3, 4, -1]]
    # Another document begins another word.
    assert swap._units(np.asarray([ids[8:11]]), np.asarray([[1, 1, 2]])).tolist() == [[0, 0, 1]]
    last = len(rows) - 1
    clean, swapped = (data.take(np.asarray([last])) for data in (rows, swap))
    padding = clean["segments"][0] == 0
    assert padding.any()
    np.testing.assert_array_equal(swapped["tokens"][0, padding], clean["tokens"][0, padding])


def test_what_can_not_be_is_told(rows):
    for fields, told in (
        (dict(rate=1.5), "rate 1.5: the share of replaced words is from 0 to 1"),
        (dict(generic="<unk>"), "generic '<unk>': it is 5 tokens of the tokenizer; one is expected"),
        (dict(unit="line"), "unit 'line': words or single tokens are replaced"),
        (dict(seed=-1), "seed -1: from 0"),
    ):
        with pytest.raises(UserError, match=told):
            TokenSwap(rows, **fields)
