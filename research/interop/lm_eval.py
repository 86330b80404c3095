"""Any decoder of the project as a model of the lm-evaluation-harness.

The harness (https://github.com/EleutherAI/lm-evaluation-harness) brings the tasks and their measures:

    from lm_eval import simple_evaluate

    model = HarnessModel(loaded.model, loaded.params, loaded.tokenizer)
    results = simple_evaluate(model, tasks=["hellaswag"])

Scores come from `model.apply`, generated text from `research.decoding`. Requests are sorted by length and
run in batches of a few fixed shapes, so that a task of any size compiles a handful of programs.
"""

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from research.decoding.generator import Generator
from research.decoding.sampling import SAMPLED_ONLY, Sampling
from research.errors import UserError, nearest
from research.nn.accounting import count_parameters

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
        raise
    raise UserError(
        "lm_eval is not installed, or older than 0.4.13: pip install 'lm_eval>=0.4.13'"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from research.data.tokenizer import Tokenizer

_SHORTEST = 16  # the least length of a batch; above it are powers of two, and the context length
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", *_SAMPLING)


class HarnessModel(TemplateLM):
    """A decoder for the harness.

    Args:
        model, params: a decoder with a context length `max_length`, and its parameters.
        tokenizer: of the model.
        batch_size: rows of every batch; the last one is filled up.
        bos: whether a context begins with the tokenizer's <bos>. By default it does where the tokenizer has
            one, as in the training data; models of other origin may want it otherwise (`adds_bos`).
        dtype: of the parameters and the cache while generating.
        name: what the results call the model.
        warn: is told in one line when requests had to be truncated.

    Raises:
        UserError: the model does not read text, has no tokenizer, or its tokenizer lacks the <bos> asked for.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        tokenizer: "Tokenizer | None",
        *,
        batch_size: int = 8,
        bos: bool | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        name: str = "lathe",
        warn: Callable[[str], None] = lambda line: print(f"warning: {line}", file=sys.stderr),
    ):
        super().__init__()
        if not hasattr(model, "max_length"):
            raise UserError(
                f"{name} is a {type(model).__name__}, which has no context length: it does not read text"
            )
        if tokenizer is None:
            raise UserError(f"{name} has no tokenizer, so it can't read the tasks")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        if bos and tokenizer.bos_id is None:
            raise UserError(f"the tokenizer of {name} has no <bos> for contexts to begin with")
        self._model, self._params, self._text = model, params, tokenizer
        self._bos = tokenizer.bos_id is not None if bos is None else bos
        self._dtype, self._name, self._warn = dtype, name, warn
        self.batch_size = batch_size
        self.programs: dict[int, jax.stages.Compiled] = {}  # the scoring programs, by length

    @property
    def max_length(self) -> int:
        """The context length in tokens."""
        return self._model.max_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task doesn't say: the harness's 256, at most half the context."""
        return min(256, self.max_length // 2)

    @property
    def eot_token_id(self) -> int:
        """The end token. Raises UserError if there is none."""
        if self._text.eos_id is None:
            raise UserError(f"the tokenizer of {self._name} has no end token, which this task needs")
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text without context is predicted from: <bos>, or else the end token."""
        return self.eot_token_id if self._text.bos_id is None else self._text.bos_id

    @functools.cached_property
    def generator(self) -> Generator:
        """The decoding engine. Raises UserError for a model that does not decode."""
        if not hasattr(self._model, "extend"):
            raise UserError(f"{self._name} is a {type(self._model).__name__}, which does not decode text")
        return Generator(self._model, self._params, self._text, dtype=self._dtype)

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's report."""
        leaves = jax.tree.leaves(self._params)
        return {
            "model": self._name,
            "model_num_parameters": count_parameters(self._params),
            "model_dtype": ", ".join(sorted({str(leaf.dtype) for leaf in leaves})),
            "max_length": self.max_length,
            "add_bos_token": self._bos,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of `string`, behind <bos> with `add_special_tokens`; by default as the model wants contexts.

        Raises UserError for a token that the model's vocabulary does not have.
        """
        ids = self._text.encode(string, bos=self._bos if add_special_tokens is None else add_special_tokens)
        size = self._model.vocab_size
        if ids and max(ids) >= size:
            raise UserError(
                f"the tokenizer gives token {max(ids)} and the vocabulary of {self._name} has {size}"
            )
        return ids

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts: each token is scored once, in windows of the context length.

        The first token is predicted from `prefix_token_id`. Every window but the first begins where the one
        before ended; the last one reaches back to be full, and scores its new tokens only.
        """
        owners, windows = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            for pair in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            ):
                owners.append(owner)
                windows.append((("", text), *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += score
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """For each (texts, context ids, continuation ids): nats of the continuation, whether it is greedy."""
        # Requests that differ in the last token only (the choices A, B, C, D of a question) share a row.
        rows: dict[tuple[int, ...], list[int]] = {}
        truncated = 0
        for index, ((_, text), context, continuation) in enumerate(requests):
            if not continuation:
                raise UserError(f"the continuation {text[:40]!r} adds no token to its context")
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens exceeds the context of {self._name}, "
                    f"{self.max_length}: {text[:40]!r}"
                )
            context = context or [self.prefix_token_id]
            tokens = (*context, *continuation)[-(self.max_length + 1) :]
            truncated += len(tokens) < len(context) + len(continuation)
            rows.setdefault(tokens[:-1], []).append(index)
        self._tell_truncated(truncated, len(requests), self.max_length)
        results: list[Any] = [None] * len(requests)
        with _progress(len(requests), "scoring", disable_tqdm) as bar:
            for batch in self._batches(list(rows)):
                for row, (inside, best, last) in zip(batch, self._score(batch), strict=True):
                    for index in rows[row]:
                        continuation = requests[index][2]
                        first = len(row) - len(continuation)  # the position that predicts continuation[0]
                        score = float(
                            inside[first : len(row) - 1].sum(dtype=np.float64) + last[continuation[-1]]
                        )
                        greedy = bool(np.array_equal(best[first : len(row)], continuation))
                        results[index] = (score, greedy)
                    bar.update(len(rows[row]))
        return results

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """Continuations, up to a stop text (not included), the end token, or the greatest number of tokens.

        The draws of a sampled continuation depend on the request's place in `requests`, not on the batch.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        results = [""] * len(requests)
        with _progress(len(requests), "generating", disable_tqdm) as bar:
            for indices in groups.values():
                sampling, stop, count = generation_options(requests[indices[0]].args[1], self.max_gen_toks)
                room = self.max_length - count
                if room < 1:
                    raise UserError(
                        f"the task asks for {count} new tokens and the context of {self._name} is "
                        f"{self.max_length}: no room for a prompt; lower its generation_kwargs.max_gen_toks"
                    )
                whole = {index: self.tok_encode(requests[index].args[0]) for index in indices}
                self._tell_truncated(sum(len(x) > room for x in whole.values()), len(whole), room)
                prompts = {i: tuple(x[-room:]) or (self.prefix_token_id,) for i, x in whole.items()}
                order = sorted(indices, key=lambda index: -len(prompts[index]))  # noqa: B023
                for start in range(0, len(order), self.batch_size):
                    chosen = order[start : start + self.batch_size]
                    filled = chosen + chosen[-1:] * (self.batch_size - len(chosen))
                    generation = self.generator.generate(
                        [prompts[index] for index in filled],
                        max_new_tokens=count,
                        sampling=sampling,
                        stop=stop,
                        ids=filled,
                    )
                    for index, sample in zip(chosen, generation.samples, strict=False):
                        results[index] = sample.text
                    bar.update(len(chosen))
        return results

    def _batches(self, rows: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        # Longest first: what memory and time it takes shows at once.
        rows = sorted(rows, key=lambda row: (-len(row), row))
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def _score(self, batch: Sequence[tuple[int, ...]]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each row: the nats of its tokens 1.., the best token after each, nats of all next tokens."""
        length = _SHORTEST
        while length < max(map(len, batch)):
            length *= 2
        length = min(length, self.max_length)
        tokens = np.zeros((self.batch_size, length), np.int32)
        lengths = np.ones(self.batch_size, np.int32)
        for i, row in enumerate(batch):
            tokens[i, : len(row)], lengths[i] = row, len(row)
        if length not in self.programs:
            self.programs[length] = jax.jit(self._program).lower(self._params, tokens, lengths).compile()
        inside, best, last = map(np.asarray, self.programs[length](self._params, tokens, lengths))
        return [(inside[i], best[i], last[i]) for i in range(len(batch))]

    def _program(
        self, params: Any, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """tokens int32[B, T], lengths int32[B] -> f32[B, T - 1], int32[B, T], f32[B, V]; see `_score`."""
        segments = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
        logits = self._model.apply({"params": params}, tokens, segments=segments)
        normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        inside = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1) - normalizer[:, :-1]
        end = (lengths - 1)[:, None, None]
        last = jnp.take_along_axis(logits, end, axis=1) - jnp.take_along_axis(normalizer, end, axis=1)
        return inside[..., 0], jnp.argmax(logits, axis=-1).astype(jnp.int32), last[:, 0]

    def _tell_truncated(self, count: int, total: int, room: int) -> None:
        if count:
            self._warn(
                f"{count} of {total} requests are longer than the {room} tokens that fit the context of "
                f"{self._name}: their beginning was cut off"
            )


def adds_bos(tokenizer: "Tokenizer") -> bool:
    """Whether the `tokenizer.json` itself begins every text with its <bos>, as transformers then does."""
    ids = tokenizer.backend.encode("", add_special_tokens=True).ids
    return bool(ids) and ids[0] == tokenizer.bos_id


def generation_options(
    options: Mapping[str, Any], max_gen_toks: int
) -> tuple[Sampling, tuple[str, ...], int]:
    """A task's `generation_kwargs` -> how tokens are chosen, the stop texts, the most new tokens.

    The harness's conventions: greedy unless `do_sample` or a temperature says otherwise; `max_new_tokens`,
    `max_tokens` and `max_completion_tokens` also name the number. `do_sample` without a temperature means 1,
    and `top_k: 0` no limit, as in transformers; greedy decoding passes over what bounds sampling.

    Raises:
        UserError: an option that is not known, or a value outside its range.
    """
    given = dict(options)
    if given.get("do_sample") is True:
        given.setdefault("temperature", 1.0)
    if given.pop("num_beams", 1) != 1:
        raise UserError(
            f"generation_kwargs: num_beams={options['num_beams']}, and there is no beam search here"
        )
    known = normalize_gen_kwargs(given, max_gen_toks)
    if unknown := sorted(set(known) - set(_GENERATION)):
        close = nearest(unknown[0], _GENERATION)
        hint = f"did you mean {close}?" if close else f"known are {', '.join(_GENERATION)}"
        raise UserError(f"generation_kwargs: unknown option {unknown[0]}; {hint}")
    if known["max_gen_toks"] < 1:
        raise UserError(f"generation_kwargs: max_gen_toks must be at least 1, not {known['max_gen_toks']}")
    chosen = {name: known[name] for name in _SAMPLING if known.get(name) is not None}
    if chosen.get("top_k") == 0:
        del chosen["top_k"]
    temperature = float(known.get("temperature", 0.0))
    if temperature == 0:
        chosen = {name: value for name, value in chosen.items() if name not in SAMPLED_ONLY}
    sampling = Sampling(temperature=temperature, **chosen)
    return sampling, tuple(text for text in known["until"] if text), known["max_gen_toks"]


def _progress(total: int, what: str, disable: bool) -> Any:
    from tqdm import tqdm

    # None: shown on terminals only.
    return tqdm(total=total, desc=what, disable=True if disable else None)
