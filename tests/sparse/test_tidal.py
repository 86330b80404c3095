"""TidalDecode and its peers: what is chosen, that chosen rows alone are read, and decoding with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.recall import needle
from research.decoding import engine as engines
from research.decoding.correction import Correction
from research.decoding.generator import Generator
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.cache import DenseCache
from research.nn.masks import Window
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.sparse.gathered import (
    Call,
    attend_chosen,
    attend_chosen_by_kernel,
    gathered,
)
from research.sparse.selectors import EveryLayer, Newest, PagedCache, Quest
from research.sparse.tidal import Tidal, parse_selector, profile, tidal
from research.sparse.traffic import cache_bytes
from tests import programs

BATCH, HEADS, KV, DIM, SLOTS = 2, 4, 2, 4, 12
LENGTHS = np.array([11, 2])
# Root 0 with children 1 and 2, and 3 below 1.
TREE = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], bool)
PROMPTS = [[3, 9, 2, 3, 9, 1, 7], [8]]


def call(tree=TREE, page=None) -> Call:
    """A layer's call, slots behind the lengths holding large keys that must not be seen."""
    rng, count = np.random.default_rng(0), len(tree)
    rows = {name: rng.normal(size=(BATCH, KV, n, DIM)) for name, n in (("old", SLOTS), ("new", count))}
    beyond = np.arange(SLOTS) >= LENGTHS[:, None]
    key = np.where(beyond[:, None, :, None], 1e4, rows["old"])
    old, fresh = (
        tuple(x.astype(np.float32) for x in (k, rows[n][..., ::-1]))
        for k, n in ((key, "old"), (rows["new"], "new"))
    )
    cache = DenseCache(*old)
    if page is not None:

        @jax.jit
        def paged(*rows):
            empty = PagedCache.of(DenseCache(*map(jnp.zeros_like, rows)), page)
            return empty.append(rows, np.zeros(BATCH, np.int32), LENGTHS)

        cache = jax.tree.map(np.asarray, paged(*old))
    query = rng.normal(size=(BATCH, HEADS, count, DIM)).astype(np.float32)
    mask = np.broadcast_to(tree, (BATCH, 1, *tree.shape))
    places = (LENGTHS, None, mask)
    return Call(query, (cache.key, cache.value), fresh, *places, 0.5, 2.0, cache)


def of_call(function, c: Call):
    """function(c) in one program. What are not arrays is static, as in a model."""
    static = dict(scale=c.scale, softcap=c.softcap, on_cpu=c.on_cpu)
    return jax.jit(lambda c: function(c._replace(**static)))(c._replace(**dict.fromkeys(static)))


