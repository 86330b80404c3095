"""Prompt lookup: what followed the last n-gram when it occurred before is drafted again. Nothing is trained.

Saxena, "Prompt Lookup Decoding" (2023, github.com/apoorvumang/prompt-lookup-decoding), with the rules that
`transformers` gives it: the longest n-gram that occurs earlier in prompt and output wins, of its occurrences
the earliest, and the draft ends where the text does.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.tree import chain
from research.decoding.verify import Draft
from research.errors import UserError


class History(struct.PyTreeNode):
    """tokens int32[B, S], prompt and output, the root included; length int32[B] of them."""

    tokens: jax.Array
    length: jax.Array


@dataclass(frozen=True)
class PromptLookup:
    """Drafts up to `num_tokens` tokens after an n-gram of at most `max_ngram` tokens."""

    num_tokens: int = 10
    max_ngram: int = 3

    def __post_init__(self) -> None:
        for name in ("num_tokens", "max_ngram"):
            if getattr(self, name) < 1:
                raise UserError(f"PromptLookup.{name}: {getattr(self, name)}; it must be at least 1")

    @property
    def size(self) -> int:
        return self.num_tokens + 1

    @property
    def levels(self) -> int:
        return self.num_tokens + 1

    def init(self, params: tuple[()], target: Target, prompt: Prompt) -> History:
        room = prompt.capacity - prompt.tokens.shape[1]
        tokens = jnp.pad(prompt.tokens, ((0, 0), (0, room)))
        history = History(tokens, prompt.lengths)
        return _append(history, prompt.root[:, None], jnp.ones_like(prompt.lengths))

    def propose(
        self, params: tuple[()], target: Target, state: History, round: Round
    ) -> tuple[Draft, History]:
        matched = suffix_matches(state, self.max_ngram)
        last = jnp.argmax(matched, axis=1)  # the first of the longest
        ahead = jnp.arange(1, self.size)
        place = last[:, None] + ahead
        known = (jnp.max(matched, axis=1, keepdims=True) > 0) & (place < state.length[:, None])
        place = jnp.minimum(place, state.tokens.shape[1] - 1)
        drafted = jnp.take_along_axis(state.tokens, place, axis=1)
        tokens = jnp.concatenate([round.root[:, None], drafted], axis=1)
        real = jnp.concatenate([jnp.ones_like(known[:, :1]), known], axis=1)
        return Draft(tokens, chain(self.size).replace(real=real)), state

    def observe(self, params: tuple[()], target: Target, state: History, outcome: Outcome) -> History:
        accept = outcome.accept
        kept = jnp.take_along_axis(outcome.draft.tokens, accept.path, axis=1)  # the root is there already
        place = jnp.arange(self.levels)
        gained = jnp.where(
            place == accept.count[:, None] - 1, accept.token[:, None], jnp.roll(kept, -1, axis=1)
        )
        return _append(state, gained, accept.count)


def suffix_matches(history: History, longest: int) -> jax.Array:
    """int32[B, S]: how many tokens up to each place, `longest` at most, equal those up to the end of the text.

    0 at the end itself and behind it: what is drafted must have a beginning in the text.
    """
    tokens, length = history.tokens, history.length[:, None]
    place = jnp.arange(tokens.shape[1])
    equal = place < length - 1
    count = jnp.zeros(tokens.shape, jnp.int32)
    for back in range(longest):
        final = jnp.take_along_axis(tokens, jnp.maximum(length - 1 - back, 0), axis=1)
        earlier = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
        equal = equal & (earlier == final) & (place >= back)
        count = count + equal
    return count


def _append(history: History, values: jax.Array, count: jax.Array) -> History:
    """The history with values[b, :count[b]] behind it; a select, because scatters are loops on CPU."""
    offset = jnp.arange(history.tokens.shape[1]) - history.length[:, None]
    chosen = jnp.take_along_axis(values, jnp.clip(offset, 0, values.shape[1] - 1), axis=1)
    tokens = jnp.where((offset >= 0) & (offset < count[:, None]), chosen, history.tokens)
    return History(tokens, history.length + count)
