"""What a call of the target costs, by the number of nodes that it scores, and what drafters gain and cost.

Batch 1, greedy, float32. A call is timed inside the decoding loop: drafts that cost nothing to make, one chain of
each size, in turns; the best of several runs. Drafters decode prompts of code from held-out files; what their call
takes longer than one with as many free drafts is the cost of drafting. The table goes to a file that
`experiments.generate --drafter=auto` reads (`research/decoding/cost.py`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.shapes import SHAPES, make_decoder
from experiments.claims import drafting
from research.decoding.cost import Candidate, Costs, break_even, default_path
from research.decoding.generator import Generator
from research.decoding.proposers import Outcome, Plain, Proposer, Round, Target
from research.decoding.speculative.loading import UNTRAINED, LoadedDrafter, find_drafter, fingerprint
from research.decoding.tree import chain
from research.decoding.verify import Draft
from research.errors import UserError
from research.paths import expand
from research.training.workdir import load_model

SIZES = (1, 2, 4, 8, 16, 32, 64)
PROMPT, NEW = 32, 96
_SHAPE = SHAPES["40M"]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Drafts the newest token again and again: a chain that costs nothing to make."""

    size: int

    @property
    def levels(self) -> int:
        return self.size

    def init(self, params: tuple[()], target: Target, prompt: Any) -> tuple[()]:
        return ()

    def propose(
        self, params: tuple[()], target: Target, state: tuple[()], round: Round
    ) -> tuple[Draft, tuple[()]]:
        tokens = jnp.broadcast_to(round.root[:, None], (round.root.shape[0], self.size))
        return Draft(tokens, chain(self.size)), state

    def observe(self, params: tuple[()], target: Target, state: tuple[()], outcome: Outcome) -> tuple[()]:
        return state


def run(
    target: str,
    drafters: Sequence[str] = ("prompt_lookup",),
    rounds: int = 5,
    count: int = 8,
    path: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the model at `target` with its drafters, write the table, and measure the 40M shape beside it.

    drafters: what `find_drafter` knows; count: prompts each decodes; path: of the table, by default the one that
    belongs to the target's parameters.

    Raises:
        UserError: a target or drafter that can't be used.
    """
    loaded = load_model(target)
    if not hasattr(loaded.model, "extend"):
        raise UserError(f"{target} does not decode text")
    found = {name: find_drafter(name, loaded) for name in drafters}
    sizes = {*SIZES, *(drafter.proposer.size for drafter in found.values())}
    calls = measure_calls(loaded.model, loaded.params, sizes, rounds)
    device = jax.devices()[0].device_kind
    costs = Costs(target, fingerprint(loaded.params), device, calls)
    report(table(target, costs))
    candidates = []
    for name, drafter in found.items():
        if drafter.target_params(loaded) is not loaded.params:
            report(
                f"{name}: brings a target of its own, which would change the output; left out of the table"
            )
            continue
        candidates.append(measure_drafter(name, drafter, loaded, costs, rounds, count))
        report(describe(candidates[-1], costs))
    costs = dataclasses.replace(costs, candidates=tuple(candidates))
    where = default_path(costs.fingerprint) if path is None else Path(path)
    costs.save(where)
    report(f"table: {where}")
    model = make_decoder(_SHAPE, PROMPT + NEW, tied_head=False)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
    beside = Costs(
        _SHAPE.name, "random", device, measure_calls(model, init(jax.random.key(0)), SIZES, rounds)
    )
    report(table(_SHAPE.name, beside))
    return {"target": dataclasses.asdict(costs), "shape": dataclasses.asdict(beside)}


def measure_calls(model: Any, params: Any, sizes: Sequence[int], rounds: int) -> dict[int, float]:
    """{N: seconds of a call that scores N nodes}, the best of `rounds` turns."""
    prompt = np.random.default_rng(0).integers(0, model.vocab_size, PROMPT).tolist()
    generators = {
        size: Generator(model, params, proposer=Plain() if size == 1 else Repeat(size))
        for size in sorted(sizes)
    }
    best = dict.fromkeys(generators, float("inf"))
    for _ in range(rounds + 1):  # the first compiles, outside of what is timed
        for size, generator in generators.items():
            best[size] = min(best[size], _call_seconds([_decode(generator, prompt)]))
    return best


def measure_drafter(
    name: str, drafter: LoadedDrafter, loaded: Any, costs: Costs, rounds: int, count: int
) -> Candidate:
    """Tokens a call and seconds of drafting on prompts of code, the best of `rounds` turns."""
    proposer: Proposer = drafter.proposer
    generator = Generator(loaded.model, loaded.params, proposer=proposer, proposer_params=drafter.params)
    prompts = drafting.prompts("code", count, loaded.tokenizer)
    turns = [[_decode(generator, prompt) for prompt in prompts] for _ in range(rounds + 1)]
    # The same tokens in every turn, so of every prompt the best turn counts.
    stats = [min(each, key=lambda stats: stats.decode_seconds) for each in zip(*turns, strict=True)]
    calls = sum(sum(each.gained) for each in stats)
    tokens = sum((k + 1) * n for each in stats for k, n in enumerate(each.gained)) / calls
    where = name if name in UNTRAINED else str(expand(name).resolve())
    return Candidate(where, proposer.size, tokens, max(0.0, _call_seconds(stats) - costs.call(proposer.size)))


def _decode(generator: Generator, prompt: Sequence[int]) -> Any:
    return generator.generate([prompt], max_new_tokens=NEW).stats


def _call_seconds(stats: Sequence[Any]) -> float:
    return sum(each.decode_seconds for each in stats) / sum(each.calls - 1 for each in stats)


def table(name: str, costs: Costs) -> str:
    """Call times, absolute and relative to one node, and what a free chain must be accepted with to pay."""
    lines = [f"{name}: a call of 1 node takes {1e3 * costs.call(1):.3f} ms; of"]
    for size in sorted(costs.calls)[1:]:
        needed = break_even(costs, size - 1, 0.0)
        pays = "never pays" if needed is None else f"a free chain pays from an acceptance of {needed:.2f} on"
        lines.append(f"{size:>6} nodes {costs.call(size) / costs.call(1):5.2f} times as long; {pays}")
    return "\n".join(lines)


def describe(candidate: Candidate, costs: Costs) -> str:
    """A measured drafter in one line."""
    speedup = costs.speedup(candidate.size, candidate.tokens, candidate.draft)
    return (
        f"{candidate.name}: {candidate.tokens:.2f} tokens a call, {1e3 * candidate.draft:.3f} ms of drafting; "
        f"predicted {speedup:.2f}x plain decoding"
    )
