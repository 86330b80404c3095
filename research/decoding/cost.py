"""What speculation costs and what it gains: from measured call times to tokens per second.

A call of the target that scores N nodes takes t(N) seconds, drafting takes t_draft; with tau tokens gained a call

    tokens per second = tau / (t_draft + t(N)),   speedup = tau * t(1) / (t_draft + t(N)).

A chain of g drafts, each accepted with probability a independently of the others, gains
tau = (1 - a^(g + 1)) / (1 - a) tokens (Leviathan et al., arXiv 2211.17192, equation 1). Times come from
`python -m experiments.bench costs`, which writes them into a file that `Costs.load` reads.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from research.errors import UserError
from research.paths import expand


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A measured drafter. size: nodes N of its call, the root included; tokens: mean tokens gained a call, the
    target's own included; draft: seconds of drafting and of its own bookkeeping a call."""

    name: str
    size: int
    tokens: float
    draft: float

    def __post_init__(self) -> None:
        if self.size < 1 or not 1 <= self.tokens <= self.size or not self.draft >= 0:
            raise UserError(
                f"{self.name}: {self.tokens} tokens a call of {self.size} nodes, {self.draft} seconds of "
                "drafting; a call gains from 1 to as many tokens as it has nodes, and takes no negative time"
            )


@dataclasses.dataclass(frozen=True)
class Costs:
    """Call times of one target on one machine, batch 1.

    target: what was measured, as a path; fingerprint: of its parameters; device: where; calls: N -> seconds of a
    plain loop's call that scores N nodes, 1 among them; candidates: drafters measured with it.
    """

    target: str
    fingerprint: str
    device: str
    calls: Mapping[int, float]
    candidates: tuple[Candidate, ...] = ()

    def __post_init__(self) -> None:
        if 1 not in self.calls:
            raise UserError(f"call times lack that of 1 node, plain decoding; there are {sorted(self.calls)}")
        for size, seconds in self.calls.items():
            if size < 1 or not 0 < seconds < math.inf:
                raise UserError(f"a call of {size} nodes took {seconds} seconds: both must be positive")

    def call(self, size: int) -> float:
        """Seconds of a call with `size` nodes; between two measured sizes on the line through them."""
        if size in self.calls:
            return self.calls[size]
        smaller = [n for n in self.calls if n < size]
        larger = [n for n in self.calls if n > size]
        if not smaller or not larger:
            raise UserError(f"no call time for {size} nodes: measured were {sorted(self.calls)}")
        low, high = max(smaller), min(larger)
        share = (size - low) / (high - low)
        return (1 - share) * self.calls[low] + share * self.calls[high]

    def speedup(self, size: int, tokens: float, draft: float = 0.0) -> float:
        """Against plain decoding, of calls with `size` nodes that gain `tokens`, after `draft` seconds each."""
        return tokens * self.call(1) / (draft + self.call(size))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON; folders are made."""
        path = expand(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Costs":
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or not one of these.
        """
        path = expand(path)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["calls"] = {int(size): float(seconds) for size, seconds in fields["calls"].items()}
            fields["candidates"] = tuple(Candidate(**each) for each in fields["candidates"])
            return cls(**fields)
        except FileNotFoundError:
            raise UserError(
                f"no call times at {path}: python -m experiments.bench costs measures them"
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is no table of call times: {error}") from error


def default_path(fingerprint: str) -> Path:
    """Where the program that measures writes, and `auto` reads, the costs of a target."""
    return expand("~/.cache/lathe/costs") / f"{fingerprint}.json"


def chain_tokens(acceptance: float, drafts: int) -> float:
    """Mean tokens a call gains from a chain of `drafts` tokens: 1 + a + a^2 + ... + a^drafts."""
    if not 0 <= acceptance <= 1:
        raise UserError(f"acceptance must be a probability, not {acceptance}")
    if acceptance == 1:
        return drafts + 1.0
    return (1 - acceptance ** (drafts + 1)) / (1 - acceptance)


def break_even(costs: Costs, drafts: int, draft: float) -> float | None:
    """The acceptance at which a chain of `drafts` tokens, `draft` seconds each, is as fast as plain decoding; None
    where even certain acceptance is slower."""
    needed = (drafts * draft + costs.call(drafts + 1)) / costs.call(1)
    if needed > drafts + 1:
        return None
    low, high = 0.0, 1.0  # the gain rises with the acceptance, from 1 to drafts + 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if chain_tokens(middle, drafts) >= needed else (middle, high)
    return high


def best_chain(
    costs: Costs, acceptance: float, draft: float, longest: int | None = None
) -> tuple[int, float]:
    """The number of drafts, `draft` seconds each, with the greatest speedup, and the speedup; (0, 1.0) where plain
    decoding is fastest. `longest`: the most drafts, by default what the measured sizes allow."""
    limit = max(costs.calls) - 1 if longest is None else longest
    speedups = [
        costs.speedup(drafts + 1, chain_tokens(acceptance, drafts), drafts * draft)
        for drafts in range(limit + 1)
    ]
    best = max(range(limit + 1), key=lambda drafts: speedups[drafts])
    return best, speedups[best]


def best_size(costs: Costs, tokens: Mapping[int, float], draft: float = 0.0) -> tuple[int, float]:
    """Of trees with N nodes that gain tokens[N] a call, the fastest N and its speedup; (1, 1.0) for none.

    This is the hardware-aware choice of PPD (arXiv 2405.18628, section 4.3) with drafting time in it.
    """
    best = (1, 1.0)
    for size, gained in sorted(tokens.items()):
        speedup = costs.speedup(size, gained, draft)
        if speedup > best[1]:
            best = (size, speedup)
    return best


@dataclasses.dataclass(frozen=True)
class Choice:
    """name: of the fastest candidate, or None for plain decoding; speedup: predicted; reasons: a line for each
    candidate, the fastest first."""

    name: str | None
    speedup: float
    reasons: tuple[str, ...]


def choose(costs: Costs, candidates: Sequence[Candidate] | None = None) -> Choice:
    """The fastest of the candidates (by default those of the table), or plain decoding if none is faster."""
    candidates = costs.candidates if candidates is None else candidates
    speed = {each: costs.speedup(each.size, each.tokens, each.draft) for each in candidates}
    ordered = sorted(candidates, key=lambda each: (-speed[each], each.size, each.name))
    reasons = tuple(
        f"{each.name}: {speed[each]:.2f}x plain decoding, {each.tokens:.2f} tokens a call that costs "
        f"{(each.draft + costs.call(each.size)) / costs.call(1):.2f} plain ones ({each.size} nodes, "
        f"{each.draft / costs.call(1):.2f} of it drafting)"
        for each in ordered
    )
    if ordered and speed[ordered[0]] > 1:
        return Choice(ordered[0].name, speed[ordered[0]], reasons)
    return Choice(None, 1.0, reasons)
