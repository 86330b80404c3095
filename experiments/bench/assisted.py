"""Speculation against `transformers` assisted generation and prompt lookup: same weights, same settings, in turns.

Batch 1, greedy, float32, a prompt of 32 tokens and 128 new ones, on the 40M shape of the decoding benchmark. The draft
model is the target's first two layers under its own head; both sides draft 5 tokens in every call. Prompt lookup drafts
10 tokens after at most 3 matching ones. Weights are random, so the text soon repeats itself and acceptance is that of
such text: the rows compare two implementations and say nothing about drafters.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.bench.decode import NEW, PROMPT, peer_generate, peer_model, random_model
from experiments.bench.shapes import SHAPES, Shape
from experiments.bench.turns import take_turns
from research.decoding.generator import Generator
from research.decoding.speculative.draft_model import DraftModel
from research.decoding.speculative.prompt_lookup import PromptLookup

DRAFTS, LOOKED_UP, NGRAM, LAYERS = 5, 10, 3, 2


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens per second of both sides, medians and best runs; `equal`: both emitted the same tokens."""

    method: str
    tokens_per_call: float
    median: float
    best: float
    peer_median: float
    peer_best: float
    equal: bool

    @property
    def ratio(self) -> float:
        return self.median / self.peer_median

    @property
    def best_ratio(self) -> float:
        return self.best / self.peer_best

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio, "best_ratio": self.best_ratio}


def run(
    shape: Shape = SHAPES["40M"],
    rounds: int = 5,
    new_tokens: int = NEW,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Measure both methods, report a line for each.

    Raises:
        UserError: torch or transformers is not installed.
    """
    model, params = random_model(shape, PROMPT + new_tokens)
    peer = peer_model(shape, params, PROMPT + new_tokens)
    small = dataclasses.replace(shape, layers=min(LAYERS, shape.layers))
    kept = {f"layer_{i}" for i in range(small.layers)} | {"embedding", "final_norm", "head"}
    draft_params = {name: value for name, value in params.items() if name in kept}
    draft = model.clone(num_layers=small.layers)
    assistant = peer_model(small, draft_params, PROMPT + new_tokens)
    settings = assistant.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = DRAFTS, "constant"
    settings.assistant_confidence_threshold = 0.0
    methods = {
        "draft model": (
            dict(proposer=DraftModel(draft, DRAFTS), proposer_params=draft_params),
            dict(assistant_model=assistant),
        ),
        "prompt lookup": (
            dict(proposer=PromptLookup(LOOKED_UP, NGRAM)),
            dict(prompt_lookup_num_tokens=LOOKED_UP, max_matching_ngram_size=NGRAM),
        ),
    }
    prompt = np.random.default_rng(0).integers(0, shape.vocab, (1, PROMPT))
    rows = []
    for name, (drafting, options) in methods.items():
        generator = Generator(model, params, **drafting)
        calls = {
            "ours": functools.partial(generator.generate, prompt.tolist(), max_new_tokens=new_tokens),
            "theirs": functools.partial(peer_generate, peer, prompt, new_tokens, **options),
        }
        seconds = take_turns(calls, rounds)
        outputs = {name: call() for name, call in calls.items()}
        row = Row(
            method=name,
            tokens_per_call=outputs["ours"].stats.tokens_per_call,
            median=new_tokens / statistics.median(seconds["ours"]),
            best=new_tokens / min(seconds["ours"]),
            peer_median=new_tokens / statistics.median(seconds["theirs"]),
            peer_best=new_tokens / min(seconds["theirs"]),
            equal=outputs["ours"].samples[0].tokens == outputs["theirs"][0].tolist(),
        )
        rows.append(row)
        report(
            f"{shape.name:>4} {name}: {row.median:8.0f} tokens/s, transformers {row.peer_median:8.0f}: "
            f"{row.ratio:.2f}x (best runs {row.best_ratio:.2f}x), {row.tokens_per_call:.2f} tokens a call here, "
            f"tokens {'equal' if row.equal else 'DIFFER'}"
        )
    return rows
