"""Mamba-2 in a decoder: steps and trees are the whole sequence; segments and rejected drafts leave no trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.generator import Generator
from research.decoding.speculative.draft_model import DraftModel
from research.decoding.speculative.pearl import Pearl
from research.decoding.speculative.prompt_lookup import PromptLookup
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention, Context
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block, scan_params
from research.ssm.mamba2 import Mamba2
from research.ssm.recurrent import RecurrentCache
from tests.programs import call, drawn

VOCAB, WIDTH = 12, 16
TOKENS = np.array([[1, 5, 3, 8, 2, 9, 4], [7, 7, 1, 0, 2, 2, 3]])


@functools.cache
def hybrid():
    """A Mamba-2 layer below an attention layer, whose keys tell what the states have become."""
    mamba = Mamba2(num_heads=4, head_dim=8, state_dim=8, num_groups=2, chunk=4)
    attention = Attention(num_heads=2, head_dim=8, rotary=Rotary())
    blocks = tuple(Block(mixer, GatedMLP(hidden_dim=24)) for mixer in (mamba, attention))
    model = DecoderLM(blocks=blocks, num_layers=2, vocab_size=VOCAB, width=WIDTH, max_length=40)
    params = drawn(model, TOKENS)
    sharp = lambda x: jnp.asarray(3 * np.asarray(x)) if x.ndim > 1 else x  # noqa: E731  (far from uniform)
    return model, jax.tree.map(sharp, params)


@functools.cache
def _whole():
    return jax.jit(lambda params, *args, **places: hybrid()[0].apply({"params": params}, *args, **places))


def whole(tokens, params=None, **places):
    """Padded on the right, which a causal model does not see, and by a row: one program for all."""
    params = hybrid()[1] if params is None else params
    count, length = np.shape(tokens)
    pad = lambda y: np.pad(y, ((0, 2 - count), (0, 24 - length)))  # noqa: E731
    logits = _whole()(params, pad(tokens), **{name: pad(y) for name, y in places.items()})
    return np.asarray(logits)[:count, :length]


def close(got, expected):
    np.testing.assert_allclose(
        got, expected, rtol=1e-4, atol=1e-4
    )  # logits of size 10, two layers in float32


def states(cache):
    return [layer for layer in cache.layers if isinstance(layer, RecurrentCache)]


@jax.jit
def read(cache, length):
    return [layer.read(length) for layer in states(cache)]


rollback = jax.jit(lambda cache, length: cache.rollback(length))
reversible = jax.jit(lambda cache, margin: cache.reversible(margin), static_argnums=1)


@functools.cache
def step():
    """Reads up to 3 tokens, of which count[b] are committed."""
    model, params = hybrid()

    def run(tokens, cache, count):
        logits, _, fresh = model.apply({"params": params}, tokens, cache, method="extend")
        return logits, cache.commit(fresh, None, count)

    return jax.jit(run)


def test_steps_are_the_whole_sequence_and_can_be_taken_back():
    """3 + 1 + 3 tokens, all but the first call with a margin of 4; then back by 4 and 1, and forth again."""
    model, _ = hybrid()
    cache, at, logits, behind = model.init_cache(2, 16), 0, [], {}
    assert [layer.state.size for layer in states(cache)] == [2 * 4 * 8 * 8]
    for size in (3, 1, 3):
        padded = np.pad(TOKENS[:, at : at + size], ((0, 0), (0, 3 - size)))
        part, cache = step()(padded, cache, np.full(2, size))
        logits.append(np.asarray(part)[:, :size])
        at += size
        cache = reversible(cache, 4) if at == 3 else cache
        behind[at] = jax.tree.map(np.asarray, read(cache, cache.length))
    close(np.concatenate(logits, axis=1), whole(TOKENS))
    assert [layer.state.size for layer in states(cache)] == [5 * 2 * 4 * 8 * 8]  # whatever was read
    three = np.full(2, 3, np.int32)
    found = read(rollback(cache, three), three)
    jax.tree.map(np.testing.assert_array_equal, found, behind[3])  # to the bit
    back = rollback(cache, np.array([3, 6], np.int32))
    part, again = step()(np.stack([TOKENS[0, 3:6], TOKENS[1, [6, 0, 0]]]), back, np.array([3, 1]))
    part = np.asarray(part)
    close(part[0], whole(TOKENS)[0, 3:6])
    close(part[1, :1], whole(TOKENS)[1, 6:])
    found = read(again, again.length)
    for new, old in zip(found, behind[7], strict=True):  # row 1 read its last token beside two others
        np.testing.assert_allclose(np.asarray(new[1])[1], old[1][1], rtol=1e-4, atol=1e-5)  # up to 1


def test_prefill_of_unequal_lengths():
    model, params = hybrid()
    lengths = np.array([7, 4])

    @jax.jit
    def run(params):
        last, _, fresh = model.apply({"params": params}, TOKENS, lengths, method="prefill")
        cache = model.init_cache(2, 16).commit(fresh, None, lengths)
        return last, model.apply({"params": params}, TOKENS[:, 4:5], cache, method="extend")[0]

    last, following = map(np.asarray, run(params))
    close(last, np.stack([whole(TOKENS)[0, 6], whole(TOKENS)[1, 3]]))
    close(following[1, 0], whole(TOKENS)[1, 4])


LENGTHS = np.array([7, 4])


def prefill(params, cache, counts):
    """Of two rows, 7 and 4 tokens long -> logits behind them, and the cache with the first `counts` tokens."""
    last, _, fresh = hybrid()[0].apply({"params": params}, TOKENS, LENGTHS, method="prefill")
    return last, cache.commit(fresh, None, counts)


@pytest.fixture(scope="module")
def read_prompts():
    """(by the kernel, without it): compiled forms of `prefill`."""
    jitted = jax.jit(prefill)
    shapes = jax.tree.map(jnp.asarray, (hybrid()[1], hybrid()[0].init_cache(2, 16), LENGTHS))
    with pytest.MonkeyPatch.context() as patch:
        kernel = jitted.lower(*shapes)
        patch.setenv("LATHE_CPU_KERNELS", "off")
        plain = jax.jit(lambda *args: prefill(*args)).lower(*shapes)
    assert "lathe_ssd_mixer" in kernel.as_text() and "lathe_ssd_mixer" not in plain.as_text()
    return kernel.compile(), plain.compile()


@pytest.mark.parametrize("counts", [LENGTHS, np.array([5, 4]), np.array([1, 0])], ids=str)
@pytest.mark.parametrize("full", [False, True], ids=("empty", "full"))
def test_a_prompt_by_the_kernel_leaves_the_same_cache(read_prompts, counts, full):
    """Also of fewer tokens than were read, and on top of a cache that is not empty."""
    cache = hybrid()[0].init_cache(2, 16)
    if full:
        cache = read_prompts[1](hybrid()[1], cache, np.array([2, 3]))[1]
    kernel, plain = (program(hybrid()[1], cache, counts) for program in read_prompts)
    close(*(np.asarray(last) for last, _ in (kernel, plain)))
    for found, right in zip(states(kernel[1]), states(plain[1]), strict=True):
        np.testing.assert_allclose(found.state, right.state, atol=2e-5 * float(np.max(np.abs(right.state))))
        np.testing.assert_allclose(found.conv, right.conv, atol=1e-6)


def test_a_reversible_cache_takes_a_prompt_of_the_kernel():
    """The states behind each of the last tokens are those of shorter prompts."""
    model, params = hybrid()

    @jax.jit
    def run(params, lengths):
        cache = reversible(model.init_cache(2, 16), 3)
        return prefill(params, cache, lengths)[1]

    cache = run(params, LENGTHS)
    for back in range(4):
        found = read(cache, LENGTHS - back)
        right = read(run(params, LENGTHS - back), LENGTHS - back)
        for pair in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(*pair, atol=1e-5)


def test_a_prompt_of_the_kernel_is_committed_in_its_order():
    model, params = hybrid()

    def run(path):
        _, _, fresh = model.apply({"params": params}, TOKENS, LENGTHS, method="prefill")
        return model.init_cache(2, 16).commit(fresh, path, jnp.minimum(LENGTHS, path.shape[1]))

    for size in (1, 3, 7):
        with pytest.raises(UserError, match="committed in their order, without a path"):
            jax.eval_shape(run, jnp.zeros((2, size), jnp.int32))


@pytest.mark.parametrize("sizes, taken", [({}, True), ({"head_dim": 6}, False), ({"state_dim": 512}, False)])
def test_the_kernel_is_taken_for_the_sizes_that_it_computes(sizes, taken):
    mamba = Mamba2(**dict(num_heads=4, head_dim=8, state_dim=8) | sizes)
    u, places = jnp.zeros((1, 3, WIDTH)), Context(jnp.zeros((1, 3), jnp.int32))
    params = jax.eval_shape(mamba.init, jax.random.key(0), u, places)
    assert ("lathe_ssd_mixer" in jax.jit(mamba.apply).lower(params, u, places).as_text()) == taken


def test_gradients_are_those_without_the_kernel(monkeypatch):
    model, params = hybrid()

    def loss(params):
        segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
        return jnp.sum(jnp.sin(model.apply({"params": params}, TOKENS, None, segments)))

    kernel = jax.jit(jax.grad(loss))(params)
    monkeypatch.setenv("LATHE_CPU_KERNELS", "off")
    plain = jax.jit(jax.grad(lambda params: loss(params)))(params)
    for found, right in zip(jax.tree.leaves(kernel), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-4 * float(np.max(np.abs(right))) + 1e-6)


def test_a_tree_scores_every_path_and_commits_one():
    """Behind two tokens: 0 -> 1 -> 3 and 0 -> 2 -> 4; the second path is kept."""
    model, params = hybrid()
    paths = {0: [0], 1: [0, 1], 2: [0, 2], 3: [0, 1, 3], 4: [0, 2, 4]}
    tree, nodes = np.zeros((5, 5), bool), np.array([[3, 6, 1, 0, 9]])
    for node, path in paths.items():
        tree[node, path] = True
    depth, last = np.array([0, 1, 1, 2, 2]), np.array([[5]])

    @jax.jit
    def run(params):
        apply = functools.partial(model.apply, {"params": params})
        _, _, fresh = apply(TOKENS[:1, :2], np.array([2]), method="prefill")
        cache = model.init_cache(1, 16).commit(fresh, None, np.array([2]))
        logits, _, fresh = apply(nodes, cache, tree, depth, method="extend")
        kept = cache.commit(fresh, np.array([[0, 2, 4]]), np.array([3]))
        return logits, apply(last, kept, method="extend")[0]

    logits, behind = map(np.asarray, run(params))
    for node, path in paths.items():
        row = np.concatenate([TOKENS[:1, :2], nodes[:, path]], axis=1)
        close(logits[:, node], whole(row)[:, -1])
    row = np.concatenate([TOKENS[:1, :2], nodes[:, [0, 2, 4]], last], axis=1)
    close(behind, whole(row)[:, -1:])


def test_drafts_change_no_token():
    """Rejected drafts of a hybrid model leave its states alone; prompts of unequal lengths, rows of one batch."""
    prompts = [[1, 2, 3, 1, 2, 3], [4]]
    outputs = []
    for options in ({}, {"proposer": PromptLookup(num_tokens=4)}):
        result = Generator(*hybrid(), **options).generate(prompts, max_new_tokens=20)
        outputs.append([sample.tokens for sample in result.samples])
    assert outputs[0] == outputs[1]
    # Beside itself, for which no other program is needed.
    alone = Generator(*hybrid()).generate(prompts[1:] * 2, max_new_tokens=20).samples[0].tokens
    assert alone == outputs[0][1]
    row = np.asarray([prompts[1] + alone[:-1]])
    assert alone == np.argmax(whole(row)[0], -1).tolist()


def test_segments_do_not_meet():
    segments = np.array([[1, 1, 1, 2, 2, 2, 2]] * 2)
    positions = np.array([[0, 1, 2, 0, 1, 2, 3]] * 2)
    logits = whole(TOKENS, positions=positions, segments=segments)
    close(logits[:, :3], whole(TOKENS[:, :3]))
    close(logits[:, 3:], whole(TOKENS[:, 3:]))


def test_scanned_layers_are_the_same():
    model, params = hybrid()
    scanned = model.clone(scan_layers=True)
    close(call(scanned, jax.jit(functools.partial(scan_params, period=2))(params), TOKENS), whole(TOKENS))


def test_a_recurrent_draft_takes_back_what_was_rejected():
    """Calls are as many as drafts from the draft's own greedy text explain: its states are those of the kept text."""
    model, params = hybrid()
    normal = np.random.default_rng(5).standard_normal
    other = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.1 * np.std(x) * normal(x.shape), x.dtype), params
    )
    prompt, gamma, new = [1, 2, 3, 1], 3, 16

    def greedy(text, count, params):
        for _ in range(count):
            row = np.zeros((2, 24), np.int32)  # the shape of `whole`
            row[0, : len(text)] = text
            text = text + [int(np.argmax(np.asarray(_whole()(params, row))[0, len(text) - 1]))]
        return text

    text = greedy(prompt, new, params)
    gained = []
    while (known := 1 + sum(gained)) < new:
        start = len(prompt) + known
        guess = greedy(text[:start], gamma, other)[start:]
        right = next((i for i, token in enumerate(guess) if text[start:][i : i + 1] != [token]), gamma)
        gained.append(min(right + 1, new - known))
    assert len(set(gained[:-1])) > 1  # some drafts were taken back, and some kept
    for proposer in (DraftModel(model, gamma), Pearl(model, gamma)):
        drafted = Generator(model, params, proposer=proposer, proposer_params=other)
        result = drafted.generate([prompt], max_new_tokens=new)
        assert result.samples[0].tokens == text[len(prompt) :]
        if isinstance(proposer, DraftModel):
            assert result.stats.gained == tuple(gained.count(k + 1) for k in range(gamma + 1))


def test_a_state_without_a_margin_can_not_be_rolled_back():
    with pytest.raises(UserError, match="keeps a state, not tokens.*`reversible`"):
        hybrid()[0].init_cache(1, 8).rollback(jnp.zeros(1, jnp.int32))


def test_mistakes_are_told():
    with pytest.raises(UserError, match="num_heads=4 is not a multiple of num_groups=3"):
        Mamba2(num_heads=4, num_groups=3)
    with pytest.raises(UserError, match="conv_width=1"):
        Mamba2(num_heads=4, conv_width=1)
