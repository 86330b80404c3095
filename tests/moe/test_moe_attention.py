"""Mixture of attention heads (JetMoE): against ordinary attention, against itself, and step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.moe.attention import MixtureOfAttention
from research.moe.layer import MoE
from research.nn.attention import Attention, Context
from research.nn.masks import Causal, Window
from research.nn.reports import apply_reporting
from research.nn.rotary import Rotary
from research.nn.transformer import Block, scan_params
from research.nn.weights import LowRank

BATCH, LENGTH, WIDTH = 2, 7, 8
EXPERTS, K, HEADS, DIM = 4, 2, 2, 4
INNER = HEADS * DIM
# Sums of at most 32 terms of order 1 in float32, in another order.
CLOSE = dict(rtol=2e-5, atol=2e-6)


def context(segments=None) -> Context:
    return Context(jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH)), segments)


def make(**fields) -> MixtureOfAttention:
    sizes = dict(num_experts=EXPERTS, k=K, num_kv_heads=HEADS, head_dim=DIM, rotary=Rotary())
    return MixtureOfAttention(**sizes | fields)


@functools.lru_cache
def inputs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)


def random_params(experts=EXPERTS) -> dict:
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)

    return {
        "router": {"kernel": 2.0 * normal(WIDTH, experts)},
        "experts": {
            "query": {"kernel": normal(experts, WIDTH, INNER)},
            "output": {"kernel": normal(experts, INNER, WIDTH)},
        },
        "key": {"kernel": normal(WIDTH, INNER)},
        "value": {"kernel": normal(WIDTH, INNER)},
        "bias": normal(1, WIDTH)[0],
    }


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, x=None, segments=None):
    return module.apply({"params": params}, inputs() if x is None else x, context(segments))[0]


def of_one_expert(params, expert=0) -> dict:
    """The parameters of the ordinary attention that an expert is."""
    query, output = (params["experts"][name]["kernel"][expert] for name in ("query", "output"))
    return {
        "query": {"kernel": query},
        "key": params["key"],
        "value": params["value"],
        "output": {"kernel": output, "bias": params["bias"]},
    }


PLAIN = Attention(HEADS, DIM, rotary=Rotary(), output_bias=True)


@pytest.mark.parametrize("rule", [Causal(), Window(3)])
def test_one_expert_is_ordinary_attention(rule):
    params = random_params(1)
    got = run(make(num_experts=1, k=1, rule=rule), params)
    np.testing.assert_allclose(got, run(PLAIN.clone(rule=rule), of_one_expert(params)), **CLOSE)


@pytest.mark.parametrize("norm", ["topk_softmax", "softmax_topk_renorm"])
def test_equal_experts_are_ordinary_attention_whatever_the_router_says(norm):
    """Every slot asks and answers alike, and gates add up to one."""
    params = random_params()
    params["experts"] = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), params["experts"])
    got = run(make(norm=norm), params)
    np.testing.assert_allclose(got, run(PLAIN, of_one_expert(params)), **CLOSE)


def rotated(x: np.ndarray) -> np.ndarray:
    """[T, heads, d]: pairs (i, i + d / 2) turned by position * 10000 ** (-2 i / d)."""
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
    cosines, sines = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)


def test_equation_by_equation():
    """As the paper writes it, token by token in float64: keys and values tiled for the k slots, whose heads come slot
    by slot; the same expert takes the question and the answer."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), random_params())
    want = np.zeros((BATCH, LENGTH, WIDTH))
    for row, x in enumerate(inputs().astype(np.float64)):
        keys = rotated((x @ params["key"]["kernel"]).reshape(LENGTH, HEADS, DIM))
        values = (x @ params["value"]["kernel"]).reshape(LENGTH, HEADS, DIM)
        keys, values = np.tile(keys, (1, K, 1)), np.tile(values, (1, K, 1))
        logits = x @ params["router"]["kernel"]
        chosen = np.argsort(-logits, axis=1)[:, :K]
        gates = np.exp(np.take_along_axis(logits, chosen, axis=1))
        gates /= gates.sum(axis=1, keepdims=True)
        kernels = params["experts"]["query"]["kernel"][chosen]  # [T, k, D, P]
        queries = rotated(np.einsum("td,tkdp->tkp", x, kernels).reshape(LENGTH, K * HEADS, DIM))
        for t in range(LENGTH):
            scores = np.einsum("hd,shd->hs", queries[t], keys[: t + 1]) / np.sqrt(DIM)
            weights = np.exp(scores)
            weights /= weights.sum(axis=1, keepdims=True)
            answers = np.einsum("hs,shd->hd", weights, values[: t + 1]).reshape(K, INNER)
            for slot in range(K):
                output = params["experts"]["output"]["kernel"][chosen[t, slot]]
                want[row, t] += gates[t, slot] * (answers[slot] @ output)
            want[row, t] += params["bias"]
    np.testing.assert_allclose(run(make(), random_params()), want, rtol=1e-4, atol=1e-5)


