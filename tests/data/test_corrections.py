"""Corrupted lines: each kind of error, how many, and records that depend on their number alone."""

import collections

import numpy as np
import pytest

from research.data.corrections import Corrections, corrupt
from research.data.tokenizer import train
from research.errors import UserError

BYTES = train([], vocab_size=259)
LINES = [
    f"value_{name} = Compute(argument, {name!r})" for name in ("one", "two", "three", "four", "five", "six")
]


@pytest.fixture
def data(tmp_path):
    # With other lines between: too short, too long, and one that is there twice.
    text = "\n".join(f"    {line}\n\nx = 1\n{'y' * 80}" for line in [*LINES, LINES[0]])
    (tmp_path / "code.txt").write_text(text)

    def make(**fields):
        return Corrections(
            **{"sources": str(tmp_path / "code.txt"), "split": "all", "tokenizer": BYTES, **fields}
        )

    return make


def test_errors_are_of_four_kinds_alike():
    found = collections.Counter()
    for seed in range(2000):
        result = corrupt("abcdefgh", 0.08, np.random.RandomState(seed))
        one_step = {
            "dropped": {"abcdefgh"[:i] + "abcdefgh"[i + 1 :] for i in range(8)},
            "doubled": {"abcdefgh"[: i + 1] + "abcdefgh"[i:] for i in range(8)},
            "case": {"abcdefgh"[:i] + "abcdefgh"[i].upper() + "abcdefgh"[i + 1 :] for i in range(8)},
            "swapped": {
                "abcdefgh"[:i] + "abcdefgh"[i + 1] + "abcdefgh"[i] + "abcdefgh"[i + 2 :] for i in range(7)
            },
        }
        for kind, results in one_step.items():
            found[kind] += result in results
    # 2000 words of 8 letters, .02 of them of this kind and the 7 others unharmed: 320 * .92 ** 7 = 178, and for
    # swaps, which have 7 places and spend two letters, 280 * .92 ** 6 = 170; the spread is 13.
    assert set(found) == {"dropped", "doubled", "case", "swapped"}
    assert all(135 < count < 220 for count in found.values())


def test_the_rate_is_the_share_of_errors():
    assert corrupt("abc", 0.0, np.random.RandomState(0)) == "abc"
    text = "a" * 20_000
    result = corrupt(text, 0.2, np.random.RandomState(1))
    # A quarter of a fifth each: upper case; one less; one more; swaps of equal letters do not show.
    assert result.count("A") / len(text) == pytest.approx(0.05, abs=0.006)
    assert abs(len(result) - len(text)) < 300
    assert len(corrupt("ab" * 500, 1.0, np.random.RandomState(1))) < 1000 * 1.1  # every letter has an error


def test_a_record_is_a_line_and_what_was_made_of_it(data):
    corrections = data(shuffle=False, rates=(0.1, 0.1))
    assert len(corrections) == len(LINES)
    record = corrections.take(np.arange(3))
    for row, (source, right) in enumerate(corrections.texts(np.arange(3))):
        assert right == LINES[row]
        length = int(record["source_lengths"][row])
        assert record["source"][row, :length].tolist() == BYTES.encode(source, bos=True)
        assert not record["source"][row, length:].any()
        target = BYTES.encode(right, eos=True)
        assert record["targets"][row, : len(target)].tolist() == target
        assert record["weights"][row].tolist() == [1.0] * len(target) + [0.0] * (64 - len(target))
    assert record["record"].tolist() == [0, 1, 2]
    for name, spec in corrections.element_spec().items():
        assert (record[name].shape[1:], record[name].dtype) == (spec.shape, spec.dtype)


def test_records_depend_on_their_number_alone(data):
    corrections = data(seed=3)
    together = corrections.take(np.arange(12))  # two epochs
    alone = corrections.take(np.asarray([9]))
    for name in together:
        np.testing.assert_array_equal(together[name][9], alone[name][0])
    pairs = corrections.texts(np.arange(12))
    assert sorted(right for _, right in pairs[:6]) == sorted(LINES) == sorted(right for _, right in pairs[6:])
    assert len({source for source, _ in pairs}) == 12  # new errors every time
    assert data(seed=4).texts(np.arange(12)) != pairs


def test_reversed_targets(data):
    for source, right in data(rates=(0.0, 0.0), reverse=True).texts(np.arange(6)):
        assert right == source[::-1]


def test_a_source_that_gets_too_long_is_cut(data):
    record = data(length=56, rates=(1.0, 1.0)).take(np.arange(6))
    assert record["source_lengths"].max() <= 56


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(length=4), "length 4"),
        (dict(rates=(0.5, 0.2)), "rates 0.5, 0.2"),
        (dict(seed=-1), "seed -1"),
    ],
)
def test_bad_fields(data, fields, message):
    with pytest.raises(UserError, match=message):
        data(**fields)


def test_no_line_that_fits(data):
    with pytest.raises(UserError, match="no line of 240 to 720 bytes"):
        data(length=120 * 8).prepare()
