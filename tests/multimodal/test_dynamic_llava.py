"""Dynamic-LLaVA: three ways of decoding agree, dropped tokens are gone, and what training adds by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.multimodal.dynamic_llava import (
    DynamicTraining,
    PolicyAttention,
    Sparsity,
    decode_without_cache,
    dynamic,
)
from research.nn.attention import Attention
from research.nn.attention_kernels import DenseAttention
from research.nn.cache import DenseCache
from research.nn.masks import Causal, Window
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.sparse.pruned_cache import PrunedCache
from research.sparse.tokens import hard_gumbel_keep, select_tokens, take_tokens
from research.training.stepwise import stepwise_logits

VOCAB, LENGTH, PROMPT, IMAGE = 20, 24, 12, (1, 8)
SPARSITY = Sparsity(IMAGE, layer=1, image_rate=0.4, width=8, heads=2, depth=1)
NEVER = np.iinfo(np.int32).max


def plain(rule=Causal()) -> DecoderLM:  # noqa: B008
    block = Block(Attention(num_heads=2, head_dim=4, num_kv_heads=1, rotary=Rotary(), rule=rule), None)
    return DecoderLM(vocab_size=VOCAB, width=8, max_length=LENGTH, blocks=(block,), num_layers=2)


@functools.cache
def made():
    """A decoder and what it becomes, with kernels large enough that tokens matter to each other."""
    model = plain()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 8**0.5, x.dtype), shapes)
    sparse, own = dynamic(model, params, jax.random.key(1), SPARSITY)
    loud = lambda x: jnp.asarray(3.0 * np.asarray(x)) if x.ndim > 1 else x  # noqa: E731
    return model, params, sparse, jax.tree.map(loud, own)


def rows() -> tuple[np.ndarray, ...]:
    tokens = np.random.default_rng(2).integers(0, VOCAB, (2, LENGTH), np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones_like(tokens), np.full((2,), PROMPT, np.int32)


@functools.cache
def policy():
    sparse, own = made()[2:]
    run = jax.jit(lambda *x: sparse.apply({"params": own}, *x, method="policy_logits"))
    return [np.asarray(x) for x in run(*rows())]


def test_a_policy_decodes_as_a_cache_does():
    """Masks at full length, the tokens taken out and cached one by one: the same logits behind every answer token."""
    _, _, sparse, own = made()
    logits, image, text = policy()
    assert image.sum(axis=1).tolist() == [3, 3]  # int(0.4 * 8)
    assert 0 < text[:, PROMPT:].sum() < 2 * (LENGTH - PROMPT)
    stepwise = jax.jit(functools.partial(stepwise_logits, sparse, prompt=PROMPT))(own, rows()[0])
    # Float32 rounding of sums of 24 terms of order 1.
    np.testing.assert_allclose(stepwise, logits[:, PROMPT:], rtol=1e-4, atol=1e-4)


def test_decoding_without_a_cache():
    """Rows of unequal lengths: the last token's logits are those under the policy, on as many tokens as are kept."""
    _, _, sparse, own = made()
    logits, _, text = policy()
    lengths = np.asarray([LENGTH, LENGTH - 5])
    found, held = map(np.asarray, decode_without_cache(sparse, own, rows()[0], lengths, rows()[3], bucket=4))
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(found[row], logits[row, length - 1], rtol=1e-4, atol=1e-4)
        # System and question 4, image 3, kept answers and the last token.
        assert held[row] == 4 + 3 + text[row, PROMPT : length - 1].sum() + 1


def test_cache_lengths_and_positions():
    _, _, sparse, own = made()
    tokens, _, _, prompt = rows()
    text = policy()[2]

    @jax.jit
    def run(tokens):
        _, hidden, fresh = sparse.apply({"params": own}, tokens[:, :PROMPT], prompt, method="prefill")
        cache = sparse.init_cache(2, LENGTH + 4).commit(fresh, None, prompt)
        logits, _, fresh = sparse.apply(
            {"params": own}, tokens[:, PROMPT : PROMPT + 4], cache, method="extend"
        )
        return hidden, cache, cache.commit(fresh, None, jnp.full((2,), 4)), logits

    hidden, cache, longer, logits = run(tokens)
    below, above = cache.layers
    assert below.key.shape[2] == LENGTH + 4 and above.key.shape[2] == LENGTH + 4 - 5
    chosen = [np.flatnonzero(np.asarray(row).any(axis=1)) for row in hidden]
    for row in range(2):
        held = np.asarray(above.index[row])
        assert held[held < NEVER].tolist() == chosen[row].tolist() and len(chosen[row]) == 4 + 3
        later = np.asarray(longer.layers[1].index[row])
        kept = PROMPT + np.flatnonzero(text[row, PROMPT : PROMPT + 4])
        assert later[later < NEVER].tolist() == [*chosen[row].tolist(), *kept.tolist()]
    assert longer.length.tolist() == [PROMPT + 4] * 2
    # Four tokens at once see of each other what they see one by one.
    np.testing.assert_allclose(logits, policy()[0][:, PROMPT : PROMPT + 4], rtol=1e-4, atol=1e-4)


