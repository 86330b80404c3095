"""Layers that follow the target: read call by call as in one pass, accepted tokens only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding import engine as engines
from research.decoding.proposers import Target
from research.decoding.speculative.clover import Clover
from research.decoding.speculative.eagle import ConfidenceTree, Eagle
from research.decoding.speculative.follower import last_layer
from research.decoding.verify import Greedy
from research.nn.transformer import scan_params
from research.nn.weights import LowRank
from tests.programs import drawn_like

from .members import PROMPTS, tiny_target

DRAFTERS = {
    "clover": Clover(depth=3, budget=4, layers=2, num_heads=2),
    "eagle": Eagle(ConfidenceTree(depth=3, width=3, budget=6)),
}


@pytest.fixture(autouse=True, scope="module")
def made():
    """The target is written to disk when it is first asked for, which must not be inside of tracing."""
    tiny_target()


def target() -> Target:
    return Target(tiny_target().params, tiny_target().model)


@functools.cache
def programs(name: str):
    """The drafter's parameters; prefill, decoding, and one pass over whole texts, each compiled once."""
    drafter, model, params = DRAFTERS[name], target().model, target().params
    own = drawn_like(lambda: drafter.create(jax.random.key(0), target()))
    engine = engines.Engine(model, drafter, Greedy(), 64)

    @jax.jit
    def one_pass(text):
        hidden, _ = model.apply({"params": params}, text[:, :-1], method="features")
        return drafter.network(target()).apply({"params": own}, hidden, target().embed(text[:, 1:]))

    return own, jax.jit(engine.prefill), jax.jit(engine.decode), one_pass


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("calls", [0, 3])
def test_the_cache_is_that_of_one_pass_over_what_was_accepted(name, calls):
    """Prompts of unequal lengths, then calls that accept unequal numbers of drafts."""
    own, prefill, decode, one_pass = programs(name)
    lengths = [len(prompt) for prompt in PROMPTS]
    tokens = np.zeros((len(PROMPTS), 16), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    weights, ends = engines.Weights(target().params, own, ()), jnp.zeros((0,), jnp.int32)
    keys = engines.row_keys(0, jnp.arange(len(PROMPTS)), 1)
    limit = jnp.full((len(PROMPTS),), 30)
    state = prefill(weights, tokens, jnp.asarray(lengths), limit, keys, ends)
    state = decode(weights, state, jnp.zeros((3,), bool), jnp.int32(calls), ends)
    assert np.asarray(state.count).sum() >= 3 * (calls + 1)

    text = np.zeros((len(PROMPTS), 48), np.int32)  # what is behind the root is padding that nothing sees
    for row, prompt in enumerate(PROMPTS):
        output = np.asarray(state.tokens[row])[: state.count[row]]
        text[row, : len(prompt) + len(output)] = [*prompt, *output]
    states, fresh = one_pass(text)
    cache, found = state.proposer.cache, np.asarray(state.proposer.state)
    committed = np.asarray(lengths) + np.asarray(state.count) - 1  # all but the root
    assert np.array_equal(cache.length, committed) and np.array_equal(state.cache.length, committed)
    for row, length in enumerate(committed):
        np.testing.assert_allclose(found[row], np.asarray(states)[row, length - 1], atol=2e-5)
        for layer, rows in zip(cache.layers, fresh, strict=True):
            for mine, theirs in zip((layer.key, layer.value), rows, strict=True):
                mine, theirs = np.asarray(mine)[row, :, :length], np.asarray(theirs)[row, :, :length]
                np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_the_last_layer_is_copied_from_scanned_and_from_structured_parameters():
    found, params = target(), target().params
    expected = params["layer_1"]
    for mine, theirs in zip(jax.tree.leaves(last_layer(found)), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(mine, theirs)
    scanned = Target(scan_params(params, 1), found.model.clone(scan_layers=True))
    for mine, theirs in zip(jax.tree.leaves(last_layer(scanned)), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(mine, theirs)
    down, up = jnp.ones((32, 2)), jnp.arange(32.0).reshape(2, 16)
    structured = jax.tree.map(lambda x: x, params)  # a copy of the dicts
    structured["layer_1"]["attention"]["query"]["kernel"] = LowRank(down, up)
    copied = last_layer(Target(structured, found.model))["attention"]["query"]["kernel"]
    assert np.array_equal(copied, np.ones((32, 1)) * (np.arange(16.0) + np.arange(16.0, 32.0)))
