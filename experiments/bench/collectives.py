"""What a compiled program sends between devices, and what it computes meanwhile: read from its scheduled HLO."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_KIND = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_NAME = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_FUSED = re.compile(r"\bcalls=%?([\w.-]+)")
_PRODUCT = re.compile(r" (?:convolution|dot)\(|custom_call_target=\"[^\"]*(?:gemm|matmul)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    kind: of `KINDS`. asynchronous: whether the schedule has its start and its end apart. products: the operations with
    a matrix product that it runs in between.
    """

    kind: str
    asynchronous: bool
    products: int = 0


def collectives(text: str) -> list[Collective]:
    """The collectives of a program's scheduled HLO, each where it is called; loops count once.

    Besides `all-gather-start` and `all-gather-done` there are the TPU compiler's fusions: `async-collective-start.N`
    holds the collective, products between it and `async-collective-done.N` move it on, and one called
    `all-reduce-scatter` sums and divides, all at once.
    """
    bodies: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            body = bodies.setdefault(head[1], [])
        else:
            body.append(line)

    @functools.cache
    def multiplies(name: str) -> bool:
        return any(
            _PRODUCT.search(x) or any(map(multiplies, _FUSED.findall(x))) for x in bodies.get(name, ())
        )

    def kinds(line: str) -> list[str]:
        found = [match[1] for match in _KIND.finditer(line)]
        for name in _FUSED.findall(line):
            if name.startswith("all-reduce-scatter"):
                return ["reduce-scatter"]
            found += [kind for inner in bodies.get(name, ()) for kind in kinds(inner)]
        return found

    def product(line: str) -> bool:
        return bool(_PRODUCT.search(line)) or any(map(multiplies, _FUSED.findall(line)))

    fused = {name for lines in bodies.values() for line in lines for name in _FUSED.findall(line)}
    result = []
    for name, lines in bodies.items():
        if name in fused:
            continue
        begun: dict[str, tuple[str, int]] = {}
        for number, line in enumerate(lines):
            if not (named := _NAME.match(line)):
                continue
            own = named[1]
            if done := _done(own, line, begun):
                kind, start = begun.pop(done)
                result.append(Collective(kind, True, sum(map(product, lines[start + 1 : number]))))
            elif own.startswith("async-collective-start") or re.search(r"-start\(", line) and kinds(line):
                begun[own] = (kinds(line)[0], number)
            elif "async_collective_fusion" not in line.partition("metadata=")[0]:
                result += [Collective(kind, False) for kind in kinds(line)]
    return result


def _done(name: str, line: str, begun: dict[str, tuple[str, int]]) -> str | None:
    """The start that an operation ends: of the same number, or its operand."""
    if (start := name.replace("async-collective-done", "async-collective-start")) != name:
        return start if start in begun else None
    ended = re.search(r"-done\(.*?%?([\w.-]+)\)", line)
    return ended[1] if ended and ended[1] in begun else None


def told(found: Iterable[Collective]) -> str:
    """Their number by kind, how many are asynchronous, and how many of these have products beside them."""
    found = list(found)
    every, apart = Counter(c.kind for c in found), Counter(c.kind for c in found if c.asynchronous)
    hidden = Counter(c.kind for c in found if c.products)
    parts = [
        f"{every[k]} {k} ({apart[k]} asynchronous, {hidden[k]} beside products)" for k in KINDS if every[k]
    ]
    return ", ".join(parts) or "none"
