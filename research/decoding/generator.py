"""Decode prompts with a model: the interface for programs, notebooks and evaluators.

    generator = Generator(model, params, tokenizer)
    result = generator.generate(["def main("], max_new_tokens=64, sampling=Sampling(temperature=0.8),
    samples=4) for piece in generator.stream(["def main("]):
        print(piece.text, end="")

At temperature 0 the tokens are those of greedy decoding without a cache, up to ties within rounding.
Otherwise sample s of a prompt depends on the seed, on the prompt's id and on s, not on what else is in the
batch.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from research.decoding import engine as engines
from research.decoding.correction import Correction
from research.decoding.prepare import lay_out, prepare
from research.decoding.proposers import Plain, Proposer
from research.decoding.sampling import Sampling
from research.decoding.text import RowText
from research.decoding.verify import Greedy, Sampled, Verifier
from research.errors import UserError

if TYPE_CHECKING:
    from research.data.tokenizer import Tokenizer

Finish = Literal["eos", "stop", "length", "context"]
_SHORTEST_PROMPT, _CAPACITY_STEP = 16, 64  # buckets: prompts to powers of two, caches to multiples


@dataclasses.dataclass(frozen=True)
class Sample:
    """One decoded sequence.

    tokens: without the prompt and the end token; text: None without a tokenizer; finish: an end token, a stop
        string,
    max_new_tokens or the model's context ended it; prompt, sample: which one it is.
    """

    prompt: int
    sample: int
    tokens: list[int]
    text: str | None
    finish: Finish


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a generation took.

    calls: of the model, prefill included, for the whole batch; new_tokens: over all rows, end tokens
        included; gained[k]: in how many calls a row gained k + 1 tokens; drafted: tokens offered to the
        verifier; seconds of compilation, of prefill and of decoding, the latter with everything the host does
        in between.
    """

    prompt_tokens: int
    new_tokens: int
    calls: int
    gained: tuple[int, ...]
    drafted: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second of prefill and decoding."""
        return self.new_tokens / max(self.prefill_seconds + self.decode_seconds, 1e-9)

    @property
    def wasted(self) -> int:
        """Drafted tokens that are no part of the output."""
        return self.drafted - sum(k * n for k, n in enumerate(self.gained))

    @property
    def tokens_per_call(self) -> float:
        """Mean tokens that a row gains in a call after prefill, the target's own included; 1 in plain
        decoding."""
        calls = sum(self.gained)
        return sum((k + 1) * n for k, n in enumerate(self.gained)) / calls if calls else 1.0


@dataclasses.dataclass(frozen=True)
class Generation:
    """samples: those of prompt 0, then of prompt 1, ..."""

    samples: list[Sample]
    stats: Stats


@dataclasses.dataclass(frozen=True)
class Piece:
    """New output of one row, as it streams: row = prompt * samples + sample."""

    row: int
    tokens: list[int]
    text: str


class Generator:
    """A model ready to decode.

    Args:
        model, params: a decoder and its parameters, scanned or not.
        tokenizer: for prompts and outputs that are text, or None.
        dtype: of the parameters and the cache, "float32" or "bfloat16".
        proposer, proposer_params: what drafts; plain decoding by default.
        verifier: which drafts are kept; by default the exact rule, `Greedy` at temperature 0, else `Sampled`.
            Another rule may change the output.
        ends: token ids that end a sequence; the tokenizer's end token by default.
        correction: what makes the cache of an approximate model exact again, every so many calls (rounded up to whole
            blocks of `stream`); None: nothing does.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        tokenizer: "Tokenizer | None" = None,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        proposer: Proposer | None = None,
        proposer_params: Any = (),
        verifier: Verifier | None = None,
        ends: Sequence[int] | None = None,
        correction: Correction | None = None,
    ):
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype must be float32 or bfloat16, not {dtype}")
        self.model, self.params = prepare(model, params, dtype)
        # Encoder-decoders have a context for the prompt apart, and output begins behind their start token.
        self._source_length: int | None = getattr(model, "source_length", None)
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.proposer = Plain() if proposer is None else proposer
        self.proposer_params = lay_out(proposer_params, dtype)
        self.verifier = verifier
        self.correction = correction
        if ends is None:
            ends = () if tokenizer is None or tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.ends = tuple(ends)

    def generate(self, prompts: Sequence[str | Sequence[int]], **options: Any) -> Generation:
        """Decode all prompts and return when they are done. Options as in `stream`."""
        stream = Stream(self, prompts, block=None, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        stop: Sequence[str] = (),
        seed: int = 0,
        samples: int = 1,
        ids: Sequence[int] | None = None,
        beside: Callable[[int], tuple[Any, ...]] | None = None,
        block: int = 16,
    ) -> "Stream":
        """Decode, giving new output after every `block` model calls.

        Args:
            prompts: texts (begun with the tokenizer's <bos> where it has one) or token ids.
            max_new_tokens: for each row; a row that fills the model's context ends earlier, with finish
                "context".
            sampling: how tokens are chosen.
            stop: texts that end a row; they need a tokenizer and are no part of the output. They are looked
                for after every block, on the decoded text, and cut off exactly; tokens decoded beyond them
                are dropped.
            seed: of all draws, from 0 to 2**32 - 1.
            samples: sequences for every prompt; the prompt is read once.
            ids: a number for each prompt that its draws depend on; its place in the batch by default.
            beside: what the model's `prefill` takes beside tokens (images), for prompts padded to a length.

        Raises:
            UserError: an empty prompt, one that leaves no room in the model's context, a token outside the
                vocabulary, or an option outside its range.
        """
        return Stream(
            self,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            seed=seed,
            samples=samples,
            ids=ids,
            beside=beside,
            block=block,
        )

    def context(self, prompt: int) -> tuple[int, int]:
        """(tokens of a prompt of so many that stand in the context of the output, prompts' greatest length)."""
        if self._source_length is None:
            return prompt, self.model.max_length
        return 1, self._source_length

    def encode(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        """Token ids of prompts, checked."""
        encoded = []
        for number, prompt in enumerate(prompts, 1):
            if isinstance(prompt, str):
                if self.tokenizer is None:
                    raise UserError(
                        f"prompt {number} is text, and this model has no tokenizer: give token ids"
                    )
                prompt = self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None)
            prompt = [int(token) for token in prompt]
            if not prompt:
                raise UserError(f"prompt {number} is empty: give at least one token")
            if self._source_length is not None and len(prompt) > self._source_length:
                raise UserError(
                    f"prompt {number} has {len(prompt)} tokens and the model reads sources of at most "
                    f"{self._source_length}"
                )
            if self._source_length is None and len(prompt) >= self.model.max_length:
                raise UserError(
                    f"prompt {number} has {len(prompt)} tokens and the model's context is "
                    f"{self.model.max_length}: at most {self.model.max_length - 1} leave room for output"
                )
            wrong = [token for token in prompt if not 0 <= token < self.model.vocab_size]
            if wrong:
                size = self.model.vocab_size
                raise UserError(f"prompt {number} holds token {wrong[0]}, outside the vocabulary of {size}")
            encoded.append(prompt)
        if not encoded:
            raise UserError("no prompt given")
        return encoded


