"""Processors on hand-computed logits; keys; the law of the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.sampling import (
    EXCLUDED,
    Ban,
    MinP,
    RepetitionPenalty,
    Sampling,
    Temperature,
    TopK,
    TopP,
    apply_chain,
    argmax,
    gumbel,
    position_keys,
)
from research.decoding.tree import static_tree
from research.errors import UserError

# Probabilities 0.4, 0.3, 0.1, 0.2 in this order.
LOGITS = jnp.log(jnp.asarray([0.4, 0.3, 0.1, 0.2]))


def kept(logits) -> list[int]:
    return [i for i, x in enumerate(np.asarray(logits).tolist()) if x > EXCLUDED]


@pytest.mark.parametrize("count, expected", [(1, [0]), (2, [0, 1]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])])
def test_top_k(count, expected):
    assert kept(TopK(jnp.int32(count))(LOGITS)) == expected


def test_top_k_keeps_ties_and_negative_logits():
    assert kept(TopK(jnp.int32(2))(jnp.asarray([-3.0, -1.0, -3.0, -9.0]))) == [0, 1, 2]


# 0.4 < 0.5 <= 0.4 + 0.3; 0.7 < 0.75 <= 0.9; only all four reach 0.95.
@pytest.mark.parametrize(
    "mass, expected", [(0.3, [0]), (0.5, [0, 1]), (0.75, [0, 1, 3]), (0.95, [0, 1, 2, 3])]
)
def test_top_p(mass, expected):
    assert kept(TopP(jnp.float32(mass))(LOGITS)) == expected


def test_top_p_against_sorting():
    logits = 3 * jax.random.normal(jax.random.key(0), (20, 100))
    result = TopP(jnp.float32(0.8))(logits)
    for row, out in zip(np.asarray(logits, np.float64), np.asarray(result), strict=True):
        order = np.argsort(-row)
        probabilities = np.exp(row[order]) / np.exp(row).sum()
        needed = int(np.sum(np.cumsum(probabilities) < 0.8)) + 1
        assert sorted(order[:needed].tolist()) == kept(out)


# 0.4 * 0.5 = 0.2 keeps 0.2 only if rounding allows, so test beside it: 0.4 * 0.45 = 0.18, 0.4 * 0.6 = 0.24.
@pytest.mark.parametrize("ratio, expected", [(0.45, [0, 1, 3]), (0.6, [0, 1]), (1.0, [0])])
def test_min_p(ratio, expected):
    assert kept(MinP(jnp.float32(ratio))(LOGITS)) == expected


def test_temperature_and_ban():
    assert Temperature(jnp.float32(2.0))(jnp.asarray([2.0, -4.0])).tolist() == [1.0, -2.0]
    assert kept(Ban(jnp.asarray([0, 3]))(LOGITS)) == [1, 2]


def test_repetition_penalty_follows_the_tree():
    penalty = RepetitionPenalty(jnp.float32(2.0))
    # Row 0 has seen 0 and 1 (the 4 is padding), row 1 has seen 2.
    state = penalty.init(jnp.asarray([[0, 1, 4], [2, 2, 2]]), jnp.asarray([2, 3]), 5)
    assert state.astype(int).tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    tree = static_tree([-1, 0, 0])  # tokens: root 3, children 4 and 0
    along = penalty.along(state, jnp.asarray([[3, 4, 0], [3, 4, 0]]), tree)
    assert along[0].astype(int).tolist() == [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1], [1, 1, 0, 1, 0]]
    assert along[1].astype(int).tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0]]
    logits = jnp.broadcast_to(jnp.asarray([4.0, -4.0, 4.0, -4.0, 4.0]), (2, 3, 5))
    # Seen: 4 / 2 = 2 and -4 * 2 = -8.
    assert penalty(logits, along)[0, 0].tolist() == [2.0, -8.0, 4.0, -8.0, 4.0]
    assert penalty(logits, along)[1, 1].tolist() == [4.0, -4.0, 2.0, -8.0, 2.0]
    updated = penalty.update(state, jnp.asarray([[3, 4], [3, 4]]), jnp.asarray([1, 0]))
    assert updated.astype(int).tolist() == [[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]]


def test_chain_holds_only_what_acts_and_in_order():
    assert Sampling().chain(4) == ()
    assert Sampling(temperature=1.0, top_k=4, top_p=1.0, repetition_penalty=1.0).chain(4) == ()
    names = [type(p).__name__ for p in Sampling(0.5, 2, 0.9, 0.1, 1.2, (3,)).chain(4)]
    assert names == ["RepetitionPenalty", "Ban", "Temperature", "TopK", "TopP", "MinP"]
    greedy = Sampling(0.0, repetition_penalty=1.2, banned=(3,))
    assert [type(p).__name__ for p in greedy.chain(4)] == names[:2]


def test_other_values_share_a_program():
    run = jax.jit(lambda chain, x: apply_chain(chain, x[None, None], ((),) * 3))
    for temperature, k, p in ((0.5, 2, 0.9), (2.0, 3, 0.4)):
        run(Sampling(temperature, k, p).chain(4), LOGITS)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "field, value, word",
    [
        ("temperature", -0.1, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("temperature", float("inf"), "temperature"),
        ("top_k", 0, "top_k"),
        ("top_p", 0.0, "top_p"),
        ("top_p", 1.5, "top_p"),
        ("min_p", -1.0, "min_p"),
        ("repetition_penalty", 0.0, "repetition_penalty"),
    ],
)
def test_values_out_of_range(field, value, word):
    with pytest.raises(UserError, match=f"^{word} must be"):
        Sampling(**{field: value})


@pytest.mark.parametrize("field", ["top_k", "top_p", "min_p"])
def test_nothing_bounds_greedy_decoding(field):
    with pytest.raises(UserError, match=f"^{field}=1 changes nothing at temperature 0"):
        Sampling(**{field: 1})


def test_bans_out_of_range():
    with pytest.raises(UserError, match="banned token 4 is outside the vocabulary of 4"):
        Sampling(banned=(4,)).chain(4)
    with pytest.raises(UserError, match="every token"):
        Sampling(banned=(0, 1)).chain(2)


def test_argmax_takes_the_first():
    x = jnp.asarray([[1.0, 3.0, 3.0], [-2.0, -5.0, -2.0], [0.0, 0.0, 0.0]])
    assert argmax(x).tolist() == [1, 0, 0]


def test_position_keys_depend_on_the_position_alone():
    keys = jax.random.split(jax.random.key(0), 2)
    first = jax.random.key_data(position_keys(keys, jnp.asarray([3, 5]), 4))
    second = jax.random.key_data(position_keys(keys, jnp.asarray([4, 7]), 2))
    assert np.array_equal(first[0, 1:3], second[0]) and np.array_equal(first[1, 2:4], second[1])
    assert len({tuple(k) for k in np.asarray(first).reshape(-1, 2).tolist()}) == 8


def test_law_of_the_sampler():
    noise = gumbel(jax.random.split(jax.random.key(1), 40_000), 4)
    counts = np.bincount(np.asarray(argmax(LOGITS + noise)), minlength=4)
    expected = 40_000 * np.asarray([0.4, 0.3, 0.1, 0.2])
    # Chi-square with 3 degrees of freedom: above 16.3 once in a thousand seeds.
    assert np.sum((counts - expected) ** 2 / expected) < 16.3