def test_backends_agree():
    """Forward and gradient of every backend; capacity has room for all tokens."""

    @functools.partial(jax.jit, static_argnums=0)
    def both(backend, params):
        def loss(params):
            y = run(make(dispatch=backend), params)
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return y, gradient

    want = both("dense", random_params())
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(want))
    for backend in ("capacity", "sorted"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            both(backend, random_params()),
            want,
        )


def test_order_of_experts_means_nothing():
    params = random_params()
    order = jnp.asarray([2, 0, 3, 1])
    moved = {
        **params,
        "router": {"kernel": params["router"]["kernel"][:, order]},
        "experts": jax.tree.map(lambda x: x[order], params["experts"]),
    }
    np.testing.assert_allclose(run(make(), moved), run(make(), params), **CLOSE)


def test_dropped_slots_give_nothing():
    """With all tokens bound for experts 0 and 1, and room for 4 of 14 tokens in each, the others get the bias."""
    params = random_params()
    params["router"]["kernel"] = jnp.zeros((WIDTH, EXPERTS))
    y = run(make(capacity_factor=0.1), params).reshape(
        -1, WIDTH
    )  # ceil(0.1 * 2 * 14 / 4) = 1, rounded up to 4
    np.testing.assert_array_equal(y[4:], jnp.broadcast_to(params["bias"], (10, WIDTH)))
    assert (y[:4] != params["bias"]).any(axis=1).all()


def test_padding_counts_nowhere():
    segments = jnp.ones((BATCH, LENGTH), jnp.int32).at[0, 4:].set(0)
    model, params = make(), random_params()
    changed = jnp.asarray(inputs()).at[0, 4:].set(100.0)
    reports = jax.jit(lambda x: apply_reporting(model, {"params": params}, x, context(segments)))
    ((one, _), losses, measured), ((two, _), other_losses, other_measured) = (
        reports(inputs()),
        reports(changed),
    )
    real = np.asarray(segments) > 0
    np.testing.assert_array_equal(np.asarray(one)[real], np.asarray(two)[real])
    assert losses == other_losses
    jax.tree.map(np.testing.assert_array_equal, measured, other_measured)
    assert measured["load"][0].sum() == measured["load"][1] == K * real.sum()


def test_losses_at_uniform_routing():
    """Logits of 0: P_e = 1/4, so E sum_e f_e P_e = 1 whatever f is; logsumexp = ln 4. Its gradient with respect to
    logits is E P_e (f_e - sum f P) / N = (f_e - 1/4) / N with f = (1/2, 1/2, 0, 0): nothing comes from f itself."""
    params = random_params()
    params["router"]["kernel"] = jnp.zeros((WIDTH, EXPERTS))
    model = make(balance_weight=0.01, z_weight=0.001)

    @jax.jit
    def losses(params):
        return apply_reporting(model, {"params": params}, inputs(), context())[1]

    found = losses(params)
    assert found["balance"] == pytest.approx(0.01, rel=1e-6)
    assert found["router_z"] == pytest.approx(0.001 * np.log(4) ** 2, rel=1e-6)
    gradient = jax.grad(lambda p: losses(p)["balance"])(params)["router"]["kernel"]
    x = inputs().reshape(-1, WIDTH)
    want = 0.01 * np.outer(x.mean(axis=0), [0.25, 0.25, -0.25, -0.25])
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-7)


def test_structured_kernels():
    """Low-rank experts: the output of their products; keys and values too."""
    rng = np.random.default_rng(2)
    params = random_params()

    def low(*shape):
        *experts, rows, columns = shape
        sizes = ((*experts, rows, 3), (*experts, 3, columns))
        return LowRank(*(jnp.asarray(rng.normal(size=size) / 2, jnp.float32) for size in sizes))

    params["experts"] = {
        "query": {"kernel": low(EXPERTS, WIDTH, INNER)},
        "output": {"kernel": low(EXPERTS, INNER, WIDTH)},
    }
    params["key"] = {"kernel": low(WIDTH, INNER)}
    plain = jax.tree.map(
        lambda x: x.materialize() if isinstance(x, LowRank) else x,
        params,
        is_leaf=lambda x: isinstance(x, LowRank),
    )
    for backend in ("capacity", "sorted"):
        np.testing.assert_allclose(
            run(make(dispatch=backend), params), run(make(), plain), rtol=1e-4, atol=1e-5
        )


