"""What the claims about drafters share: the target, how a drafter is trained, the prompts, how it is measured.

    params = fit(of(Medusa, num_heads=3), seed, workdir, progress, steps=200, peak=1e-3)
    measured = decode(proposer, params, KINDS)     # {"code": {"tokens_per_call": 2.3, ...}, ...}

Kinds of prompts, none of which the target has been trained on:

    code    files of the built-in corpus' test split, each from the beginning of some line
    prose   paragraphs of the descriptions of data sets that come with scikit-learn: English, and unlike what
            the target has read
    copy    96 tokens of a test file, then their first 16 again: the continuation repeats the prompt
"""

import collections
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sklearn
from ml_collections import ConfigDict

from experiments.claims.harness import Progress
from research.config import build, of
from research.data.sources import open_source
from research.data.text import TokenDataset
from research.data.tokenizer import Tokenizer
from research.decoding.generator import Generation, Generator
from research.decoding.proposers import Proposer, Target
from research.decoding.sampling import Sampling
from research.decoding.speculative.distill import SelfDistilled
from research.decoding.speculative.training import DrafterTraining
from research.decoding.speculative.trees import Forced, calibrate
from research.decoding.verify import Verifier
from research.errors import UserError, nearest
from research.training.loop import Trainer
from research.training.model_directory import Loaded
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage
from research.training.workdir import load_model, open_workdir

TARGET = "package:language/base"
KINDS = ("code", "prose", "copy")

_PROMPT, _PASSAGE, _REPEATED = 64, 96, 16  # tokens
_TIMED = 4  # prompts of a kind whose decoding is timed
_NGRAM = 8


@functools.cache
def target() -> Loaded:
    """The model that ships."""
    return load_model(TARGET)


def fit(
    drafter: ConfigDict,
    seed: int,
    workdir: Path,
    progress: Progress,
    *,
    steps: int,
    batch_size: int = 16,
    length: int = 128,
    text: Literal["self", "corpus"] = "self",
    peak: float = 1e-3,
    warmup: int = 20,
    floor: float = 0.1,
    **optimizer: Any,
) -> Any:
    """Train a drafter for the frozen target; returns its parameters.

    drafter: the config of a `Drafter`. Batches are `batch_size` rows of `length` tokens: of the training split
    ("corpus"), or what the target itself says after beginnings from there ("self"), written once for all claims
    and seeds. The optimizer is AdamW on a cosine from `peak` to `floor` * peak after `warmup` updates;
    `optimizer` are its other arguments. The run is kept in workdir/run, and goes on from there.
    """
    data = (
        of(SelfDistilled, target=TARGET, rows=2048, length=length, order=seed)
        if text == "self"
        else of(TokenDataset, split="train", length=length, seed=seed)
    )
    schedule = of(cosine, peak=peak, warmup=warmup, floor=floor)
    stage = of(
        Stage,
        name="drafter",
        steps=steps,
        batch_size=batch_size,
        optimizer=of(adamw, schedule=schedule, **optimizer),
        trainable=("^drafter/",),
    )
    config = of(
        Trainer,
        task=of(DrafterTraining, drafter=drafter, target=TARGET),
        data=data,
        stages=(stage,),
        seed=seed,
        checkpoint_every=steps,
        keep_last=1,
        keep_best=0,
    )
    trainer = build(config)
    trainer.data.prepare(lambda what, done, total: progress(0.3 * done / total, what))
    progress(0.3, f"{steps} steps")
    with open_workdir(workdir / "run", config) as run:
        state, _ = trainer.train(run, progress=False)
    progress(0.7, "decoding")
    return state.params["drafter"]


def rank_accuracy(drafter: Forced, params: Any, *, length: int, rows: int = 32, top: int = 10) -> np.ndarray:
    """f32[levels, top]: how often the guess of each rank is right on the first `rows` x `length` tokens of the
    validation split, given the true text before."""
    loaded, data = target(), TokenDataset(split="validation", length=length, shuffle=False)
    batches = [data.take(np.arange(start, start + 8)) for start in range(0, rows, 8)]
    return calibrate(drafter, params, Target(loaded.params, loaded.model), batches, top=top)


@functools.cache
def _candidates(kind: str, tokenizer: Tokenizer) -> list[list[int]]:
    """All prompts of a kind, so ordered that the first ones come from different files."""
    if kind not in KINDS:
        close = nearest(kind, KINDS)
        raise UserError(f"no prompts of kind {kind!r}; {f'did you mean {close}?' if close else KINDS}")
    if kind == "prose":
        folder = Path(sklearn.__file__).parent / "datasets" / "descr"
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst"))]
        starts = [[found.end() for found in re.finditer(r"\n\s*\n(?=[A-Z])", text)] for text in texts]
    else:
        source = open_source("builtin", "test")
        texts = [source[i] for i in range(len(source))]
        lines = [[found.end() for found in re.finditer(r"\n(?=\S)", text)] for text in texts]
        starts = [found[4::6] if kind == "code" else found[10::12] for found in lines]
    size = _PASSAGE if kind == "copy" else _PROMPT - 1  # and <bos>
    found: list[list[int]] = []
    for turn in range(max(map(len, starts))):
        for text, places in zip(texts, starts, strict=True):
            # No token is longer than 32 characters in the mean of `size` of them.
            if turn < len(places) and len(ids := tokenizer.encode(text[places[turn] :][: 32 * size])) >= size:
                repeated = ids[:_REPEATED] if kind == "copy" else []
                found.append([tokenizer.bos_id, *ids[:size], *repeated])
    return found


