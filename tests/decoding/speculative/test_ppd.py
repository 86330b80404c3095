"""PPD: what prompts see and say, the loss, the dynamic trees and their Markov chain by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.speculative.ppd import (
    PPD,
    PPDState,
    choose_size,
    search_trees,
    smallest_size,
    stationary,
    transitions,
)
from research.decoding.speculative.training import Teacher
from research.decoding.speculative.trees import build_static_tree, expected_tokens
from research.decoding.speculative.virtual import Chains, Inserted
from research.errors import UserError
from research.nn.accounting import count_parameters

from .virtual_cases import WIDTH, call, close, continuation, extend, make_batch, prefix, target

SMALL = np.asarray([[0.6, 0.2], [0.5, 0.3]])
TABLE = np.asarray([[0.5, 0.2, 0.1], [0.4, 0.2, 0.05], [0.3, 0.1, 0.1]])
PROMPTS = jax.random.normal(jax.random.key(8), (2, 1, WIDTH))


@functools.partial(jax.jit, static_argnums=0)
def forced(drafter, params, batch):
    return drafter.forced(params, Teacher(target(), batch), batch)


@functools.partial(jax.jit, static_argnums=0)
def loss(drafter, params, batch, key=None):
    return drafter.loss(params, Teacher(target(), batch), batch, key)


@pytest.mark.parametrize("ensemble", [1, 3])
def test_m_times_n_e_times_d_numbers_are_trained(ensemble):
    drafter = PPD(prompts=2, ensemble=ensemble)
    params = jax.eval_shape(drafter.create, jax.random.key(0), target())
    assert count_parameters(params) == 2 * ensemble * WIDTH


def test_prompts_start_as_embedded_tokens():
    params = jax.jit(PPD().create)(jax.random.key(0), target())["prompts"]
    table = target().params["embedding"]["table"]
    assert all((row == table).all(-1).any() for row in params.reshape(-1, WIDTH))


def test_copies_of_a_prompt_say_what_it_says():
    batch = make_batch()
    one = forced(PPD(2), {"prompts": PROMPTS}, batch)
    three = forced(PPD(2, ensemble=3), {"prompts": jnp.repeat(PROMPTS, 3, axis=1)}, batch)
    for single, mean in zip(one, three, strict=True):
        close(mean[0], single[0])
    other = forced(
        PPD(2, ensemble=3), {"prompts": jax.random.normal(jax.random.key(1), (2, 3, WIDTH))}, batch
    )
    assert float(jnp.abs(other[0][0] - one[0][0]).max()) > 0.1


def test_the_loss_is_the_divergence_from_the_model_at_the_true_place():
    """Every place by itself, in numpy: prompt j at n against the model at n + j, in the same document."""
    batch, drafter, params = make_batch(), PPD(2, decay=0.5), {"prompts": PROMPTS}
    measured = loss(drafter, params, batch)
    truth = np.asarray(jax.jit(lambda b: Teacher(target(), b).logits)(batch), np.float64)
    said = [np.asarray(guess[0], np.float64) for guess in forced(drafter, params, batch)]
    log_softmax = lambda x: x - np.log(np.sum(np.exp(x)))  # noqa: E731
    total, places = 0.0, 0
    # 9 tokens: the row of one document, and documents of 4 and 5 whose first ends in a target that counts not.
    for row, begin, end in ((0, 0, 9), (1, 0, 3), (1, 4, 9)):
        for n in range(begin, end - 1):
            for j, factor in ((1, 0.5), (2, 0.25)):  # decay^(j - 1) / m
                if n + j < end and n + 2 < end:  # only where both prompts have a true place
                    p, q = log_softmax(truth[row, n + j]), log_softmax(said[j - 1][row, n])
                    total += factor * np.sum(np.exp(p) * (p - q))
            places += n + 2 < end
    assert float(measured["loss"][1]) == places == 7 + 1 + 3
    close(measured["loss"][0], total, rtol=1e-4)


def test_truncation_draws_one_place_a_row_with_room_for_all_prompts():
    batch, drafter = make_batch(), PPD(2, anchors=1)
    params = {"prompts": PROMPTS}
    everywhere = {}
    for seed in range(6):
        metrics = loss(drafter, params, batch, jax.random.key(seed))
        assert float(metrics["loss"][1]) == 2.0  # one place in each row
        everywhere[seed] = float(metrics["loss"][0])
    assert len(set(everywhere.values())) > 3


def test_no_gradient_reaches_the_model():
    batch = make_batch()

    def objective(params, model_params):
        found = target().replace(params=model_params)
        return PPD(2).loss(params, Teacher(found, batch), batch, None)["loss"][0]

    own, others = jax.jit(jax.grad(objective, (0, 1)))({"prompts": PROMPTS}, target().params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(others))
    assert jnp.abs(own["prompts"]).min() > 0


def test_guesses_are_what_the_prompts_say_behind_the_accepted_text():
    """The tree of state 2 with 2, 1, 2, 1 prompts; the text goes on through its node (1, 0), then (1,), ..."""
    paths, counts = ((0,), (1,), (1, 0)), (2, 1, 2, 1)
    drafter = PPD(2, top=2, trees=(Chains((), (2,)), Chains(((0,),), (2, 1)), Chains(paths, counts)))
    params, cache = {"prompts": PROMPTS}, prefix()[0]
    root, first, second, *_ = continuation()
    wrong = (first + 1) % 32
    for tokens, accepted in (([first, second], 2), ([first, wrong], 1), ([wrong, wrong], 0)):
        guesses = jnp.asarray([[[(tokens[0] + 2) % 32, tokens[0]], [tokens[1], 0]]])
        outcome, state = call(drafter, params, PPDState(jnp.asarray([2]), guesses))
        assert int(outcome.accept.count[0]) == accepted + 1
        assert int(state.depth[0]) == (2, 2, 1)[accepted]  # prompts under the root, (1,) and (1, 0)
        text = jnp.asarray([[root, first, second][: accepted + 1]])
        logits, _, _ = extend(cache, text, virtual=Inserted(PROMPTS.swapaxes(0, 1)))
        depth = int(state.depth[0])
        best = np.argsort(-np.asarray(logits[:, accepted + 1 :]), axis=-1)[:, :depth, :2]
        assert state.guesses[:, :depth].tolist() == best.tolist()
    # Several embeddings a prompt, all alike, in the same places.
    several = PPD(2, ensemble=2, top=2, trees=drafter.trees)
    again = {"prompts": jnp.repeat(PROMPTS, 2, axis=1)}
    other, found = call(several, again, PPDState(jnp.asarray([2]), guesses))
    assert several.size == drafter.size + 6  # as many prompts again
    assert found.guesses[:, :2].tolist() == state.guesses[:, :2].tolist()


def test_the_first_call_has_no_candidates():
    drafter = PPD(2)
    outcome, after = call(drafter, {"prompts": PROMPTS})
    assert outcome.draft.tree.real.sum() == 1 and outcome.accept.count.tolist() == [1]
    assert after.depth.tolist() == [2]


@pytest.mark.parametrize(
    "trees, message",
    [
        ((Chains((), (2,)),), "3 trees"),
        ((Chains((), (2,)), Chains(((0,), (0, 0)), (1, 1, 1)), Chains((), (2,))), "state 1 is 2 deep"),
        ((Chains((), (2,)), Chains((), (0,)), Chains((), (2,))), "1 to 2 are possible"),
        ((Chains((), (2,)), Chains(((0,), (1,)), (1, 1, 1)), Chains((), (2,))), "top guesses"),
    ],
)
def test_trees_that_do_not_fit_are_refused(trees, message):
    with pytest.raises(UserError, match=message):
        PPD(2, top=1, trees=trees)


# The search, by hand. With m = 2 and the accuracies of SMALL.


def test_five_rows_by_hand():
    """One candidate, (0,), with a prompt, and the root with two. From either state: .6 to 1, .4 to 2."""
    found = search_trees(SMALL, 5)
    assert found.trees == (Chains((), (2,)), Chains(((0,),), (2, 1)), Chains(((0,),), (2, 1)))
    assert found.tokens == pytest.approx(1.6)


def test_seven_rows_by_hand():
    """Two candidates with a prompt each. State 1: (0,) and (1,), value .8, last accepted .2 (none), .6, .2.
    State 2: (0,) and (0, 0), value .6 + .3; last .4, .6 - .3, .3. Law: p1 = .8 p1 + .6 p2, so .75, .25."""
    found = search_trees(SMALL, 7)
    assert found.trees[1:] == (Chains(((0,), (1,)), (2, 1, 1)), Chains(((0,), (0, 0)), (2, 1, 1)))
    assert found.tokens == pytest.approx(1 + 0.75 * 0.8 + 0.25 * 0.9)


def test_eight_rows_by_hand():
    """One prompt more: in state 1 under (0,), where it loses .6 (.9 - .8), not .2 (.9 - .8); in state 2 under
    either, .3. To state 2 goes .2 + .6 from 1 and .4 + .3 from 2: p1 = .2 p1 + .3 p2, so 3/11 and 8/11."""
    found = search_trees(SMALL, 8)
    assert found.trees[1] == Chains(((0,), (1,)), (2, 2, 1))
    assert found.trees[2].paths == ((0,), (0, 0)) and sorted(found.trees[2].counts) == [1, 2, 2]
    assert found.tokens == pytest.approx(1 + (3 * 0.8 + 8 * 0.9) / 11)


@pytest.mark.parametrize("ensemble", [1, 2])
@pytest.mark.parametrize("size", [8, 12, 16, 25, 40])
def test_trees_keep_their_budget(size, ensemble):
    smallest = smallest_size(3, ensemble)
    if size < smallest:
        with pytest.raises(UserError, match=f"are {smallest} rows"):
            search_trees(TABLE, size, ensemble)
        return
    found = search_trees(TABLE, size, ensemble)
    for state, tree in enumerate(found.trees):  # that they are trees, `Chains` has checked
        assert len(tree.counts) + ensemble * sum(tree.counts) <= size
        assert tree.levels <= state + 1 and tree.counts[0] == 3
    # All in one program, padded: still no larger.
    assert PPD(3, ensemble, top=3, trees=found.trees).size <= size


def values(paths) -> dict:
    return {path: np.prod([TABLE[depth, rank] for depth, rank in enumerate(path)]) for path in ((), *paths)}


def test_the_chain_of_states():
    """Rows of the matrix are laws, whose long run is stationary; a run of draws earns what R says."""
    found = search_trees(TABLE, 20)
    states = [State(tree.paths) for tree in found.trees[1:]]
    matrix = transitions(states, found.trees[1:])
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-12)
    # Nothing accepted, 1 - .8, is part of what moves to state 3.
    assert (matrix[:, 2] >= 1 - TABLE[0].sum() - 1e-12).all()
    law = stationary(matrix)
    np.testing.assert_allclose(law @ matrix, law, atol=1e-9)
    # The same by drawing ranks as the table says, independently at every depth: 40 000 calls, deviation .006.
    random = np.random.default_rng(0)
    ranks = np.stack([random.choice(4, 40_000, p=[*row, 1 - row.sum()]) for row in TABLE], 1)
    state, accepted = 3, 0
    for drawn in ranks:
        tree = found.trees[state]
        path = ()
        while len(path) < 3 and (*path, int(drawn[len(path)])) in tree.paths:
            path = (*path, int(drawn[len(path)]))
        accepted += len(path)
        state = tree.counts[((), *tree.paths).index(path)]
    assert abs(accepted / 40_000 - (found.tokens - 1)) < 0.03


class State:
    """What `transitions` reads of a state, computed anew: the probability that each node is the last."""

    def __init__(self, paths):
        value = values(paths)
        children = {node: sum(value[p] for p in paths if p[:-1] == node) for node in value}
        self.last = np.asarray([value[node] - children[node] for node in value])


def test_the_dynamic_tree_beats_the_fixed_one_of_the_same_size():
    """Fixed: every candidate has all three prompts, so that the state is always 3. 20 rows hold 4 candidates."""
    fixed = build_static_tree(TABLE, 4)
    assert 1 + len(fixed) + 3 * (1 + len(fixed)) == 20
    assert search_trees(TABLE, 20).tokens > expected_tokens(TABLE, fixed)


def test_the_size_fits_the_machine():
    sizes = (5, 7, 8)
    # A device on which rows cost nothing takes the best tree, one on which each costs as much as a call none.
    assert choose_size(SMALL, {1: 1.0} | dict.fromkeys(sizes, 1.0)).size == 8
    none = choose_size(SMALL, {1: 1.0} | {n: float(n) for n in sizes})
    assert (none.size, none.trees, none.speed) == (1, (), 1.0)
    # 1.6 / 1.1 = 1.45 against 1.825 / 1.3 = 1.40; 2 rows are too few for a tree.
    found = choose_size(SMALL, {1: 2.0, 2: 2.0, 5: 2.2, 7: 2.6})
    assert found.size == 5 and found.speed == pytest.approx(1.6 / 1.1)
    with pytest.raises(UserError, match="lack that of 1 row"):
        choose_size(SMALL, {5: 1.0})
    with pytest.raises(UserError, match="5 rows is 0"):
        choose_size(SMALL, {1: 1.0, 5: 0.0})