class Stream:
    """Iterates over the pieces of a generation; `result` is there when the iteration has ended."""

    result: Generation

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[str | Sequence[int]],
        *,
        block: int | None,
        max_new_tokens: int = 128,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        stop: Sequence[str] = (),
        seed: int = 0,
        samples: int = 1,
        ids: Sequence[int] | None = None,
        beside: Callable[[int], tuple[Any, ...]] | None = None,
    ):
        for name, value in {"max_new_tokens": max_new_tokens, "samples": samples, "block": block}.items():
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if not 0 <= seed < 1 << 32:
            raise UserError(f"seed must be from 0 to 2**32 - 1, not {seed}")
        max_new_tokens = min(max_new_tokens, generator.model.max_length + 1)  # more than fit are no more
        if samples > 1 and sampling.greedy:
            raise UserError(
                f"{samples} samples at temperature 0 would be copies of one: give a temperature above 0"
            )
        if any(not text for text in stop):
            raise UserError("a stop string is empty")
        if stop and generator.tokenizer is None:
            raise UserError("stop strings need a tokenizer")
        self._generator = generator
        self._prompts = generator.encode(prompts)
        ids = range(len(self._prompts)) if ids is None else ids
        if len(ids) != len(self._prompts):
            raise UserError(f"{len(ids)} ids for {len(self._prompts)} prompts")
        self._ids, self._seed, self._samples = np.asarray(ids, np.int32), seed, samples
        self._max_new, self._beside = max_new_tokens, beside
        chain = sampling.chain(generator.model.vocab_size)
        self._weights = engines.Weights(generator.params, generator.proposer_params, chain)
        self._ends = np.asarray(generator.ends, np.int32)
        if block is None and stop:
            block = 16  # stop strings are found between blocks
        longest = max(map(len, self._prompts))
        bucket = _SHORTEST_PROMPT
        while bucket < longest:
            bucket *= 2
        before, context = generator.context(longest)
        self._bucket = min(bucket, context)
        room = min(before + max_new_tokens, generator.model.max_length) + generator.proposer.levels
        correction, self._between = generator.correction, 0
        if correction is not None:
            every = min(correction.every, max_new_tokens)
            block = every if block is None else min(block, every)
            self._between = -(-every // block)
            correction = dataclasses.replace(correction, every=self._between * block)
            room += correction.every * generator.proposer.levels
        capacity = -(-max(room, self._bucket) // _CAPACITY_STEP) * _CAPACITY_STEP
        self._engine = engines.Engine(
            generator.model,
            generator.proposer,
            generator.verifier or (Greedy() if sampling.greedy else Sampled()),
            capacity,
            samples,
            generator.dtype,
            correction,
        )
        self._block = capacity if block is None else block
        self._rows = [
            RowText(generator.tokenizer.stream(), stop) if generator.tokenizer is not None else None
            for _ in range(len(self._prompts) * samples)
        ]

    def __iter__(self) -> Iterator[Piece]:
        start = time.perf_counter()
        tokens = np.zeros((len(self._prompts), self._bucket), np.int32)
        for row, prompt in enumerate(self._prompts):
            tokens[row, : len(prompt)] = prompt
        lengths = np.asarray([len(prompt) for prompt in self._prompts], np.int32)
        before = np.asarray([self._generator.context(length)[0] for length in lengths])
        limit = np.minimum(self._max_new, self._generator.model.max_length - before).astype(np.int32)
        keys = engines.row_keys(self._seed, self._ids, self._samples)
        inputs = (self._weights, tokens, lengths, limit, keys, self._ends)
        if self._beside is not None:
            inputs += (self._beside(self._bucket),)
        prefill = engines.compiled(self._engine, "prefill", *inputs)
        compiled = time.perf_counter() - start

        start = time.perf_counter()
        state = prefill(*inputs)
        count, done = np.asarray(state.count), np.asarray(state.done)
        prefilled = time.perf_counter() - start

        start = time.perf_counter()
        stopped, calls = np.zeros(len(self._rows), bool), np.int32(self._block)
        arguments = (self._weights, state, stopped, calls, self._ends)
        decode = engines.compiled(self._engine, "decode", *arguments)
        if self._between:
            since = np.repeat(before, self._samples).astype(np.int32)
            correct = engines.compiled(self._engine, "correct", self._weights, state, since)
        compiled += time.perf_counter() - start

        start, blocks = time.perf_counter(), 0
        shown = np.zeros_like(count)
        while True:
            output = np.asarray(state.tokens)
            yield from self._pieces(output, shown, count, stopped)
            shown = count
            if np.all(done | stopped):
                break
            if self._between and blocks and blocks % self._between == 0:
                state, since = correct(self._weights, state, since)
            state = decode(self._weights, state, stopped.copy(), calls, self._ends)
            blocks += 1
            count, done = np.asarray(state.count), np.asarray(state.done)
        for row, text in enumerate(self._rows):
            if text is not None and (rest := text.finish()):
                yield Piece(row, [], rest)
        histogram = np.asarray(state.histogram)
        stats = Stats(
            prompt_tokens=int(lengths.sum()),
            new_tokens=int(count.sum()),
            calls=1 + int(histogram.sum(1).max()),
            gained=tuple(int(n) for n in histogram.sum(0)),
            drafted=int(np.asarray(state.drafted).sum()),
            compile_seconds=compiled,
            prefill_seconds=prefilled,
            decode_seconds=time.perf_counter() - start,
        )
        rows = range(len(self._rows))
        self.result = Generation([self._sample(row, output[row, : count[row]], limit) for row in rows], stats)

    def _pieces(
        self, output: np.ndarray, shown: np.ndarray, count: np.ndarray, stopped: np.ndarray
    ) -> Iterator[Piece]:
        """What the rows gained since; marks the rows that reached a stop string."""
        for row, text in enumerate(self._rows):
            new = self._without_end(output[row, shown[row] : count[row]].tolist())
            if not new or stopped[row]:
                continue
            if text is None:
                yield Piece(row, new, "")
                continue
            before = text.tokens
            piece = text.push(new)
            stopped[row] = text.stopped
            yield Piece(row, new[: max(text.tokens - before, 0)], piece)

    def _sample(self, row: int, tokens: np.ndarray, limit: np.ndarray) -> Sample:
        prompt, sample = divmod(row, self._samples)
        text = self._rows[row]
        kept = self._without_end(tokens.tolist())
        finish: Finish = "length" if limit[prompt] == self._max_new else "context"
        if text is not None and text.stopped:
            kept, finish = kept[: text.tokens], "stop"
        elif len(kept) < len(tokens):
            finish = "eos"
        return Sample(prompt, sample, kept, None if text is None else text.text, finish)

    def _without_end(self, tokens: list[int]) -> list[int]:
        return tokens[:-1] if tokens and tokens[-1] in self._generator.ends else tokens
