"""Text to token ids and back: any `tokenizer.json`, and the byte-level BPE that ships.

    python -m research.data.tokenizer --output=research/data/tokenizer.json

makes the shipped file again (vocabulary 4096, trained on the training files of the built-in corpus).
"""

import argparse
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from research.errors import UserError
from research.paths import expand

SHIPPED = Path(__file__).parent / "tokenizer.json"

# The names that published tokenizers give to their special tokens, most specific first.
_NAMES = {
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|im_start|>", "[BOS]", "[CLS]"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "[EOS]", "[SEP]"),
    "pad": ("<pad>", "<|finetune_right_pad_id|>", "<|pad|>", "[PAD]"),
}

# Where a token may not cross: a word takes one sign before it (".name", "_name", " name"), digits stand
# alone, and a line break takes the next line's indentation, so that code pays one token for both.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+[ \t]*|\s+(?!\S)|\s+"


class Tokenizer:
    """A tokenizer of the `tokenizers` library, with what models and data need to know about it.

    Attributes:
      vocab_size: one more than the largest id, added tokens included.
      bos_id, eos_id, pad_id: ids of the special tokens, or `None` where the vocabulary has none.
      fingerprint: hex digest of everything that decides how text is encoded.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, str | None] | None = None):
        """Wraps `backend`. `special` names the `bos`, `eos` and `pad` tokens (`None`: there is none); common
        names are tried for the roles it leaves out."""
        backend.no_padding()
        backend.no_truncation()
        # The text of a special token inside a document is text: data can't end its own document.
        backend.encode_special_tokens = True
        self.backend = backend
        # Not the number of tokens: some published vocabularies have holes.
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = {}
        for role, names in _NAMES.items():
            if special is not None and role in special:
                names = () if special[role] is None else (special[role],)
            known = [backend.token_to_id(name) for name in names]
            ids[role] = next((i for i in known if i is not None), None)
        self.bos_id: int | None = ids["bos"]
        self.eos_id: int | None = ids["eos"]
        self.pad_id: int | None = ids["pad"]
        described = json.dumps([json.loads(backend.to_str()), ids], sort_keys=True)
        self.fingerprint: str = hashlib.sha256(described.encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path | None = None) -> "Tokenizer":
        """Reads a `tokenizer.json`, or the one in the folder `path`; without a path the shipped one.

        A `tokenizer_config.json` beside it (as Hugging Face model folders have) names the special tokens;
        else they are found by the names that are common.

        Raises:
          UserError: no such file, or not a file of the `tokenizers` library.
        """
        file = SHIPPED if path is None else expand(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"no tokenizer at {file}: expected a tokenizer.json or a folder that holds one")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for whatever it can't parse
            raise UserError(f"{file} is not a tokenizer.json of the tokenizers library: {error}") from error
        return cls(backend, _configured_names(file.with_name("tokenizer_config.json")))

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json` that `load` and other tools read."""
        Path(path).write_text(self.backend.to_str(pretty=True) + "\n", encoding="utf-8")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, between `<bos>` and `<eos>` where asked for."""
        return self.encode_batch([text], bos=bos, eos=eos)[0]

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False, eos: bool = False) -> list[list[int]]:
        """As `encode`, for many texts on all cores.

        Raises:
          UserError: a special token was asked for that the vocabulary doesn't have, or a text holds half of
            a surrogate pair and so is no Unicode text.
        """
        before = [self._required("bos", self.bos_id)] if bos else []
        after = [self._required("eos", self.eos_id)] if eos else []
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError(f"cannot encode a text that is not valid Unicode: {error}") from error
        return [before + encoding.ids + after for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 show as U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> "TextStream":
        """A decoder that takes ids one at a time and never shows half a character."""
        return TextStream(self, skip_special)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32[vocab_size]: how many bytes of UTF-8 each token stands for; 0 for special tokens.

        Exact for byte-level vocabularies and for byte-fallback tokens. For the others it is what the token
        adds to the decoded text of an ordinary token before it, which counts the space that a word-start
        mark stands for.
        """
        return _token_bytes(self.backend, self.vocab_size)

    def _required(self, role: str, token: int | None) -> int:
        if token is None:
            raise UserError(f"the tokenizer has no {role} token; known names are {', '.join(_NAMES[role])}")
        return token


class TextStream:
    """Incremental decoding: what `push` and `flush` return adds up to `tokenizer.decode` of all ids.

    A character whose bytes are spread over several tokens is shown when it is complete. Only a short tail of
    ids is decoded again for each one.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._decode = functools.partial(tokenizer.decode, skip_special=skip_special)
        self._ids: list[int] = []  # the shown tail (context that decides about spaces), then what waits
        self._shown = 0  # how many of them are shown

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._ids.append(int(token))
        text = self._pending()
        if text.endswith("\ufffd"):
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """The rest: a character cut off by the end shows as U+FFFD."""
        text = self._pending()
        self._advance()
        return text

    def _pending(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]

    def _advance(self) -> None:
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)


def train(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """A byte-level BPE with `<pad>` 0, `<bos>` 1, `<eos>` 2: every text round-trips exactly.

    Raises:
      UserError: the texts don't have enough different pieces for so many tokens.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(backend)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"the texts give a vocabulary of {tokenizer.vocab_size} tokens, not {vocab_size}")
    return tokenizer


def _configured_names(path: Path) -> dict[str, str | None] | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}; a JSON object is expected")
    # Null says that the model was trained without the token (Qwen has no <bos>).
    names = {role: config[f"{role}_token"] for role in _NAMES if f"{role}_token" in config}
    # Older files hold the whole description of the token instead of its text.
    texts = {
        role: value.get("content", 0) if isinstance(value, dict) else value for role, value in names.items()
    }
    for role, text in texts.items():
        if not isinstance(text, str | None):
            raise UserError(
                f"{path}: {role}_token is {names[role]!r}; a text, null or an object with the text as "
                "content is expected"
            )
    return texts


def _token_bytes(backend: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray:
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    added = {i for i in backend.get_added_tokens_decoder() if i not in special}
    pieces = [backend.id_to_token(i) for i in range(vocab_size)]
    byte_level = "ByteLevel" in json.dumps(json.loads(backend.to_str())["decoder"])
    sizes = np.zeros(vocab_size, np.int32)
    anchor = backend.encode("a", add_special_tokens=False).ids[-1:]
    alone = len(backend.decode(anchor).encode())
    for i, piece in enumerate(pieces):
        if piece is None or i in special:
            continue
        if byte_level and i not in added:
            sizes[i] = len(piece)  # one character of the alphabet per byte
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            sizes[i] = 1
        else:
            sizes[i] = max(len(backend.decode([*anchor, i]).encode()) - alone, 0)
    return sizes


def main(argv: Sequence[str] | None = None) -> None:
    """Trains a tokenizer on the training documents of a source and writes it."""
    from research.data.sources import open_source  # here, because sources stand above tokenizers

    parser = argparse.ArgumentParser("python -m research.data.tokenizer", description=main.__doc__)
    parser.add_argument("--source", default="builtin", help="what to train on, as for TokenDataset")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--output", default=str(SHIPPED))
    args = parser.parse_args(argv)
    source = open_source(args.source, "train")
    tokenizer = train((source[i] for i in range(len(source))), args.vocab_size)
    tokenizer.save(args.output)
    print(f"{args.output}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint[:12]}")


if __name__ == "__main__":
    main()