def jetmoe(rules=(Causal(),), experts=EXPERTS, k=K, **fields) -> DecoderLM:  # noqa: B008
    blocks = tuple(
        Block(make(rule=rule, num_experts=experts, k=k), MoE(experts, k, 8, output_bias=True))
        for rule in rules
    )
    return DecoderLM(blocks=blocks, num_layers=2, vocab_size=11, width=WIDTH, max_length=32, **fields)


@functools.lru_cache
def jetmoe_params() -> dict:
    shapes = jax.eval_shape(jetmoe().init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(4)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.7, jnp.float32), shapes)


def random_tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 11, (BATCH, 12))


def test_cached_steps_are_the_full_pass():
    """A padded prompt, single tokens, and a tree of two children, each against the whole sequence; one layer sees all
    tokens, the other keeps a ring of the last ones."""
    model, params, tokens = jetmoe((Causal(), Window(3))), jetmoe_params(), random_tokens()
    variables = {"params": params}
    full = np.asarray(jax.jit(model.apply)(variables, tokens))

    @jax.jit
    def prefill(tokens, lengths):
        cache = model.init_cache(BATCH, 16, margin=4)
        last, _, fresh = model.apply(variables, tokens, lengths, method="prefill")
        return last, cache.commit(fresh, None, lengths)

    @jax.jit
    def step(tokens, cache):
        logits, _, fresh = model.apply(variables, tokens, cache, method="extend")
        return logits, cache.commit(fresh, None, jnp.ones(BATCH, jnp.int32))

    rows, lengths = np.arange(BATCH), np.asarray([5, 3])
    last, cache = prefill(tokens[:, :5], lengths)
    np.testing.assert_allclose(last, full[rows, lengths - 1], rtol=1e-4, atol=1e-5)
    for _ in range(5):
        at = np.asarray(cache.length)
        logits, cache = step(tokens[rows, at][:, None], cache)
        np.testing.assert_allclose(logits[:, 0], full[rows, at], rtol=1e-4, atol=1e-5)
    # Node 0 and its children 1 and 2, of which 2 is the true continuation.
    at = np.asarray(cache.length)[:, None] + np.arange(2)
    true = tokens[rows[:, None], at]
    drafted = np.stack([true[:, 0], (true[:, 1] + 1) % 11, true[:, 1]], axis=1)
    tree = jnp.asarray([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    logits, _, _ = jax.jit(functools.partial(model.apply, method="extend"))(
        variables, drafted, cache, tree, jnp.asarray([0, 1, 1])
    )
    np.testing.assert_allclose(logits[:, [0, 2]], full[rows[:, None], at], rtol=1e-4, atol=1e-5)


def test_cache_holds_the_shared_keys_and_values():
    """2 layers, keys and values, 2 sequences, 16 tokens, P = 8 numbers of 4 bytes each; whatever E and k are."""
    for experts, k in ((4, 2), (8, 3)):
        cache = jax.eval_shape(lambda e=experts, k=k: jetmoe(experts=e, k=k).init_cache(BATCH, 16))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
        assert size == 2 * 2 * BATCH * 16 * INNER * 4


def test_scanned_and_rematerialized_layers():
    """The same logits, reported losses and gradients, all of four routers."""
    tokens, params = random_tokens(), jetmoe_params()

    @functools.partial(jax.jit, static_argnums=0)
    def both(model, params):
        def loss(params):
            logits, losses, _ = apply_reporting(model, {"params": params}, tokens)
            return jnp.mean(jnp.square(logits)) + losses["balance"], losses["balance"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, balance), gradient = both(jetmoe(), params)
    assert (
        0.04 <= balance <= 0.04 * EXPERTS / K
    )  # 0.01 a router: 1 in balance, E / k where two experts take all
    (other, other_balance), stacked = both(jetmoe(scan_layers=True, remat="full"), scan_params(params, 1))
    np.testing.assert_allclose([other, other_balance], [value, balance], rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), stacked, scan_params(gradient, 1)
    )


def test_refused():
    with pytest.raises(UserError, match="k=5: a token goes to between 1 and all 4 experts"):
        make(k=5)
    with pytest.raises(UserError, match="has a span for every head.*give one span for all"):
        make(rule=Window((1, 2, 3, 4)))
    with pytest.raises(UserError, match="experts/query: the parameters have 3 experts, the model 4"):
        params = random_params(3) | {"router": random_params()["router"]}
        run(make(), params)
