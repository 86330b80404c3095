import hashlib
import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from research.data import tokenizer as module
from research.data.tokenizer import SHIPPED, Tokenizer, train
from research.errors import UserError

HARD = [
    "",
    " ",
    "\x00\x01\x7f\x80\x9f",
    "a\r\n\tb\r\r\n  c \n\n\n    ",
    "<pad><bos><eos> <eos>",
    "naïve e\u0301 é \u200d \ufeff \ufffd \U0010ffff",
    "👩‍👩‍👧‍👦🏳️‍🌈 漢字 עברית",
    "def f(x):\n\treturn 1234567890 ** x  # 3.14\n",
]


def random_texts(count: int) -> list[str]:
    """Texts of code points from the whole of Unicode (surrogates are none) and from ASCII."""
    draw = random.Random(0)
    ranges = [(0, 0x80), (0, 0x800), (0, 0xD800), (0xE000, 0x110000)]
    return ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(40)) for _ in range(count)]


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return Tokenizer.load()


@pytest.fixture(scope="module")
def pieces() -> tokenizers.Tokenizer:
    """A vocabulary as SentencePiece makes them: word starts marked, unknown characters as bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ("▁", "a", "b", "▁a", "▁ab", "é"):
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def test_every_text_round_trips(shipped):
    texts = HARD + random_texts(500)
    ids = shipped.encode_batch(texts)
    assert [shipped.decode(i) for i in ids] == texts
    assert [shipped.encode(t) for t in texts[:20]] == ids[:20]


def test_shipped_vocabulary(shipped):
    assert shipped.vocab_size == 4096
    assert (shipped.pad_id, shipped.bos_id, shipped.eos_id) == (0, 1, 2)
    assert shipped.encode("x", bos=True, eos=True) == [1, *shipped.encode("x"), 2]
    assert len(shipped.encode("7043")) == 4  # digits stand alone
    line, *_ = shipped.encode("\n        return")
    assert shipped.decode([line]) == "\n        "  # a line break and its indentation are one token


def test_text_of_special_tokens_is_text(shipped):
    ids = shipped.encode("<bos>a<eos><pad>")
    assert not {0, 1, 2} & set(ids)
    assert shipped.decode([1, *ids, 2]) == "<bos>a<eos><pad>"
    assert shipped.decode([1, *ids, 2], skip_special=False) == "<bos><bos>a<eos><pad><eos>"


def test_token_bytes_add_up_to_the_text(shipped):
    sizes = shipped.token_bytes
    assert sizes.shape == (4096,) and sizes.dtype == np.int32
    assert sizes[:3].tolist() == [0, 0, 0]
    assert (sizes[3:] > 0).all()
    for text in HARD + random_texts(50):
        assert sizes[shipped.encode(text)].sum() == len(text.encode())


def test_stream_adds_up_and_never_shows_half_a_character(shipped):
    draw = random.Random(1)
    for text in HARD + random_texts(50):
        ids = shipped.encode(text)
        stream = shipped.stream()
        shown = [stream.push(i) for i in ids]
        assert "".join(shown) + stream.flush() == text
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(shown)
        # Ids in any order, as an untrained model draws them: bytes that are no UTF-8 are shown once.
        draw.shuffle(ids)
        stream = shipped.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == shipped.decode(ids)


def test_stream_by_hand():
    tokenizer = train(["x"], vocab_size=259)  # the 256 bytes and the special tokens: a token is a byte
    first, second = tokenizer.encode("é")  # C3 A9
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("a")] == ["a"]
    assert stream.push(first) == ""
    assert stream.push(second) == "é"
    assert stream.push(tokenizer.eos_id) == ""
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_training_is_deterministic(tmp_path):
    texts = ["for i in range(10):\n    print(i)\n", "for j in range(20):\n    print(j)\n"]
    a, b = train(texts, 270), train(iter(texts), 270)
    assert a.fingerprint == b.fingerprint
    assert a.fingerprint != train(texts, 269).fingerprint
    with pytest.raises(UserError, match=r"the texts give a vocabulary of \d+ tokens, not 5000"):
        train(texts, 5000)
    a.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path).fingerprint == a.fingerprint
    assert Tokenizer.load(str(tmp_path / "tokenizer.json")).encode(texts[0]) == a.encode(texts[0])


def test_the_command_makes_the_shipped_kind_of_file(tmp_path, capsys):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"value_{i} = compute({i})\n" * 3)
    output = tmp_path / "out.json"
    module.main([f"--source={tmp_path}/*.txt", "--vocab-size=265", f"--output={output}"])
    made = Tokenizer.load(output)
    assert made.vocab_size == 265
    assert made.fingerprint[:12] in capsys.readouterr().out
    ours, shipped = (json.loads(path.read_text()) for path in (output, SHIPPED))
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"):
        assert ours[part] == shipped[part]


def test_a_users_vocabulary_with_byte_fallback(pieces, tmp_path):
    pieces.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    for text in ("ab a", "é ö 漢 a", "a  b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        stream = tokenizer.stream()
        shown = "".join(map(stream.push, tokenizer.encode(text))) + stream.flush()
        assert shown == text
    size = {token: int(tokenizer.token_bytes[i]) for token, i in tokenizer.backend.get_vocab().items()}
    assert [size[t] for t in ("<s>", "<0xC3>", "▁", "a", "▁ab", "é")] == [0, 1, 1, 1, 3, 2]


def test_word_pieces_count_the_space_they_stand_for():
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        ["a cat sat a cats"],
        trainers.WordPieceTrainer(vocab_size=40, special_tokens=["[UNK]", "[CLS]", "[SEP]"]),
    )
    tokenizer = Tokenizer(backend)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = tokenizer.encode("a cats a cat")
    # The space before the first word is counted too: it isn't there, and every later one is.
    assert tokenizer.token_bytes[ids].sum() == len(" a cats a cat")


def test_names_of_special_tokens(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE({"x": 0, "<|endoftext|>": 1, "<turn>": 2}, []))
    backend.add_special_tokens(["<|endoftext|>", "<turn>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    plain = Tokenizer.load(tmp_path)
    assert (plain.bos_id, plain.eos_id, plain.pad_id) == (None, 1, None)
    with pytest.raises(UserError, match="the tokenizer has no bos token; known names are <bos>"):
        plain.encode("x", bos=True)
    config = {"eos_token": {"content": "<turn>"}, "pad_token": "<|endoftext|>", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    configured = Tokenizer.load(tmp_path)
    assert (configured.bos_id, configured.eos_id, configured.pad_id) == (None, 2, 1)
    assert configured.fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": {"x": 1}}, r"tokenizer_config.json: bos_token is {'x': 1}; a text, null or an object with"),
        ({"eos_token": 3}, "tokenizer_config.json: eos_token is 3; a text, null or"),
        ([], "tokenizer_config.json holds a list; a JSON object is expected"),
    ],
)  # fmt: skip
def test_a_config_without_names_is_told(shipped, tmp_path, config, message):
    shipped.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_with_holes():
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 5}, []))
    tokenizer = Tokenizer(backend)
    assert tokenizer.vocab_size == 6
    # Such a tokenizer decodes to "a b": each token adds a space and a letter.
    assert tokenizer.token_bytes.tolist() == [2, 0, 0, 0, 0, 2]


def test_errors(shipped, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*missing.json"):
        Tokenizer.load(tmp_path / "missing.json")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer.json of the tokenizers library"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="not valid Unicode"):
        shipped.encode("half a pair: \ud83d")


def test_shipped_file_is_the_one_that_was_measured():
    assert hashlib.sha256(SHIPPED.read_bytes()).hexdigest()[:16] == "868e264ab6ee367b"
