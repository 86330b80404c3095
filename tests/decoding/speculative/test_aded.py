"""ADED: the trigram table, its online updates, the search, and the drafted trie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.proposers import Prompt, Round
from research.decoding.speculative.aded import ADED, Text, _OwnTrigrams, count_trigrams
from research.errors import UserError

VOCAB = 8
#                0 1 2 three times, 0 1 3 once, 1 2 0 twice, 1 3 0 once
CORPUS = np.asarray([0, 1, 2, 0, 1, 2, 0, 1, 3, 0, 1, 2], np.int32)


def rows(tokens: np.ndarray, segments=None) -> list[dict[str, np.ndarray]]:
    return [
        {
            "tokens": tokens[None],
            "segments": np.ones_like(tokens)[None] if segments is None else segments[None],
        }
    ]


TABLE = count_trigrams(rows(CORPUS), VOCAB)


def look_up(table, a: int, b: int, width: int = 3) -> dict[int, float]:
    tokens, scores = map(np.asarray, successors(table, np.asarray([a]), np.asarray([b]), width))
    return {int(t): float(s) for t, s in zip(tokens[0], scores[0], strict=True) if s > 0}


@functools.partial(jax.jit, static_argnums=3)
def successors(table, a, b, width):
    return table.successors(a, b, width)


def test_the_table_holds_relative_frequencies():
    assert look_up(TABLE, 0, 1) == {2: 0.75, 3: 0.25}
    assert look_up(TABLE, 1, 2) == {0: 1.0}
    assert look_up(TABLE, 2, 0) == {1: 1.0}
    # Unknown: a first token that begins nothing, a second token below, between and above the known ones.
    assert look_up(TABLE, 7, 1) == look_up(TABLE, 0, 0) == look_up(TABLE, 1, 1) == look_up(TABLE, 1, 7) == {}


def test_the_cut_keeps_the_most_frequent_and_their_scores():
    table = count_trigrams(rows(CORPUS), VOCAB, successors=1)
    assert look_up(table, 0, 1) == {2: 0.75}


def test_trigrams_do_not_cross_documents_or_padding():
    segments = np.asarray([1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0, 0], np.int32)
    table = count_trigrams(rows(CORPUS, segments), VOCAB)
    assert look_up(table, 0, 1) == {2: 1.0}  # 0 1 2 twice; 0 1 3 ends in padding
    assert look_up(table, 1, 2) == {0: 1.0}  # once in the second document
    assert look_up(table, 2, 0) == {1: 1.0}


def test_a_corpus_without_trigrams_is_refused():
    with pytest.raises(UserError, match="no three tokens"):
        count_trigrams(rows(np.asarray([1, 2], np.int32)), VOCAB)


def drafted(drafter: ADED, text: list[int], rounds: int = 1, table=TABLE, seed: int = 0):
    """The draft below the last token of `text` after `rounds` drafts in which nothing was gained."""
    tokens = np.asarray([text[:-1] or [0]], np.int32)
    root, length = np.asarray([text[-1]], np.int32), np.asarray([len(text) - 1], np.int32)
    found = draft_in_rounds(drafter, table, tokens, length, root, seed, rounds)
    return jax.tree.map(np.asarray, found)


@functools.partial(jax.jit, static_argnums=0)
def draft_in_rounds(drafter, table, tokens, length, root, seed, rounds):
    """One program for any number of rounds."""
    state = drafter.init(table, None, Prompt(tokens, length, jnp.zeros((1, 1, 1)), root, 32))
    round_ = Round(root, length, jax.random.split(jax.random.key(seed), 1), None)
    propose = lambda state: drafter.propose(table, None, state, round_)  # noqa: E731
    shapes = jax.eval_shape(propose, state)[0]
    draft = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.fori_loop(0, rounds, lambda _, last: propose(last[1]), (draft, state))


def paths(draft) -> list[tuple[int, ...]]:
    """The token paths of the real nodes."""
    tokens, mask = np.asarray(draft.tokens[0]), np.asarray(draft.tree.mask[0])
    return [tuple(tokens[mask[v]][1:]) for v in range(1, len(tokens)) if draft.tree.real[0, v]]


SMALL = ADED(iterations=40, paths=6, nodes=12, successors=3)


@pytest.mark.parametrize("updates", [1, 2, 5])
def test_updates_raise_a_score_by_the_gain_up_to_the_cap(updates):
    # `look` reads the scores the drafter itself sees: 5 4 6 is in the text alone, 0 1 2 in both.
    drafter = ADED(iterations=1, paths=1, nodes=4, successors=3, gain=0.5, cap=1.6)
    text = [5, 4, 6, 0, 1, 2]
    _, state = drafted(drafter, text, updates)

    @jax.jit
    def look(state):
        own = _OwnTrigrams.of(state.tokens[0], state.length[0] + 1, state.hits[0])
        return drafter._successors(TABLE, own, jnp.asarray([5, 0]), jnp.asarray([4, 1]))

    tokens, scores = look(state)
    new, both = (dict(zip(t, s, strict=True)) for t, s in zip(tokens.tolist(), scores.tolist(), strict=True))
    assert new[6] == pytest.approx(min(0.5 * updates, 1.6))
    assert both[2] == pytest.approx(min(0.75 + 0.5 * updates, 1.6))
    assert both[3] == pytest.approx(0.25)  # not in the text


def test_only_the_window_is_updated():
    _, state = drafted(ADED(window=4, iterations=1), [5, 4, 6, 0, 1, 2])
    # The last four tokens are 6 0 1 2: trigrams end at places 4 and 5.
    assert np.asarray(state.hits[0])[:8].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]


def test_the_trie_is_prefix_closed_without_duplicates_and_within_the_budget():
    draft, _ = drafted(SMALL, [3, 0, 1])
    found = paths(draft)
    assert 1 < len(found) <= SMALL.nodes
    assert len(set(found)) == len(found)
    assert all(path[:-1] in found or len(path) == 1 for path in found)
    # All that the corpus knows: after 0 1 come 2 0 1 (2 or 3) and 3 0 1 (2 or 3); four tokens deep by the extension.
    known = {(2,), (2, 0), (2, 0, 1), (3,), (3, 0), (3, 0, 1), (2, 0, 1, 2), (3, 0, 1, 2)}
    assert set(found) == known


def test_shallow_nodes_stay_when_the_budget_is_small():
    draft, _ = drafted(ADED(iterations=40, paths=6, nodes=5, successors=3), [3, 0, 1])
    assert sorted(map(len, paths(draft))) == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("text", [[7, 7], [0]], ids=["unknown bigram", "one token"])
def test_nothing_known_drafts_nothing(text):
    draft, _ = drafted(ADED(iterations=4, paths=2, nodes=6, successors=3, gain=0.0), text)
    assert paths(draft) == []


def test_visits_add_up():
    drafter = SMALL
    prior = [1.0]  # two successors of the root, the first of which has three; nothing else
    prior += [0.75, 0.25, 0.0] + [0.5, 0.3, 0.2] + [0.0] * 6 + [0.0] * 27
    search = jax.jit(lambda prior, seed: drafter._search(prior, jax.random.key(seed)))
    visits, expanded = map(np.asarray, search(np.asarray(prior, np.float32), 0))
    assert visits[0] == drafter.iterations == visits[1:4].sum()
    # A node's first visit stops there where its parent had just been expanded towards it, else it goes through.
    assert visits[1] - visits[4:7].sum() in (0, 1)
    assert expanded[0] and expanded[1] and not expanded[2]
    assert visits[3] == 0 and not visits[7:].any()
    # The last child of the root was visited first; the PUCT bonus then favours the more probable one.
    assert visits[1] > visits[2] > 0


def test_a_repeated_text_is_drafted():
    """The text repeats 5 4 6 7; the corpus knows nothing of it, and its continuation is drafted to the end."""
    draft, _ = drafted(ADED(iterations=40, paths=4, nodes=8, successors=3), [5, 4, 6, 7, 5, 4, 6, 7, 5, 4])
    assert (6, 7, 5, 4) in paths(draft)


def test_rows_with_accepted_tokens_remember_them():
    drafter = ADED(iterations=2, paths=1, nodes=3, successors=2)
    draft, state = drafted(drafter, [3, 0, 1])

    class Seen:
        path, count = np.asarray([[0, 1, 0, 0, 0]]), np.asarray([2])

    class Result:
        accept = Seen

    Result.draft = draft
    after: Text = jax.jit(lambda state: drafter.observe(TABLE, None, state, Result))(state)
    assert after.length.tolist() == [4]
    assert after.tokens.tolist()[0][:4] == [3, 0, 1, int(draft.tokens[0, 1])]


def test_fields_are_checked():
    with pytest.raises(UserError, match="depth is 1; it must be at least 2"):
        ADED(depth=1)
