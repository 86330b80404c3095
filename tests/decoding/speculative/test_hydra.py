"""Hydra and Hydra++: what each head depends on, Medusa as a special case, levels against paths, the prefix layer's
cache, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.matlm import decoder
from research.config import build
from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.speculative.heads import copy_head
from research.decoding.speculative.hydra import Hydra
from research.decoding.speculative.medusa import Medusa
from research.decoding.speculative.training import Teacher, ahead
from research.decoding.speculative.trees import RankTree
from research.decoding.verify import Accept, Draft
from research.errors import UserError
from tests.programs import drawn

VOCAB, WIDTH, HEADS = 32, 16, 3
TREE = RankTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)))
HYDRA = Hydra(TREE, HEADS)
PLUS = Hydra(TREE, HEADS, num_layers=2, dropout=0.2, prefix_layer=True, teacher="target")
KEY = jax.random.key(7)
TEXT = np.asarray(jax.random.randint(jax.random.key(1), (2, 13), 0, VOCAB))


@pytest.fixture(scope="module")
def target() -> Target:
    model = dataclasses.replace(build(decoder(WIDTH, 2, 2, 24, 64, VOCAB)), tied_head=False)
    params = drawn(model, jnp.zeros((1, 1), jnp.int32))
    params["embedding"]["table"] *= 200.0  # larger than hidden states, so that heads tell tokens apart
    return Target(params, model)


@functools.partial(jax.jit, static_argnums=0)
def random_params(drafter, target):
    """Not as created: nothing is zero."""
    leaves, structure = jax.tree.flatten(drafter.create(KEY, target))
    keys = jax.random.split(KEY, len(leaves))
    return jax.tree.unflatten(
        structure, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def batch_of(text: np.ndarray) -> dict[str, jax.Array]:
    shape = text[:, 1:].shape
    places = {
        "segments": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(shape[1]), shape),
    }
    tokens = {"tokens": jnp.asarray(text[:, :-1]), "targets": jnp.asarray(text[:, 1:])}
    return {**tokens, **places, "weights": jnp.ones(shape)}


@functools.partial(jax.jit, static_argnums=0)
def says(drafter, params, target, batch):
    """Logits of every head [K, B, T, V], and the target's hidden states."""
    teacher = Teacher(target, batch)
    return jnp.stack([logits for logits, _, _ in drafter.forced(params, teacher, batch)]), teacher.hidden


@functools.partial(jax.jit, static_argnums=0)
def measured(drafter, params, target, batch, key=None):
    return drafter.loss(params, Teacher(target, batch), batch, key)


@pytest.mark.parametrize("drafter", [HYDRA, PLUS], ids=["hydra", "hydra++"])
def test_a_head_depends_on_the_tokens_before_its_own_and_no_later(drafter, target):
    params, t = random_params(drafter, target), 4
    before, _ = says(drafter, params, target, batch_of(TEXT))
    for ahead_of in (1, 2, 3):
        text = TEXT.copy()
        text[:, t + ahead_of] = (text[:, t + ahead_of] + 1) % VOCAB  # x_{t+j}, the j-th token after t
        after, _ = says(drafter, params, target, batch_of(text))
        for k in (1, 2, 3):
            # Head k at t sees x_{t+1} .. x_{t+k}.
            changed = bool(np.any(before[k - 1, :, t] != after[k - 1, :, t]))
            assert changed == (ahead_of <= k), (k, ahead_of)