def prompts(kind: str, count: int, tokenizer: Tokenizer | None = None) -> list[list[int]]:
    """The first `count` prompts of a kind, as ids of a tokenizer, by default the target's.

    Raises:
        UserError: an unknown kind, or more than there are.
    """
    candidates = _candidates(kind, target().tokenizer if tokenizer is None else tokenizer)
    if count > len(candidates):
        raise UserError(f"there are {len(candidates)} prompts of kind {kind}, not {count}")
    return candidates[:count]


def decode(
    proposer: Proposer,
    params: Any,
    kinds: Sequence[str] = KINDS,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    new_tokens: int = 96,
    count: int = 16,
    verifier: Verifier | None = None,
    seed: int = 0,
    target_params: Any = None,
) -> dict[str, dict[str, Any]]:
    """Decode `count` prompts of every kind, one at a time, in float32.

    target_params: those of a target that was trained with the drafter, instead of the one that ships; plain
    decoding then uses them as well.

    Returns, by kind:
        tokens_per_call   tokens gained in a call after prefill, the target's own included: plain is 1
        calls             of the target after prefill, all prompts together
        drafted, wasted   tokens offered to the verifier, and those of them that were not kept
        seconds           of prefill and decoding of the first prompts, median over turns with plain decoding
        plain_seconds     the same for plain decoding
        speed             plain_seconds / seconds
        equal             share of prompts whose tokens are those of plain decoding with the same seed
        loopiness         share of 8-grams of the output that occurred before in the same output
        outputs           the tokens of every prompt
    """
    loaded = target()
    own = loaded.params if target_params is None else target_params
    drafted = Generator(
        loaded.model, own, proposer=proposer, proposer_params=params, verifier=verifier, ends=_ends()
    )
    plain = _plain() if target_params is None else Generator(loaded.model, own, ends=_ends())
    options = dict(sampling=sampling, max_new_tokens=new_tokens, seed=seed)
    measured = {}
    for kind in kinds:
        tokens = prompts(kind, count)
        if target_params is None:
            expected = _plain_outputs(kind, sampling, new_tokens, count, seed)
        else:
            expected = outputs(plain, tokens, options)
        measured[kind] = measure(plain, drafted, tokens, expected, options)
    return measured


def measure(
    plain: Generator,
    drafted: Generator,
    tokens: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    options: Mapping[str, Any],
    rounds: int = 1,
) -> dict[str, Any]:
    """What `decode` says of one kind: the prompts `tokens`, and `expected`, what plain decoding says to them;
    `options` are those of `Generator.generate`. rounds: turns that a prompt is timed in; of its best ones is
    `best_speed`, the ratio of the sums over prompts."""
    results = [drafted.generate([prompt], ids=[i], **options) for i, prompt in enumerate(tokens)]
    return _summary(results, expected) | _clock(plain, drafted, tokens[:_TIMED], options, rounds)


def outputs(
    generator: Generator, tokens: Sequence[Sequence[int]], options: Mapping[str, Any]
) -> list[list[int]]:
    """The continuations of the prompts, one at a time."""
    results = [generator.generate([prompt], ids=[i], **options) for i, prompt in enumerate(tokens)]
    return [result.samples[0].tokens for result in results]


def _ends() -> tuple[int, ...]:
    return (target().tokenizer.eos_id,)


@functools.cache
def _plain() -> Generator:
    loaded = target()
    return Generator(loaded.model, loaded.params, ends=_ends())


@functools.cache
def _plain_outputs(kind: str, sampling: Sampling, new_tokens: int, count: int, seed: int) -> list[list[int]]:
    options = dict(sampling=sampling, max_new_tokens=new_tokens, seed=seed)
    return outputs(_plain(), prompts(kind, count), options)


def _summary(results: Sequence[Generation], expected: Sequence[Sequence[int]]) -> dict[str, Any]:
    found = [result.samples[0].tokens for result in results]
    gained: collections.Counter[int] = collections.Counter()
    for result in results:
        gained.update({k + 1: calls for k, calls in enumerate(result.stats.gained)})
    calls = gained.total()
    return {
        "tokens_per_call": sum(k * n for k, n in gained.items()) / calls if calls else 1.0,
        "calls": calls,
        "drafted": sum(result.stats.drafted for result in results),
        "wasted": sum(result.stats.wasted for result in results),
        "equal": float(np.mean([a == b for a, b in zip(found, expected, strict=True)])),
        "loopiness": float(np.mean([loopiness(output) for output in found])),
        "outputs": found,
    }


def _clock(
    plain: Generator,
    drafted: Generator,
    tokens: Sequence[Sequence[int]],
    options: Mapping[str, Any],
    rounds: int,
) -> dict[str, float]:
    """Both are compiled and warm, and take turns, so that whatever else the machine does disturbs both."""
    for generator in (plain, drafted):
        generator.generate([tokens[0]], **options)
    turns = np.empty((2, len(tokens), rounds))
    for turn in range(rounds):
        for i, prompt in enumerate(tokens):
            for which, generator in enumerate((plain, drafted)):
                stats = generator.generate([prompt], ids=[i], **options).stats
                turns[which, i, turn] = stats.prefill_seconds + stats.decode_seconds
    before, seconds = np.median(turns, axis=(1, 2)).tolist()
    best_before, best = turns.min(axis=2).sum(axis=1).tolist()
    return {
        "seconds": seconds,
        "plain_seconds": before,
        "speed": before / seconds,
        "best_speed": best_before / best,
    }


def loopiness(tokens: Sequence[int]) -> float:
    """Share of the 8-grams of a sequence that occurred before in it; 0 where it has none."""
    grams = [tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def selected(measured: dict[str, dict[str, Any]], *names: str) -> dict[str, float]:
    """{"code tokens_per_call": 2.3, ...}: measures of `decode` by kind, as an arm of a claim returns them."""
    return {f"{kind} {name}": float(values[name]) for kind, values in measured.items() for name in names}
