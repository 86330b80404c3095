"""Mask rules as tables, and the key ranges that blocked kernels rely on."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.nn.masks import Causal, Full, Prefix, Steps, Window


def table(rule, length=4, prefix=None):
    """[b, 1 or heads] tables as strings, one row of 0 and 1 per query."""
    index = jnp.arange(length)[None]
    allowed = np.asarray(rule.allowed(index, index, None if prefix is None else jnp.asarray(prefix)))
    return [["".join("01"[int(x)] for x in row) for row in head] for b in allowed for head in b]


def test_tables():
    assert table(Full()) == [["1111"] * 4]
    assert table(Causal()) == [["1000", "1100", "1110", "1111"]]
    assert table(Window(2)) == [["1000", "1100", "0110", "0011"]]
    assert table(Window(1)) == [["1000", "0100", "0010", "0001"]]
    assert table(Window(2, sinks=1)) == [["1000", "1100", "1110", "1011"]]
    # One table a head: spans of 1 and 3.
    assert table(Window((1, 3))) == [["1000", "0100", "0010", "0001"], ["1000", "1100", "1110", "0111"]]
    # One table a row: prefixes of 0, 3 and 4 tokens.
    assert table(Prefix(), prefix=[0, 3, 4]) == [
        ["1000", "1100", "1110", "1111"],
        ["1110", "1110", "1110", "1111"],
        ["1111"] * 4,
    ]


def test_the_rule_of_some_heads():
    rule = Window((2, 5, 3, 3), sinks=1)
    assert (
        rule.key_spans(4) == (2, 5, 3, 3) and rule.key_spans(2) == (5, 3) and Window(4).key_spans(2) == (4, 4)
    )
    assert rule.for_heads(1, 3) == Window((5, 3), sinks=1) and Window(4).for_heads(1, 3) == Window(4)
    with pytest.raises(UserError, match="Window of 3 sizes can't be shared by 2 key heads"):
        Window((1, 2, 3)).key_spans(2)


def test_indices_may_differ_between_rows():
    # Queries at 5 (row 0) and 2 (row 1) against the slots of a ring, which hold tokens in any order.
    query, key = jnp.asarray([[5], [2]]), jnp.asarray([[4, 5, 2, 3], [0, 1, 2, -1]])
    # Row 0: 4 and 5 lie within the last two; row 1: 1 and 2.
    assert Window(2).allowed(query, key, None)[:, 0, 0].tolist() == [
        [True, True, False, False],
        [False, True, True, False],
    ]


@pytest.mark.parametrize("rule", [Causal(), Window(3), Window((2, 5)), Window(2, sinks=1), Window(20)])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 4), (4, 8), (7, 8), (9, 11)])
def test_key_range_is_the_smallest_that_holds_all_visible_keys(rule, start, stop):
    keys = np.arange(12)
    seen = np.asarray(rule.allowed(jnp.arange(start, stop)[None], jnp.asarray(keys)[None], None)).any(
        (0, 1, 2)
    )
    assert rule.key_range(start, stop) == (keys[seen].min(), keys[seen].max() + 1)


@pytest.mark.parametrize(
    ("rule", "prefix"),
    [
        (Full(), None),
        (Causal(), None),
        (Window(3), None),
        (Window((2, 5)), None),
        (Window(2, sinks=3), None),
        (Prefix(), [2, 7]),
        (Steps(), [[1, 2, 6, 6, 6, 6, 7, 8, 9, 10, 11, 12], [3, 3, 3, 4, 5, 6, 7, 8, 11, 11, 11, 12]]),
        (Steps(), None),
    ],
)
def test_which_chunks_meet_is_exact(rule, prefix):
    prefix = None if prefix is None else jnp.asarray(prefix)
    place = jnp.arange(12)[None]
    allowed = np.asarray(rule.allowed(place, place, prefix)).any((0, 1))
    for size in (1, 3, 4):
        count = 12 // size
        expected = allowed.reshape(count, size, count, size).any((1, 3))
        meets = [
            [bool(rule.meets(i * size, j * size, size, prefix)) for j in range(count)] for i in range(count)
        ]
        np.testing.assert_array_equal(meets, expected)


def test_rules_without_a_range_and_a_prefix_without_lengths():
    assert Full().key_range(0, 4) is None and Prefix().key_range(0, 4) is None
    with pytest.raises(UserError, match="Prefix mask needs the prefix length"):
        table(Prefix())


def test_rules_are_values():
    assert Window(3) == Window(3) and hash(Window((1, 2))) == hash(Window((1, 2))) and Window(3) != Window(4)
    assert (Window(3).span, Window((1, 7, 2)).span) == (3, 7)