def test_without_the_embeddings_hydra_is_medusa(target):
    """Rows of R_k and W_k that take the embeddings at 0, those of R_k that take g the identity: the same logits."""
    medusa = Medusa(TREE, HEADS)
    params = random_params(medusa, target)
    same = {}
    for k in range(1, HEADS + 1):
        layer = params[f"head_{k}"]["residual"]["layer_0"]
        below = jnp.zeros((k * WIDTH, WIDTH))
        same[f"head_{k}"] = {
            "layers": {
                "projection": {"kernel": jnp.concatenate([jnp.eye(WIDTH), below]), "bias": jnp.zeros(WIDTH)},
                "layer_0": {"kernel": jnp.concatenate([layer["kernel"], below]), "bias": layer["bias"]},
            },
            "output": params[f"head_{k}"]["output"],
            "bias": jnp.zeros(VOCAB),
        }
    expected, hidden = says(medusa, params, target, batch_of(TEXT))
    np.testing.assert_allclose(says(HYDRA, same, target, batch_of(TEXT))[0], expected, atol=1e-5)
    # And so are the drafts, on every branch: siblings get the same continuations.
    round_ = Round(jnp.asarray([3, 4]), jnp.asarray([6, 6]), None, None)
    drafts = [
        jax.jit(drafter.propose)(own, target, hidden[:, 5], round_)[0].tokens
        for drafter, own in ((medusa, params), (HYDRA, same))
    ]
    assert drafts[0].tolist() == drafts[1].tolist()
    assert drafts[0][:, 3].tolist() == drafts[0][:, 5].tolist()  # (0, 0) and (1, 0)


def prefilled(drafter, params, target, tokens, lengths):
    _, hidden, _ = target.model.apply({"params": target.params}, tokens, lengths, method="prefill")
    prompt = Prompt(tokens, lengths, hidden, jnp.asarray([3, 4]), 32)
    return drafter.init(params, target, prompt)


@pytest.mark.parametrize("drafter", [HYDRA, PLUS], ids=["hydra", "hydra++"])
def test_levels_draft_what_each_path_would_alone(drafter, target):
    """Every node's children are the best guesses of its head along the text that the path spells."""
    params, lengths = random_params(drafter, target), jnp.asarray([6, 6])
    batch = batch_of(TEXT)

    @jax.jit
    def draft(params):
        state = prefilled(drafter, params, target, batch["tokens"], lengths)
        round_ = Round(jnp.asarray([3, 4]), lengths, None, None)
        return drafter.propose(params, target, state, round_)[0].tokens

    tokens = np.asarray(draft(params))
    assert tokens[:, 0].tolist() == [3, 4]
    parents, ranks = TREE.tree.parent, TREE.tree.rank
    for node in np.unique(parents[1:]):
        path = np.flatnonzero(TREE.tree.mask[node])
        text = TEXT.copy()
        text[:, 6 : 6 + len(path)] = tokens[:, path]  # the root is the token after the prompt of 6
        logits = says(drafter, params, target, batch_of(text))[0][len(path) - 1, :, 5]
        best = np.asarray(jax.lax.top_k(logits, 2)[1])
        for child in np.flatnonzero(parents == node):
            assert tokens[:, child].tolist() == best[:, ranks[child]].tolist()
    assert tokens[0, 3] != tokens[0, 5] or tokens[1, 3] != tokens[1, 5]  # (0, 0) and (1, 0) differ