def test_a_pruned_cache_by_hand():
    cache = jax.jit(lambda: PrunedCache.of(DenseCache.empty(1, 8, 1, 1, jnp.float32), 2))()
    append, read = jax.jit(PrunedCache.append), jax.jit(PrunedCache.read)
    assert cache.key.shape == (1, 1, 6, 1)

    def fresh(values, places):
        rows = np.asarray(values, np.float32)[None, None, :, None]
        return rows, -rows, np.asarray(places, np.int32)[None, None, :, None]

    def held(cache, length):
        key, value, index, valid = map(np.asarray, read(cache, np.asarray([length])))
        assert (value == -key).all()
        seen = valid[0]
        return key[0, 0, seen, 0].tolist(), index[0, seen].tolist()

    zero, one, two, three, four = (np.asarray([n]) for n in range(5))
    cache = append(cache, fresh([10, 11, 12, 13], [0, -1, 2, 3]), zero, three)
    assert held(cache, 3) == ([10, 12], [0, 2])  # token 1 dropped, token 3 beyond the count
    cache = append(cache, fresh([14], [0]), three, one)
    assert held(cache, 4) == ([10, 12, 14], [0, 2, 3])
    # Rolled back to two tokens, then a dropped one and a kept one: nothing of before comes back.
    assert held(cache, 2) == ([10], [0])
    cache = append(cache, fresh([20, 21], [-1, 1]), two, two)
    assert held(cache, 4) == ([10, 21], [0, 3])
    # Rows of a path whose end is not accepted.
    cache = append(cache, fresh([30, 30], [0, 0]), four, one)
    assert held(jax.jit(PrunedCache.select)(cache, zero), 5) == ([10, 21, 30], [0, 3, 4])


def test_nothing_dropped_is_the_dense_model():
    model, params, sparse, own = made()
    kept = dict(image_keep=np.ones((2, IMAGE[1])), text_keep=np.ones((2, LENGTH)))

    @jax.jit
    def run(tokens, *places):
        policed = sparse.apply({"params": own}, tokens, *places, **kept, method="policy_logits")[0]
        dense = model.apply({"params": {name: own[name] for name in params}}, tokens)
        return policed, sparse.apply({"params": own}, tokens), dense

    policed, called, dense = run(*rows())
    np.testing.assert_allclose(policed, dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(called, dense)


def test_a_dropped_token_reaches_itself_alone():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 2, 5, 3)).astype(np.float32) for _ in range(3))
    kept = np.asarray([[1.0, 0.0, 1.0, 0.0, 1.0]], np.float32)
    options = dict(segments=None, prefix=None, scale=0.5, softcap=None)

    @jax.jit
    def outputs(value):
        out = lambda value, eps=0.0: PolicyAttention(kept, eps)(query, key, value, Causal(), **options)  # noqa: E731
        reach = jax.jacobian(lambda value: out(value).sum(axis=(0, 1, 3)))(value)
        return out(value), out(value, 0.1), reach

    out, smooth, reach = map(np.asarray, outputs(value))
    # Query 3, by hand: keys 0, 2 and itself.
    seen = np.array([0, 2, 3])
    scores = np.exp(0.5 * np.einsum("hd,hkd->hk", query[0, :, 3], key[0][:, seen]))
    expected = np.einsum("hk,hkd->hd", scores / scores.sum(axis=1, keepdims=True), value[0][:, seen])
    np.testing.assert_allclose(out[0, :, 3], expected, rtol=1e-5)
    assert (
        (reach[:, 0, 0, :, 0] != 0)
        == np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 0, 1]])
    ).all()
    # With eps: (w + eps / 5) / (sum w + eps) over visible keys, dropped ones included.
    scores = 0.5 * np.einsum("hd,hkd->hk", query[0, :, 2], key[0][:, :3])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True)) * [1, 0, 1]
    shares = (weights + 0.1 / 5) / (weights.sum(axis=1, keepdims=True) + 0.1)
    np.testing.assert_allclose(smooth[0, :, 2], np.einsum("hk,hkd->hd", shares, value[0][:, :3]), rtol=1e-5)
    # A policy of ones is dense attention, with grouped queries, a cap and padding too.
    segments = np.asarray([[1, 1, 2, 2, 0]])
    options = dict(segments=segments, prefix=None, scale=0.5, softcap=2.0)

    @jax.jit
    def both(query, key, value):
        kernels = PolicyAttention(np.ones((1, 5), np.float32), 0.0), DenseAttention()
        return [kernel(query, key, value, Causal(), **options) for kernel in kernels]

    every, dense = map(np.asarray, both(query, key[:, :1], value[:, :1]))
    np.testing.assert_allclose(every[:, :, :4], dense[:, :, :4], rtol=1e-5, atol=1e-6)
    assert (every[:, :, 4] == 0).all()


