"""Input-guided aggressive decoding: where output is nearly input, the rest of the source is the draft.

Lossless Acceleration for Seq2seq Generation with Aggressive Decoding (arXiv 2205.10350, section 3.1). The model
checks all of it in one call. Where its output departs from the source, its own token is taken, and copying
resumes where the last tokens of the output, one to three, occur in the source exactly once; until they do,
calls give one token each. Nothing is trained.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.tree import chain
from research.decoding.verify import Draft
from research.errors import UserError

_LONGEST = 3  # tokens of a suffix


class Alignment(struct.PyTreeNode):
    """Where the output is in the source: source int32[B, S], length int32[B] of it; pointer int32[B], the place
    of the token that is expected next, `length` where there is none; recent int32[B, 3], the newest tokens of
    the output, -1 before its beginning."""

    source: jax.Array
    length: jax.Array
    pointer: jax.Array
    recent: jax.Array


@dataclass(frozen=True)
class IAD:
    """Drafts the next `window` tokens of the source, fewer at its end; the paper's window is the whole source.

    Made for an encoder-decoder whose target has the source's vocabulary. A source may begin with the model's
    start token, with which the output begins too. Of a decoder it copies the prompt.
    """

    window: int = 32

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"IAD.window: {self.window}; it must be at least 1")

    @property
    def size(self) -> int:
        return self.window + 1

    @property
    def levels(self) -> int:
        return self.window + 1

    def init(self, params: tuple[()], target: Target, prompt: Prompt) -> Alignment:
        # The first token, which prefill has chosen, ends a parallel step that began with the whole source as
        # the draft, behind the start token.
        start = getattr(target.model, "bos", -1)  # -1 is no token: a decoder has none of its own
        pointer = (prompt.tokens[:, 0] == start).astype(jnp.int32)
        recent = jnp.full((prompt.root.shape[0], _LONGEST), -1, jnp.int32).at[:, -1].set(start)
        state = Alignment(prompt.tokens, prompt.lengths, pointer, recent)
        return _advance(state, jnp.zeros_like(pointer), prompt.root[:, None], jnp.ones_like(pointer))

    def propose(
        self, params: tuple[()], target: Target, state: Alignment, round: Round
    ) -> tuple[Draft, Alignment]:
        place = state.pointer[:, None] + jnp.arange(self.window)
        known = place < state.length[:, None]
        copied = jnp.take_along_axis(state.source, jnp.minimum(place, state.source.shape[1] - 1), axis=1)
        tokens = jnp.concatenate([round.root[:, None], copied], axis=1)
        real = jnp.concatenate([jnp.ones_like(known[:, :1]), known], axis=1)
        return Draft(tokens, chain(self.size).replace(real=real)), state

    def observe(self, params: Any, target: Target, state: Alignment, outcome: Outcome) -> Alignment:
        accept = outcome.accept
        # A chain: the accepted drafts are the nodes 1 .. count - 1, and the model's own token comes after.
        place = jnp.arange(self.levels)
        drafted = jnp.roll(outcome.draft.tokens, -1, axis=1)
        gained = jnp.where(place == accept.count[:, None] - 1, accept.token[:, None], drafted)
        return _advance(state, jnp.maximum(accept.count - 1, 0), gained, accept.count)


def _advance(state: Alignment, matched: jax.Array, gained: jax.Array, count: jax.Array) -> Alignment:
    """After gained[b, :count[b]], of which the first matched[b] were copied from the pointer on.

    Where the token after them is the source's next as well (the window has ended before the source, or the
    first token is right), the same copy goes on. Else the output has to be found in the source again.
    """
    newest = jnp.concatenate([state.recent, gained], axis=1)
    recent = jnp.take_along_axis(newest, count[:, None] + jnp.arange(_LONGEST), axis=1)
    expected = state.pointer + matched
    there = jnp.take_along_axis(
        state.source, jnp.minimum(expected, state.source.shape[1] - 1)[:, None], axis=1
    )[:, 0]
    goes_on = (expected < state.length) & (there == recent[:, -1])
    return state.replace(
        pointer=jnp.where(goes_on, expected + 1, align(state.source, state.length, recent)), recent=recent
    )


def align(source: jax.Array, length: jax.Array, recent: jax.Array) -> jax.Array:
    """The place int32[B] in source int32[B, S] after the shortest suffix of recent int32[B, 3] that occurs in
    its first length[b] tokens exactly once; `length` where none does."""
    place = jnp.arange(source.shape[1])
    ends_here = place < length[:, None]
    found, open_ = length, jnp.ones_like(length, bool)
    for back in range(_LONGEST):
        # ends_here[s]: the last back + 1 tokens of the output are those of the source up to place s.
        earlier = jnp.pad(source, ((0, 0), (back, 0)))[:, : source.shape[1]]
        ends_here = ends_here & (place >= back) & (earlier == recent[:, -1 - back, None])
        occurrences = jnp.sum(ends_here, axis=1)
        found = jnp.where(open_ & (occurrences == 1), jnp.argmax(ends_here, axis=1) + 1, found)
        open_ = open_ & (occurrences > 1)  # with none, a longer suffix has none either
    return found
