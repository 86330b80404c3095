import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from research.config import build, of
from research.data import token_cache
from research.data.sources import open_source
from research.data.text import TokenDataset
from research.data.token_cache import tokenized
from research.data.token_swap import TokenSwap
from research.data.tokenizer import Tokenizer, train
from research.errors import UserError
from research.training.feed import check_fit


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two folders of short texts of different letters."""
    root = tmp_path_factory.mktemp("corpus")
    for name, letter, count in (("lower", "a", 30), ("upper", "A", 12)):
        (root / name).mkdir()
        for i in range(count):
            text = "".join(chr(ord(letter) + (i * j + j) % 26) for j in range(20 + 3 * i))
            (root / name / f"{i:02}.txt").write_text(text)
    return root


def records(dataset, start, batch_size, count, **arguments):
    """The tokens of `count` records from `start` on, however they are batched."""
    batches = dataset.batches(start, batch_size, **arguments)
    rows = list(itertools.chain.from_iterable(b["tokens"] for b in itertools.islice(batches, count)))
    return np.array(rows[:count])


def lower(corpus, **fields):
    return TokenDataset(sources=f"{corpus}/lower/*.txt", split="all", **{"length": 16, **fields})


def test_element_spec_is_what_batches_hold(corpus):
    dataset = lower(corpus)
    assert dataset._packed is None  # nothing is read for the spec
    spec = dataset.element_spec()
    assert dataset._packed is None
    batch = next(dataset.batches(0, 4))
    assert (
        set(batch) == set(spec) == {"tokens", "targets", "segments", "positions", "target_bytes", "weights"}
    )
    for name, value in batch.items():
        assert value.shape == (4, *spec[name].shape) and value.dtype == spec[name].dtype


def test_a_pass_holds_every_byte_once(corpus):
    dataset = lower(corpus)
    batches = list(dataset.batches(0, 5, epochs=1))
    text_bytes = sum(path.stat().st_size for path in (corpus / "lower").iterdir())
    assert sum(b["target_bytes"].sum() for b in batches) == text_bytes
    # Per document all tokens but <bos> are targets.
    assert sum(b["weights"].sum() for b in batches) == dataset.num_tokens - 30
    assert len(dataset) == -(-(dataset.num_tokens - 1) // 16)


def test_unshuffled_rows_are_the_documents_in_order(corpus):
    dataset = lower(corpus, shuffle=False)
    stream = np.concatenate([b["targets"] for b in dataset.batches(0, 4, epochs=1)]).ravel()
    ids = list(
        itertools.chain.from_iterable(
            dataset.tokenizer.encode(path.read_text(), bos=True, eos=True)
            for path in sorted((corpus / "lower").iterdir())
        )
    )
    np.testing.assert_array_equal(stream[: len(ids) - 1], ids[1:])
    assert (stream[len(ids) - 1 :] == 0).all()


def test_every_epoch_has_all_records_in_its_own_order(corpus):
    dataset = lower(corpus)
    size = len(dataset)
    epochs = [dataset.take(np.arange(e * size, (e + 1) * size))["targets"] for e in range(3)]
    everything = np.sort(dataset._packed[0].source.tokens)
    for targets in epochs:
        # The targets of an epoch are all tokens but the stream's first, which is a <bos>.
        real = np.sort(np.concatenate([targets[targets > 0], [dataset.tokenizer.bos_id]]))
        np.testing.assert_array_equal(real, everything)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    rows = [set(map(bytes, e)) for e in epochs]
    assert rows[0] != rows[1]  # documents meet in other rows, not only rows in another order


@pytest.mark.parametrize(("batch_size", "hosts"), [(1, 1), (12, 1), (4, 2), (12, 4)])
@pytest.mark.parametrize("start", [40, 81, 150])
def test_order_depends_on_nothing_but_the_record_number(corpus, batch_size, hosts, start):
    count = 48
    dataset = lower(corpus)
    assert start // len(dataset) != (start + count - 1) // len(dataset)  # an epoch ends on the way
    expected = dataset.take(np.arange(start, start + count))["tokens"]
    parts = [
        records(lower(corpus), start, batch_size, count, rows=range(k, batch_size, hosts))
        for k in range(hosts)
    ]
    for k in range(hosts):
        mine = [i for i in range(count) if i % batch_size % hosts == k]
        np.testing.assert_array_equal(parts[k][: len(mine)], expected[mine])


def test_resume_with_another_number_of_hosts(corpus):
    expected = lower(corpus).take(np.arange(60))["tokens"]
    seen = list(records(lower(corpus), 0, 4, 20))
    halves = [iter(records(lower(corpus), 20, 8, 20, rows=range(k, 8, 2))) for k in range(2)]
    seen += [next(halves[i % 2]) for i in range(40)]
    np.testing.assert_array_equal(seen, expected)


def test_seed(corpus):
    first = [lower(corpus, seed=s).take(np.arange(20))["tokens"].tobytes() for s in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


def mixture(corpus, a, b):
    sources = ((f"{corpus}/lower/*.txt", a), (f"{corpus}/upper/*.txt", b))
    return TokenDataset(sources=sources, split="all", length=16)


def test_mixture_is_exact(corpus):
    dataset = mixture(corpus, 1.0, 3.0)
    sizes = [len(p) for p in dataset.prepare()._packed]
    total = sum(sizes)
    assert len(dataset) == total
    three_epochs = dataset.take(np.arange(3 * total))["tokens"]
    text = [dataset.tokenizer.decode(row[row > 2]) for row in three_epochs]
    is_upper = np.array([any(c.isupper() for c in t) for t in text])
    for epoch in range(3):
        share = is_upper[epoch * total : (epoch + 1) * total]
        assert share.sum() == dataset._counts[1]
        assert abs(share.sum() - total * 3 / 4) < 1
        assert np.abs(np.cumsum(share) - np.arange(1, total + 1) * 3 / 4).max() <= 1.5


def test_each_source_of_a_mixture_goes_through_all_its_rows(corpus):
    dataset = mixture(corpus, 1.0, 1.0)
    total = len(dataset)
    source = np.tile(dataset._source, 4)
    tokens = dataset.take(np.arange(4 * total))["tokens"]
    for i, packed in enumerate(dataset._packed):
        mine = tokens[source == i]
        alone = packed.take(np.arange(len(mine)))["tokens"]
        np.testing.assert_array_equal(mine, alone)
        # A whole pass of the source has each of its rows once, whatever the epochs of the mixture.
        assert len(mine) > len(packed)
        passes = packed.take(np.arange(len(packed)))["targets"]
        assert np.count_nonzero(passes > 0) == len(packed.source.tokens) - 1


def test_tokens_are_encoded_once(corpus, data_home, monkeypatch):
    calls = []
    lower(corpus).prepare(lambda *call: calls.append(call))
    assert calls == [("tokenize", 30, 30)]
    monkeypatch.setattr(token_cache, "_encode", None)  # an encoding now would fail
    again = lower(corpus, length=32).prepare(lambda *call: calls.append(call))
    assert len(calls) == 1 and len(again) > 0
    monkeypatch.undo()
    monkeypatch.setenv("LATHE_DATA_DIR", str(data_home))
    other = train(["abc" * 9], 260)
    tokenized(open_source(f"{corpus}/lower/*.txt", "all"), other)
    assert len(list((data_home / "tokens").iterdir())) == 2  # another vocabulary, another cache


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tokens.bin", lambda path, old: path.write_bytes(old[:-2]), r"\d+ tokens where \d+ belong"),
        ("tokens.bin", lambda path, old: path.write_bytes(old[:-1]), ".*multiple of the data-type size"),
        ("tokens.bin", lambda path, old: path.write_bytes(b""), ".*empty file"),
        ("tokens.bin", lambda path, old: path.unlink(), ".*No such file"),
        ("tokens.bin", lambda path, old: path.write_bytes(b"\xff" * len(old)), "a token is not one of the 4096 "),
        ("offsets.npy", lambda path, old: path.write_bytes(old[:20]), ".*"),
        ("offsets.npy", lambda path, old: path.write_bytes(b""), ".*"),
        ("offsets.npy", lambda path, old: path.write_bytes(b"garbage"), ".*"),
        ("offsets.npy", lambda path, old: np.save(path, np.int64([0, 9, 5])), "offsets.npy holds no offsets"),
        ("offsets.npy", lambda path, old: np.save(path, np.int64([])), ".*"),
    ],
)  # fmt: skip
def test_damaged_cache_is_named(corpus, data_home, name, damage, message):
    lower(corpus).prepare()
    (file,) = data_home.glob(f"tokens/*/{name}")
    damage(file, file.read_bytes())
    with pytest.raises(UserError, match=rf"tokens/\w+ is damaged: {message}.*; delete it"):
        next(lower(corpus).batches(0, 2))


def test_vocabulary_of_more_than_16_bits(corpus):
    tokenizer = Tokenizer.load()
    source = open_source(f"{corpus}/lower/*.txt", "all")
    small = tokenized(source, tokenizer)
    tokenizer.vocab_size = 1 << 17
    tokenizer.fingerprint = "large"
    large = tokenized(source, tokenizer)
    assert (small.tokens.dtype, large.tokens.dtype) == (np.uint16, np.uint32)
    np.testing.assert_array_equal(small.tokens, large.tokens)
    np.testing.assert_array_equal(small.offsets, large.offsets)


def test_tokenizers_of_the_user(corpus, tmp_path):
    own = train(["abcdefghijklmnopqrstuvwxyz"], 262)
    own.save(tmp_path / "tokenizer.json")
    by_path, by_object = lower(corpus, tokenizer=str(tmp_path)), lower(corpus, tokenizer=own)
    np.testing.assert_array_equal(
        by_path.take(np.arange(9))["tokens"], by_object.take(np.arange(9))["tokens"]
    )
    assert by_path.tokenizer.vocab_size == 262


def test_config(corpus):
    config = of(TokenDataset, sources=((f"{corpus}/lower/*.txt", 2.0),), split="all", length=8)
    dataset = build(config)
    assert dataset.length == 8 and len(dataset) > 0
    assert [f.name for f in dataclasses.fields(TokenDataset)] == [
        "sources", "split", "length", "tokenizer", "seed", "shuffle", "keep",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 0}, "length 0: a row has at least one token"),
        ({"seed": -1}, "seed -1: from 0 to 2"),
        ({"tokenizer": "nowhere"}, "no tokenizer at nowhere"),
        ({"sources": ()}, "sources: at least one is expected"),
        ({"sources": (("a", 1.0), ("a", 2.0))}, "names one twice"),
        ({"sources": (("a", 0.0),)}, "sources: a has weight 0.0; a positive number is expected"),
        ({"sources": (("a", float("nan")),)}, "sources: a has weight nan"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(UserError, match=message):
        TokenDataset(**fields)


def test_data_that_does_not_fit_the_model_or_other_data_is_told(tmp_path):
    train(["abc" * 9], 260).save(tmp_path / "tokenizer.json")
    own = TokenDataset("nowhere", length=8, tokenizer=str(tmp_path))
    swapped = TokenSwap(TokenDataset("nowhere", length=8))
    held_out = [SimpleNamespace(name="b", data=own)]
    stages = [SimpleNamespace(name="a", data=None)]
    check_fit(SimpleNamespace(vocab_size=260, max_length=8), own, stages, held_out)
    for model, data, message in (
        (dict(vocab_size=259), own, "vocab_size of the model is 259, but the data of stage 'a' needs at least 260"),
        (dict(max_length=7), own, "max_length of the model is 7, but the data of stage 'a' needs at least 8"),
        ({}, swapped, r"the tokenizer of evaluator 'b' is one of 260 .*, that of stage 'a' is one of 4096 tokens"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            check_fit(SimpleNamespace(**model), data, stages, held_out)


def test_wrong_source_is_told_when_it_is_prepared():
    with pytest.raises(UserError, match=r"no file matches 'bultin'; did you mean builtin\?"):
        TokenDataset("bultin").prepare()
    with pytest.raises(UserError, match="no file matches 'bultin'"):
        TokenDataset("bultin").batches(0, 4)  # not only when the first batch is taken
