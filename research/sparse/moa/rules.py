"""Spans as functions of the input's length, S(N) = a + b N (arXiv 2406.14909, section 4.1), and what they cost.

One convention everywhere: the span counts the sink tokens, so a head of span S sees the first `sinks` tokens and a
window of S - sinks, and keeps S keys and values. (The released search counts the sink block on top of the span.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from research.errors import UserError


class Rule(NamedTuple):
    """a tokens, plus b times the length."""

    a: int
    b: float


DENSE = Rule(0, 1.0)


@dataclass(frozen=True)
class Grid:
    """Spans are whole blocks: sinks, and at least one block of window behind them, both in tokens."""

    sinks: int = 64
    block: int = 64

    def __post_init__(self):
        if self.block < 1 or self.sinks < 0 or self.sinks % self.block:
            raise UserError(
                f"sinks={self.sinks}, block={self.block}: sinks are whole blocks of at least 1 token"
            )

    def span(self, rule: Rule, length: int) -> int:
        """a + b N, rounded down to whole blocks, at least the sinks and a block, at most N."""
        # b is a fraction of a few bits, so that the product is exact.
        blocks = int(np.floor((rule.a + rule.b * length) / self.block))
        return min(max(blocks * self.block, self.sinks + self.block), length)

    def blocks(self, length: int) -> int:
        """Raises UserError unless the length is whole blocks, and more than the sinks and one block."""
        if length % self.block or length < self.sinks + 2 * self.block:
            raise UserError(
                f"length {length} is not a multiple of block={self.block} with room for {self.sinks} sinks and two "
                "blocks"
            )
        return length // self.block


def candidates(
    profiled: Sequence[int], lengths: Sequence[int], step: int, fractions: Sequence[float], grid: Grid
) -> list[Rule]:
    """Rules with a from -min(profiled) to max(profiled) by `step` and b of `fractions`, by span at the largest length.

    Left out: spans beyond the input at the largest profiled length or at the largest of `lengths`, spans of nothing at
    the smallest profiled one, and of rules with equal spans at all lengths all but one, with the smallest a.
    """
    low, high = min(profiled), max(profiled)
    largest = max(high, *lengths) if lengths else high
    every = sorted({*profiled, *lengths})
    found: dict[tuple[int, ...], Rule] = {}
    for b in fractions:
        for a in sorted(range(-low, high + 1, step), key=abs):
            if a + b * high > high or a + b * largest > largest or a + b * low <= 0:
                continue
            rule = Rule(a, float(b))
            spans = tuple(grid.span(rule, length) for length in every)
            if spans not in found or abs(a) < abs(found[spans].a):
                found[spans] = rule
    return sorted(found.values(), key=lambda rule: (grid.span(rule, largest), rule))


def losses(influence: np.ndarray, rules: Sequence[Rule], length: int, grid: Grid) -> np.ndarray:
    """influence float64[..., nb, nb] by blocks of queries and keys -> [..., rules], what each rule masks of it."""
    blocks, sink_blocks = grid.blocks(length), grid.sinks // grid.block
    if influence.shape[-2:] != (blocks, blocks):
        raise ValueError(f"influence of {influence.shape[-2:]} blocks for length {length}")
    beyond = influence[..., :, sink_blocks:]  # sinks are never masked
    # by_distance[d]: of the blocks d below the diagonal. A window of n blocks masks those with d >= n.
    by_distance = np.stack(
        [np.trace(beyond, offset=-(d + sink_blocks), axis1=-2, axis2=-1) for d in range(blocks)], axis=-1
    )
    masked = np.cumsum(by_distance[..., ::-1], axis=-1)[..., ::-1]
    masked = np.concatenate([masked, np.zeros_like(masked[..., :1])], axis=-1)
    windows = [(grid.span(rule, length) - grid.sinks) // grid.block for rule in rules]
    return masked[..., windows]


def densities(rules: Sequence[Rule], length: int, grid: Grid) -> np.ndarray:
    """float64[rules]: the share of N keys and values that the last token reads, and that is kept."""
    return np.array([grid.span(rule, length) / length for rule in rules])
