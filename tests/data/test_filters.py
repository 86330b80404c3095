import itertools
import json

import numpy as np
import pytest

from research.data.filters import Filtered, Gopher
from research.data.sources import open_source
from research.data.text import TokenDataset
from research.errors import UserError

PROSE = "It is to be seen that words of the text have mean length with which prose is kept"  # 18 words


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (PROSE, True),
        ("", False),
        (PROSE.rpartition(" ")[0], False),  # 17 words
        (f"{PROSE} now", True),
        (f"{PROSE} and now", False),  # 20 words
        ("that with " + "a " * 16, False),  # mean length below 3
        ("that with " + "abcdefghijk " * 16, False),  # above 10: (8 + 176) / 18
        (f"{PROSE} #", True),  # 1 in 19
        (f"{PROSE} ##", False),
        (f"… {PROSE}", True),
        (f"…... {PROSE}", False),
        (PROSE + "...", False),  # the only line ends with an ellipsis
        (PROSE.replace(" ", "\n", 3) + "...", True),  # one of four
        (f"- {PROSE}", False),
        (PROSE.replace(" ", "\n- ", 1), True),  # half of the lines
        ("that with " + "words " * 13 + "1234 1234 1234", True),  # 15 of 18 have a letter
        ("that with " + "words " * 12 + "1234 1234 1234 1234", False),  # 14
        ("that " + "words " * 17, False),  # one stop word
        ('"That, words ' + "words " * 15 + "with.", True),
    ],
)
def test_gopher(text, kept):
    assert Gopher(18, 19)(text) is kept


@pytest.fixture
def files(tmp_path):
    """Two sources of 40 documents, every third of which is left out."""
    for name, letter in (("one", "a"), ("two", "B")):
        texts = [f"with that {letter * (3 + i)} or {i}" if i % 3 else letter * i for i in range(1, 41)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return {name: f"jsonl:{tmp_path}/{name}.jsonl:text" for name in ("one", "two")}


KEEP = Gopher(least=4)


def test_documents_that_are_left_out(files):
    source = open_source(files["one"], "all")
    kept = Filtered(source, KEEP, "one")
    letters = [i for i in range(1, 41) if i % 3 and 13 + i + len(str(i)) <= 50]  # 10 characters a word
    assert [kept[i] for i in range(len(kept))] == [f"with that {'a' * (3 + i)} or {i}" for i in letters]
    others = (source, Filtered(source, Gopher(least=3), "one"), Filtered(kept, KEEP, "one"))
    assert kept.fingerprint not in [other.fingerprint for other in others]
    assert kept.fingerprint == Filtered(source, Gopher(least=4), "another name").fingerprint


def test_what_is_wrong(files):
    source = open_source(files["one"], "all")
    with pytest.raises(UserError, match="one: .* keeps none of the 40 documents"):
        len(Filtered(source, Gopher(), "one"))
    with pytest.raises(UserError, match="a dataclass is expected"):
        Filtered(source, str.isalpha, "one")


def test_a_filtered_mixture_goes_on_with_another_number_of_hosts(files):
    """72 packed records, an epoch and a half: by one process, from record 24 on by two, from 48 on by three."""

    def opened():
        sources = ((files["one"], 2.0), (files["two"], 1.0))
        return TokenDataset(sources=sources, split="all", length=16, keep=KEEP)

    dataset = opened()
    expected = dataset.take(np.arange(72))
    assert 48 == len(dataset) < len(TokenDataset(dataset.sources, "all", 16))
    seen = []
    for start, hosts in ((0, 1), (24, 2), (48, 3)):
        parts = [opened().batches(start, 6, rows=range(k, 6, hosts)) for k in range(hosts)]
        for batches in itertools.islice(zip(*parts, strict=True), 4):
            seen += [{k: v[i // hosts] for k, v in batches[i % hosts].items()} for i in range(6)]
    for name, values in expected.items():
        np.testing.assert_array_equal(np.stack([record[name] for record in seen]), values)