def test_the_prefix_layer_reads_accepted_tokens_as_one_pass_would(target):
    """A prompt, then calls that accept 3, 1, 0 and 2 nodes of a tree whose other nodes hold rubbish."""
    params = random_params(PLUS, target)
    states = jax.random.normal(jax.random.key(5), (2, 12, WIDTH))  # stand for the target's hidden states

    @jax.jit
    def start(lengths):
        zeros = jnp.zeros((2, 12), jnp.int32)
        return PLUS.init(params, target, Prompt(zeros, lengths, states, zeros[:, 0], 32))

    @jax.jit
    def call(state, hidden, path, count):
        draft = Draft(jnp.zeros((2, TREE.size), jnp.int32), TREE.tree)
        accept = Accept(path, count, jnp.zeros((2,), jnp.int32))
        return PLUS.observe(params, target, state, Outcome(draft, accept, None, None, hidden))

    # g after every length, from prompts that end there: one pass over whole prompts.
    expected = np.asarray(jax.vmap(lambda n: start(jnp.full((2,), n)).state)(jnp.arange(1, 13))).swapaxes(
        0, 1
    )
    lengths = np.asarray([4, 5])
    state = start(jnp.asarray(lengths))
    np.testing.assert_allclose(state.state, expected[[0, 1], lengths - 1], atol=1e-5)
    paths = jnp.asarray([[0, 1, 4, 6], [0, 2, 5, 0]])
    for counts in ([3, 2], [1, 3], [0, 1], [2, 0]):
        hidden = 9.0 * jax.random.normal(jax.random.key(sum(counts)), (2, TREE.size, WIDTH))
        for row, count in enumerate(counts):
            new = states[row, lengths[row] : lengths[row] + count]
            hidden = hidden.at[row, paths[row, :count]].set(new)
        state = call(state, hidden, paths, jnp.asarray(counts))
        lengths = lengths + counts
        assert state.cache.length.tolist() == lengths.tolist()
        for row, count in enumerate(counts):
            if count:
                np.testing.assert_allclose(state.state[row], expected[row, lengths[row] - 1], atol=1e-4)


@pytest.mark.parametrize("drafter", [HYDRA, PLUS], ids=["hydra", "hydra++"])
def test_training_gives_the_target_and_its_embedding_no_gradient(drafter, target):
    params, batch = random_params(drafter, target), batch_of(TEXT)

    def loss(params, target):
        return measured(drafter, params, target, batch, KEY)["loss"][0]

    own, frozen = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, target)
    assert all(not np.any(x) for x in jax.tree.leaves(frozen))
    assert all(np.any(x) for x in jax.tree.leaves(own))


def test_losses_by_hand(target):
    """At the start, with g read by the identity and no embeddings, every head is the target: against the text the
    loss is its cross-entropy with labels k further on; against the target, that with the target's own p there."""
    params = jax.jit(HYDRA.create)(KEY, target)
    for k in range(1, HEADS + 1):
        kernel = jnp.concatenate([jnp.eye(WIDTH), jnp.zeros((k * WIDTH, WIDTH))])
        params[f"head_{k}"]["layers"]["projection"]["kernel"] = kernel
    batch = batch_of(TEXT)
    logits, _ = says(HYDRA, params, target, batch)
    log_p = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)  # of the target, as of every head
    text, self_taught = 0.0, 0.0
    for k in (1, 2, 3):
        labels = np.asarray(ahead(batch, k)[0])
        for b, t in np.ndindex(2, 12 - k):
            text -= log_p[b, t, labels[b, t]]
            self_taught -= np.sum(np.exp(log_p[b, t + k]) * log_p[b, t])
    found = measured(HYDRA, params, target, batch)["loss"]
    assert float(found[0]) == pytest.approx(text, rel=1e-5) and float(found[1]) == 2 * 11
    found = measured(Hydra(TREE, HEADS, teacher="target"), params, target, batch)["loss"]
    assert float(found[0]) == pytest.approx(self_taught, rel=1e-5)


def test_dropout_in_training_alone(target):
    params, batch = random_params(PLUS, target), batch_of(TEXT)
    quiet, again = (float(measured(PLUS, params, target, batch)["loss"][0]) for _ in range(2))
    noisy = float(measured(PLUS, params, target, batch, KEY)["loss"][0])
    assert quiet == again != noisy


def test_heads_start_from_the_targets_head(target):
    params = jax.jit(PLUS.create)(KEY, target)
    for k in (1, 2, 3):
        jax.tree.map(np.testing.assert_array_equal, params[f"head_{k}"]["output"], copy_head(target))
        assert params[f"head_{k}"]["layers"]["projection"]["kernel"].shape == ((k + 1) * WIDTH, WIDTH)
    assert set(params["prefix"]) == {"layer_0", "norm"}
    with pytest.raises(UserError, match="3 deep and there are 2 heads"):
        Hydra(TREE, num_heads=2)
