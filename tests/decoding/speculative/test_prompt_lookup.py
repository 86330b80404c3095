"""Prompt lookup: which continuation is drafted, by hand. What it shares with other drafters is in
test_members.py."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.proposers import Prompt, Round
from research.decoding.speculative.prompt_lookup import History, PromptLookup, suffix_matches
from research.decoding.verify import Accept
from research.errors import UserError


def history(*rows: list[int], slots: int = 12) -> History:
    tokens = np.zeros((len(rows), slots), np.int32)
    for row, values in enumerate(rows):
        tokens[row, : len(values)] = values
    return History(jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32))


def propose(lookup: PromptLookup, state: History):
    last = state.tokens[jnp.arange(len(state.length)), state.length - 1]
    keys = jax.random.split(jax.random.key(0), len(state.length))
    return lookup.propose((), None, state, Round(last, state.length - 1, keys, lambda x, tokens, tree: x))[0]


def test_suffix_matches_by_hand():
    # The text ends with 1 2 3. Up to place 2 stands 1 2 3: three tokens agree. At place 5 a 3 alone, before it 9.
    state = history([1, 2, 3, 4, 9, 3, 1, 2, 3])
    assert suffix_matches(state, 3).tolist() == [[0, 0, 3, 0, 0, 1, 0, 0, 0, 0, 0, 0]]
    assert suffix_matches(state, 2).tolist() == [[0, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("text", "drafted"),
    [
        ([1, 2, 3, 4, 9, 3, 1, 2, 3], [4, 9, 3]),  # after 1 2 3, not after the later 3
        ([5, 3, 7, 8, 6, 3], [7, 8, 6]),  # no bigram recurs: the longest n-gram is 3 itself
        ([1, 2, 7, 1, 2, 8, 1, 2], [7, 1, 2]),  # of two equally long ones the earliest
        ([4, 4], [4]),  # the draft ends where the text does
        ([4, 4, 4, 4, 4], [4, 4]),  # 4 4 4 first ends at place 2, and two tokens follow it
        ([1, 2, 3], []),  # nothing recurs
        ([6], []),
    ],
)
def test_drafts_by_hand(text, drafted):
    draft = propose(PromptLookup(num_tokens=3, max_ngram=3), history(text))
    assert draft.q is None and draft.tree.levels == 4
    assert draft.tokens[0, 0] == text[-1]
    assert draft.tree.real[0].tolist() == [True] * (1 + len(drafted)) + [False] * (3 - len(drafted))
    assert draft.tokens[0, 1 : 1 + len(drafted)].tolist() == drafted


def test_what_was_accepted_joins_the_text():
    lookup = PromptLookup(num_tokens=2, max_ngram=2)
    prompt = Prompt(
        tokens=jnp.asarray([[1, 2, 3, 1], [7, 8, 0, 0]], jnp.int32),
        lengths=jnp.asarray([4, 2], jnp.int32),
        hidden=jnp.zeros((2, 4, 1)),
        root=jnp.asarray([2, 7], jnp.int32),
        capacity=9,
    )
    state = lookup.init((), None, prompt)
    assert state.tokens.tolist() == [[1, 2, 3, 1, 2, 0, 0, 0, 0], [7, 8, 7, 0, 0, 0, 0, 0, 0]]
    draft = propose(lookup, state)
    assert draft.tokens.tolist() == [[2, 3, 1], [7, 8, 7]]
    # Row 0 keeps 3 of the draft and gains 5; row 1 is finished and gains nothing.
    accept = Accept(jnp.asarray([[0, 1, 0], [0, 0, 0]]), jnp.asarray([2, 0]), jnp.asarray([5, 6]))
    outcome = SimpleNamespace(draft=draft, accept=accept)  # nothing else is looked at
    state = lookup.observe((), None, state, outcome)
    assert state.tokens.tolist() == [[1, 2, 3, 1, 2, 3, 5, 0, 0], [7, 8, 7, 0, 0, 0, 0, 0, 0]]
    assert state.length.tolist() == [7, 3]


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="PromptLookup.max_ngram: 0; it must be at least 1"):
        PromptLookup(max_ngram=0)