def by_hand(c: Call) -> np.ndarray:
    """float64 scores [B, H, N, S + N] of all slots and new tokens, -inf where they are not seen."""
    key = np.concatenate([c.cached[0], c.fresh[0]], axis=2).astype(np.float64)
    raw = np.einsum("bhnd,bhsd->bhns", np.asarray(c.query, np.float64), np.repeat(key, HEADS // KV, axis=1))
    scores = 2.0 * np.tanh(raw * 0.5 / 2.0)
    held = np.broadcast_to(
        np.arange(c.slots) < LENGTHS[:, None, None], (BATCH, len(c.fresh_mask[0, 0]), c.slots)
    )
    seen = np.concatenate([held, np.asarray(c.fresh_mask[:, 0])], axis=-1)
    return np.where(seen[:, None], scores, -np.inf)


def sets(choice) -> list[set[int]]:
    """The chosen of every row, set and token; nobody twice."""
    found = []
    for row in np.asarray(choice).reshape(-1, choice.shape[-1]):
        real = row[row >= 0].tolist()
        assert len(set(real)) == len(real)
        found.append(set(real))
    return found


@functools.cache
def trained(num_layers=5, **attention):
    fields = dict(num_heads=HEADS, num_kv_heads=KV, head_dim=DIM, rotary=Rotary()) | attention
    block = Block(Attention(**fields), GatedMLP(16))
    model = DecoderLM(blocks=(block,), num_layers=num_layers, vocab_size=12, width=8, max_length=32)
    params = programs.drawn(model, jnp.zeros((1, 2), jnp.int32))
    sharp = lambda x: jnp.asarray(4 * np.asarray(x)) if x.ndim > 1 else x  # noqa: E731  (far from uniform)
    return model, jax.tree.map(sharp, params)


@functools.cache
def prefilled():
    """The cache behind prompts of unequal lengths."""
    model, params = trained()
    lengths = LENGTHS

    @jax.jit
    def prefill():
        tokens = np.arange(22).reshape(2, 11) % 12
        _, _, fresh = model.apply({"params": params}, tokens, lengths, method="prefill")
        return model.init_cache(2, 16).commit(fresh, None, lengths)

    return prefill()


@functools.partial(jax.jit, static_argnums=0)
def extend(model, params, cache):
    """Logits and fresh rows of the tree's tokens."""
    new, depth = np.array([[3, 1, 4, 1], [5, 9, 2, 6]]), np.array([0, 1, 1, 2])
    logits, _, fresh = model.apply({"params": params}, new, cache, jnp.asarray(TREE), depth, method="extend")
    return logits, fresh


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("per", ["head", "group"])
def test_the_greatest_are_chosen_and_nothing_else_is_read(per, on_cpu):
    c, k = call()._replace(on_cpu=on_cpu), 5
    scores = by_hand(c)

    def attended(c):
        whole, choice = c.attend(k, per)
        plain, other = attend_chosen(c, choice), attend_chosen(c, choice[..., ::-1])
        return (
            (whole, choice, c.greatest(k, per)),
            plain,
            other,
            attend_chosen_by_kernel(c, choice, "reference"),
        )

    (whole, choice, again), out, other, by_kernel = of_call(attended, c)
    rank = scores if per == "head" else scores.reshape(BATCH, KV, HEADS // KV, *scores.shape[2:]).max(2)
    rank = rank.copy()
    for token in range(len(TREE)):
        rank[:, :, token, SLOTS + token] = np.inf  # oneself always
    expected = []
    for row in rank.reshape(-1, rank.shape[-1]):
        expected.append({int(i) for i in np.argsort(-row)[:k] if row[i] > -np.inf})
    assert sets(choice) == expected
    assert min(map(len, expected)) == 3 < k  # the root behind two tokens sees no more
    np.testing.assert_array_equal(again, choice)

    # Masked: the softmax of all scores with -inf off the choice, times all values.
    index = np.repeat(np.asarray(choice), HEADS // choice.shape[1], axis=1)
    kept = (index[..., None] == np.arange(scores.shape[-1])).any(-2)
    value = np.concatenate([c.cached[1], c.fresh[1]], axis=2).astype(np.float64)
    for found, masked in ((whole, scores), (out, np.where(kept, scores, -np.inf))):
        weights = np.exp(masked - masked.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("bhns,bhsd->bhnd", weights, np.repeat(value, HEADS // KV, axis=1))
        np.testing.assert_allclose(found, expected, atol=2e-6)  # float32, at most 15 terms of order 1
    np.testing.assert_allclose(by_kernel, out, atol=2e-6)
    # In any order. Sums of five terms may round differently.
    np.testing.assert_allclose(other, out, atol=1e-6)


def test_newest_tokens_and_pages():
    # Window of 3 behind 1 sink. Token 3 has ancestors 0 and 1; token 0 itself and slots 10, 9; with 2 slots: 1 and the
    # sink, slot 0, which counts once.
    found = sets(of_call(lambda c: Newest(4, sinks=1).choose(c), call()))
    new = SLOTS + np.arange(4)
    row = [{0, new[0], 10, 9}, {0, new[0], new[1], 10}, {0, new[0], new[2], 10}, {0, new[0], new[1], new[3]}]
    short = [{0, new[0], 1}, {0, new[0], new[1], 1}, {0, new[0], new[2], 1}, {0, new[0], new[1], new[3]}]
    assert found == row * KV + short * KV

    # Pages of 3 of 12 slots: 11 tokens fill three and begin the fourth, in which the new one is.
    c = call(np.ones((1, 1), bool), page=3)
    key, query = (np.asarray(x, np.float64) for x in (c.cached[0], c.query))
    pages = key.reshape(BATCH, KV, 4, 3, DIM)
    np.testing.assert_array_equal(c.cache.least[0, :, :3], pages[0, :, :3].min(2))
    np.testing.assert_array_equal(c.cache.greatest[0, :, :3], pages[0, :, :3].max(2))
    found = sets(of_call(lambda c: Quest(6, page=3).choose(c), c))
    for head in range(HEADS):
        q = query[0, head, 0]
        corners = np.maximum(q * pages[0, head // 2].min(1), q * pages[0, head // 2].max(1)).sum(-1)
        best = int(np.argmax(corners[:3]))
        assert found[head] == {9, 10, SLOTS, *range(3 * best, 3 * best + 3)}
    assert found[HEADS:] == [{0, 1, SLOTS}] * HEADS


def test_bounds_forget_what_was_rolled_back():
    rows = lambda *values: (np.array(values, np.float32).reshape(1, 1, -1, 1),) * 2  # noqa: E731
    at = lambda n: np.array([n], np.int32)  # noqa: E731

    @jax.jit
    def run(first, then):
        zero = jnp.zeros((1, 1, 8, 1))
        cache = PagedCache.of(DenseCache(zero, zero), 2).append(first, at(0), at(5))
        return cache.append(then, at(2), at(2))  # back to two tokens

    cache = jax.tree.map(np.asarray, run(rows(1, 2, 9, 9, 9), rows(3, 4)))
    np.testing.assert_array_equal(cache.greatest[0, 0, :2, 0], [2, 4])
    np.testing.assert_array_equal(cache.least[0, 0, :2, 0], [1, 3])


def test_enough_tokens_are_all_and_few_change_only_later_layers():
    model, params = trained()
    logits, fresh = extend(model, params, prefilled())
    whole, same = gathered(model, params, Tidal(32, select=1, reselect=3, per="group"))
    assert same is params
    # The sums of 15 terms of a softmax in another order, through five layers.
    np.testing.assert_allclose(extend(whole, params, prefilled())[0], logits, atol=5e-5)
    sparse, _ = tidal(model, params, Tidal(3, select=1, reselect=3))
    few, rows = extend(sparse, params, prefilled())
    for layer in range(3):  # what enters layer 2 is what the full layers 0 and 1 made
        for own, whole in zip(rows[layer], fresh[layer], strict=True):
            np.testing.assert_allclose(own, whole, atol=1e-5)  # their attentions add in different orders
    assert not np.allclose(rows[3][0], fresh[3][0], atol=1e-3)
    assert not np.allclose(few, logits, atol=1e-2)


@pytest.mark.parametrize(
    "selector",
    [
        Tidal(4, select=1, reselect=3),
        Tidal(4, select=1, per="group"),
        EveryLayer(4, dense=1),
        Newest(4, sinks=1, dense=1),
        Quest(4, page=2, dense=1),
    ],
    ids=str,
)
def test_kernels_decode_the_same_tokens(selector, monkeypatch):
    model, params = trained()

    def program(*implementation) -> tuple[str, tuple]:
        found = gathered(model, params, selector, *implementation)
        cache = found[0].init_cache(1, 16)
        token = np.zeros((1, 1), int)
        step = jax.jit(lambda p, cache: found[0].apply({"params": p}, token, cache, method="extend"))
        return step.lower(params, cache).as_text(), found

    text, kernels = program()
    plain, xla = program("xla")
    chooses = isinstance(selector, Tidal | EveryLayer)
    assert ("lathe_select_attention" in text) == chooses and "lathe_listed_attention" in text
    assert "lathe_tree_attention" in text and "lathe_tree_attention" in plain  # full layers as ever
    assert "select_attention" not in plain and "listed_attention" not in plain
    monkeypatch.setenv("LATHE_CPU_KERNELS", "off")
    assert "lathe" not in program()[0]
    monkeypatch.undo()
    tokens = decoded(*kernels)
    assert tokens == decoded(*xla) != decoded(model, params)


def decoded(*model) -> list:
    return Generator(*model).generate(PROMPTS, max_new_tokens=9).samples


def test_a_choice_is_for_one_call():
    model, params = trained()
    sparse = tidal(model, params, Tidal(3, select=1))[0]
    # What decoding keeps has no place for a choice.
    assert jax.tree.structure(sparse.init_cache(1, 8)) == jax.tree.structure(model.init_cache(1, 8))


def test_bytes_read():
    model, params = trained()
    cache = jax.eval_shape(lambda: model.init_cache(1, 20))

    def read(selector, tokens=1):
        return cache_bytes(*gathered(model, params, selector), cache, tokens)

    row = DIM * 4  # bytes of a key of a head
    dense = 5 * 2 * KV * 20 * row
    assert cache_bytes(model, params, cache) == dense == 6_400
    # Three full layers, then 3 of 20 slots in each of two, for keys and values of every query head.
    assert read(Tidal(3, select=1, reselect=3)) == 3 * 2 * KV * 20 * row + 2 * 2 * HEADS * 3 * row == 4_608
    assert read(Tidal(3, select=1, reselect=3, per="group")) == 3_840 + 2 * 2 * KV * 3 * row
    # Every layer reads all keys before it knows.
    assert read(EveryLayer(3, dense=1)) == 2 * KV * 20 * row + 4 * (KV * 20 + 2 * HEADS * 3) * row
    assert read(Newest(3, sinks=1, dense=1)) == 2 * KV * 20 * row + 4 * 2 * KV * 3 * row
    # Two bounds for each of 5 pages.
    quest = gathered(model, params, Quest(4, page=4, dense=1))
    cache = jax.eval_shape(lambda: quest[0].init_cache(1, 20))
    assert cache_bytes(*quest, cache) == 2 * KV * 20 * row + 4 * (2 * KV * 5 + 2 * HEADS * 4) * row


def test_decoding_with_correction(monkeypatch):
    model, params = trained(num_layers=3)
    corrected = []

    def compiled(engine, method, *args):
        program = original(engine, method, *args)
        if method != "correct":
            return program

        def correct(weights, state, since):
            before = jax.tree.map(np.array, state.cache)
            state, since = program(weights, state, since)
            corrected.append((before, *jax.tree.map(np.array, (state.cache, state.tokens, state.count))))
            return state, since

        return correct

    original = engines.compiled
    monkeypatch.setattr(engines, "compiled", compiled)
    dense = Generator(model, params).generate(PROMPTS, max_new_tokens=9)
    found = {}
    for k in (2, 32):
        sparse = tidal(model, params, Tidal(k, select=0))
        generator = Generator(*sparse, correction=Correction(model, every=3))
        found[k] = generator.generate(PROMPTS, max_new_tokens=9).samples
    assert found[32] == dense.samples != found[2]

    assert len(corrected) == 2 * 2  # 8 calls: after 3 and after 6
    before, cache, output, count = corrected[1]
    tokens = np.zeros((2, 16), np.int32)
    for row, prompt in enumerate(PROMPTS):
        own = prompt + output[row, : count[row] - 1].tolist()
        assert len(own) == cache.length[row] == len(prompt) + 6
        tokens[row, : len(own)] = own
    _, _, fresh = programs.call(model, params, tokens, np.asarray(cache.length), method="prefill")
    # Entries of order 5 behind layers whose weights are four times their usual size: 1e-4 is rounding.
    wrong = 0
    for layer, (key, value) in enumerate(fresh):
        for row, length in enumerate(cache.length):
            own, stale = cache.layers[layer], before.layers[layer]
            for clean, now, was in ((key, own.key, stale.key), (value, own.value, stale.value)):
                expected = np.asarray(clean)[row, :, :length]
                np.testing.assert_allclose(now[row, :, :length], expected, atol=1e-4)
                wrong = max(wrong, np.abs(was[row, :, :length] - expected).max())
    assert wrong > 1e-2  # there was something to correct


def test_the_layer_to_select_again_is_profiled(tmp_path):
    model, params = trained(num_layers=3)
    data = needle(16, pairs=2, keys=4, values=4, fillers=4, split="test", size=4)
    found = profile(model, params, Tidal(2, select=0), data, data.prompt - 1, batch_size=4)
    assert set(found.accuracy) == {1} and 0.0 <= found.accuracy[1] <= 1.0
    found = dataclasses.replace(found, accuracy={1: 0.5, 2: 0.75, 3: 0.75})
    found.save(tmp_path / "selector.json")
    assert parse_selector(str(tmp_path / "selector.json")) == found.best == Tidal(2, select=0, reselect=2)


def test_mistakes_are_told():
    model, params = trained()
    window = model.clone(
        blocks=(
            model.blocks[0].clone(attention=model.blocks[0].attention.clone(rule=Window(4))),
            *model.blocks,
        )
    )
    for call_, message in (
        (lambda: Tidal(0), "k=0"),
        (lambda: Tidal(4, select=2, reselect=2), "the second selection lies above the first"),
        (
            lambda: tidal(window, params, Tidal(4, select=2)),
            "layer 2 can't select.*1, 3 attend to all tokens",
        ),
        (lambda: tidal(model, params, Tidal(4, select=5)), "layer 5 can't select"),
        (lambda: tidal(model, params, Tidal(4, select=4)), "no layer of this DecoderLM is left"),
        (lambda: gathered(*tidal(model, params, Tidal(4)), Tidal(4)), "has a selector already"),
        (lambda: Quest(4).choose(call()), "not whole pages of 16"),
        (
            lambda: Quest(3, page=3).choose(call(page=3)),
            "chooses for one token a call, and a draft has 4",
        ),
        (lambda: Newest(4, sinks=4), "leave no window"),
        (lambda: parse_selector("tidle:k=4"), "did you mean tidal"),
        (lambda: parse_selector("tidal:k=4,selct=1"), "did you mean select"),
        (lambda: parse_selector("tidal:k=some"), "k=some: a whole number"),
        (lambda: parse_selector("quest"), "quest needs k"),
        (lambda: parse_selector("absent.json"), "absent.json: No such file"),
        (
            lambda: attend_chosen_by_kernel(call(), jnp.zeros((2, 4, 4, 1), jnp.int32), None),
            "xla runs everywhere",
        ),
        (lambda: Correction(model, 0), "at least 1 is expected"),
    ):
        with pytest.raises(UserError, match=message):
            call_()
    roles = [block.role for block in tidal(window, params, Tidal(4, select=1))[0].blocks]
    assert roles == ["full", "select", "full", "reuse", "full"]