def test_a_draw_is_hard_and_its_gradient_soft():
    logits = np.asarray([[0.3, -0.2], [-1.0, 1.0], [2.0, 0.0], [0.0, 0.5]], np.float32)

    @jax.jit
    def run(logits, key):
        keep = lambda x: hard_gumbel_keep(x, 0.7, key)  # noqa: E731
        soft = jax.nn.softmax((jax.nn.log_softmax(logits) + jax.random.gumbel(key, logits.shape)) / 0.7)[:, 0]
        value, gradient = jax.value_and_grad(lambda x: keep(x).sum())(logits)
        return keep(logits), value, gradient, soft, keep(jnp.broadcast_to(logits[1], (4000, 2)))

    kept, drawn, gradient, soft, many = map(np.asarray, run(logits, jax.random.key(3)))
    assert set(kept.tolist()) == {0.0, 1.0} and drawn == int(drawn)
    # d p / d z0 = p (1 - p) / tau, and log_softmax adds what is the same for both.
    np.testing.assert_allclose(gradient[:, 0], soft * (1 - soft) / 0.7, rtol=1e-5)
    np.testing.assert_allclose(gradient[:, 0], -gradient[:, 1], rtol=1e-4)
    # softmax([-1, 1])[0] = 0.1192, with a standard error of 0.005.
    assert float(many.mean()) == pytest.approx(0.1192, abs=0.02)


def test_selected_tokens_keep_their_order_and_positions():
    scores = np.asarray([[3.0, 9.0, 1.0, 9.0], [5.0, 4.0, 3.0, 2.0]], np.float32)

    @jax.jit
    def run(scores, mask, positions):
        index, there = select_tokens(scores, 2, mask)
        return index, there, *take_tokens(scores[..., None], positions, index)

    mask = np.asarray([[True] * 4, [False, False, False, True]])
    index, there, x, positions = map(np.asarray, run(scores, mask, np.asarray([[10, 11, 12, 13]] * 2)))
    assert index.tolist()[0] == [1, 3] and index.tolist()[1][0] == 3
    assert there.tolist() == [[True, True], [True, False]]
    assert positions[0].tolist() == [11, 13] and x[0, :, 0].tolist() == [9.0, 9.0]


def test_the_loss_and_the_temperature_by_hand():
    sparse, own = made()[2:]
    task = DynamicTraining(model=sparse, least=10, updates=200)
    temperature = jax.jit(task.temperature)
    assert float(temperature(100)) == pytest.approx(0.1**0.5)
    assert float(temperature(300)) == pytest.approx(0.1)
    tokens, positions, segments, prompt = rows()
    # The second answer has 7 tokens and so is kept whole.
    segments[1, PROMPT + 7 :] = 0
    answer = (np.arange(LENGTH) >= PROMPT) & (segments > 0)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "positions": positions,
        "segments": segments,
        "prompt": prompt,
        "weights": answer.astype(np.float32),
        "target_bytes": np.zeros_like(tokens),
    }
    state, key = {"model": own, "updates": jnp.asarray(100)}, jax.random.key(5)
    draw, tau = jax.random.split(key)[0], 0.1**0.5

    @jax.jit
    def run(own):
        def loss(own):
            metrics = task.loss({**state, "model": own}, batch, key)
            return metrics["loss"][0], metrics

        places = (tokens, positions, segments, prompt, tau, draw, 10)
        drawn = sparse.apply({"params": own}, *places, method="policy_logits")
        return jax.value_and_grad(loss, has_aux=True)(own), drawn

    ((_, metrics), gradient), (_, image, text) = jax.tree.map(np.asarray, run(own))
    mean = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    image_rate = 100 * np.mean((0.4 - image.mean(axis=1)) ** 2)
    text_rate = 100 * (0.5 - text[0, PROMPT:].mean()) ** 2 / 2
    assert mean["image_rate"] == pytest.approx(image_rate, rel=1e-5)
    assert mean["text_rate"] == pytest.approx(text_rate, rel=1e-5, abs=1e-6)
    assert mean["loss"] == pytest.approx(mean["cross_entropy"] + image_rate + text_rate, rel=1e-5)
    assert mean["text_kept"] == pytest.approx(text[0, PROMPT:].mean())
    for name in ("image_predictor", "text_predictor", "layer_0", "layer_1"):
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient[name]) if leaf.ndim > 1), name
    assert task.remember(state, metrics)["updates"] == 101


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparsity((1, 8), image_rate=0.1), "that leaves at least one"),
        (lambda: Sparsity((1, 8), layer=0), "at least one layer sees everything"),
        (lambda: Sparsity((1, 8), width=18, heads=3), "not a multiple of 4"),
        (lambda: dynamic(made()[2], made()[3], jax.random.key(0), SPARSITY), "DynamicLM is not a DecoderLM"),
        (lambda: dynamic(plain(), {}, jax.random.key(0), Sparsity((1, 8))), "layer 2 of 2"),
        (lambda: dynamic(plain(Window(4)), {}, jax.random.key(0), SPARSITY), "must be causal attention"),
        (lambda: made()[2].init_cache(1, 8), "8 tokens can't hold an image in places 1 to 8"),
        (lambda: DynamicTraining(model=made()[2], updates=0), "at least one update"),
    ],
)
def test_bad_input(make, message: str):
    with pytest.raises(UserError, match=message):
        make()
