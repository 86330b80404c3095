"""SMHA: both ways to compute it, what it sees, what it costs, and its cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.moe.selective_attention import SMHA, SelectiveCache
from research.nn.accounting import count_flops
from research.nn.attention import Attention, Context
from research.nn.masks import Full, Window
from research.nn.reports import apply_reporting
from research.nn.rotary import Rotary

BATCH, LENGTH, WIDTH, HEADS, DIM, K = 2, 12, 16, 4, 4, 2
SMALL = SMHA(HEADS, DIM, K, rotary=Rotary(), use_bias=True, output_bias=True)


def places(segments=None, batch=BATCH, length=LENGTH):
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return Context(positions, segments)


def random_params(make):
    """Normal values in the shapes that `make` has, without compiling an initialization."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[0]), jnp.float32),
        jax.eval_shape(make),
    )


@functools.lru_cache
def params():
    return random_params(lambda: SMALL.init(jax.random.key(0), tokens(), places())["params"])


def tokens(seed=1):
    return jax.random.normal(jax.random.key(seed), (BATCH, LENGTH, WIDTH))


WHOLE = jnp.ones((BATCH, LENGTH), jnp.int32)
PACKED = jnp.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])  # two documents; one and padding


@functools.partial(jax.jit, static_argnums=0)
def run_reporting(module, params, x, segments):
    """-> output, gradient of a sum in which every element counts differently, reported losses, measurements."""

    def total(params, x):
        (y, _), losses, measured = apply_reporting(module, {"params": params}, x, places(segments))
        return jnp.sum(jnp.sin(y + jnp.arange(WIDTH))), (y, losses, measured)

    gradient, (y, losses, measured) = jax.grad(total, (0, 1), has_aux=True)(params, x)
    return y, gradient, losses, measured


def run(module, params, x, segments=WHOLE):
    """-> output and gradient."""
    return run_reporting(module, params, x, segments)[:2]


def close(a, b, atol=2e-6):
    """Float32 sums of at most 24 terms of order 1: 24 x 6e-8 of a few units."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), a, b)


def test_all_heads_selected_is_multi_head_attention():
    module = SMALL.clone(k=HEADS, norm="unit", dispatch="capacity")
    dense = Attention(HEADS, DIM, rotary=Rotary(), use_bias=True, output_bias=True)
    shared = {name: part for name, part in params().items() if name != "router"}
    y, (own, x_gradient) = run(module, params(), tokens())
    expected, (dense_gradient, x_expected) = run(dense, shared, tokens())
    close(y, expected)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(own.pop("router")))
    close((own, x_gradient), (dense_gradient, x_expected), 1e-5)


def loops(module, params, x, segments):
    """SMHA in float64, head by head and query by query, from the equations -> y and how many choices were taken."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    y, taken = np.zeros_like(x) + params["output"]["bias"], 0
    logits = x @ params["router"]["kernel"] + params["router"]["bias"]
    for row in range(BATCH):
        chosen = np.argsort(-logits[row], axis=-1, kind="stable")[:, :K]
        for head in range(HEADS):
            columns = slice(head * DIM, (head + 1) * DIM)
            mine = [t for t in range(LENGTH) if head in chosen[t] and segments[row, t] > 0]
            if module.capacity_factor == 1.0:  # the running rule, share 1 / 2
                kept = []
                for t in mine:
                    if len(kept) < (t + 2) // 2:  # ceil((t + 1) / 2)
                        kept.append(t)
                mine = kept
            taken += len(mine)

            def project(name, t, columns=columns, row=row):
                return x[row, t] @ params[name]["kernel"][:, columns] + params[name]["bias"][columns]

            def turn(v, place):
                a, b = v[: DIM // 2], v[DIM // 2 :]
                angle = place * 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
                return np.concatenate(
                    [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
                )

            place = {t: number if module.rope_positions == "compact" else t for number, t in enumerate(mine)}
            for t in mine:
                seen = [s for s in mine if s <= t and segments[row, s] == segments[row, t]]
                query = turn(project("query", t), place[t])
                scores = np.array([query @ turn(project("key", s), place[s]) for s in seen]) / np.sqrt(DIM)
                weights = np.exp(scores - scores.max())
                out = sum(w * project("value", s) for w, s in zip(weights / weights.sum(), seen, strict=True))
                y[row, t] += out @ params["output"]["kernel"][columns]
    return y, taken


COMPACT = SMALL.clone(capacity_factor=1.0, rope_positions="compact")
ENCODER = COMPACT.clone(rule=Full())


@pytest.mark.parametrize("module", [SMALL.clone(dispatch="capacity"), COMPACT], ids=["original", "compact"])
def test_compacted_equals_masked_equals_the_loops(module):
    y, *found = run_reporting(module, params(), tokens(), PACKED)
    masked, *others = run_reporting(module.clone(dispatch="dense"), params(), tokens(), PACKED)
    close((y, found), (masked, others), 1e-5)
    expected, taken = loops(module, params(), tokens(), np.asarray(PACKED))
    close(y, expected, 1e-5)
    _, losses, measured = found
    assert losses == {}
    load, choices = measured["load"]
    assert choices == load.sum() == 21 * K  # 21 of the 24 tokens are real
    assert measured["dropped"] == (21 * K - taken, 21 * K)
    assert (taken < 21 * K) == (module is COMPACT)


def test_an_encoders_slots_take_the_largest_gates_in_both():
    close(*(run(m, params(), tokens(), PACKED) for m in (ENCODER, ENCODER.clone(dispatch="dense"))), 1e-5)


@pytest.mark.parametrize("dispatch", ["dense", "capacity"])
def test_flat_tokens_and_fused_projections(dispatch):
    fused = dict(params())
    parts = [fused.pop(name) for name in ("query", "key", "value")]
    fused["qkv"] = {name: jnp.concatenate([part[name] for part in parts], -1) for name in ("kernel", "bias")}
    module = COMPACT.clone(dispatch=dispatch)
    flat = jax.jit(lambda x: module.apply({"params": fused}, x, places(WHOLE))[0])(
        tokens().reshape(-1, WIDTH)
    )
    close(flat.reshape(BATCH, LENGTH, WIDTH), run(COMPACT, params(), tokens())[0])


def test_the_straight_through_gate_has_the_value_1_and_alone_trains_the_router():
    (y, (through, _)), (same, (unit, _)) = (
        run(COMPACT.clone(norm=norm), params(), tokens()) for norm in ("unit_straight_through", "unit")
    )
    np.testing.assert_array_equal(y, same)
    assert (unit["router"]["kernel"] == 0).all()
    assert (through["router"]["kernel"] != 0).any()
    close(through["query"], unit["query"])


@pytest.mark.parametrize("dispatch", ["dense", "capacity"])
def test_nothing_ahead_is_seen(dispatch):
    changed = tokens().at[:, 7].set(3.0).at[:, 9].set(-2.0)

    def outputs(module):
        return (np.asarray(run(module, params(), x)[0]) for x in (tokens(), changed))

    before, after = outputs(COMPACT.clone(dispatch="auto" if dispatch == "capacity" else dispatch))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any()
    # An encoder does look ahead, in what its heads take too: the test can fail.
    before, after = outputs(ENCODER)
    assert (before[:, :7] != after[:, :7]).any()


@pytest.mark.parametrize("module", [COMPACT, ENCODER], ids=["causal", "full"])
def test_padding_is_nowhere(module):
    segments = jnp.array([[1] * 8 + [0] * 4] * BATCH)
    noise = tokens().at[:, 8:].set(5.0)
    a, b = (run(module, params(), x, segments)[0] for x in (tokens(), noise))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[:, 8:], jnp.broadcast_to(params()["output"]["bias"], (BATCH, 4, WIDTH)))


def test_flops_are_k_of_n_of_the_projections_and_its_square_of_the_scores():
    """Sizes at which one part is nearly all of it, so that what else is counted (softmax, rotation, the router's
    2 x 4 per width) stays within a few per cent."""
    shape = jax.ShapeDtypeStruct

    def flops(module, length, width):
        x, context = shape((1, length, width), jnp.float32), places(batch=1, length=length)
        made = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, context)["params"], x)
        return count_flops(lambda p, x: module.apply({"params": p}, x, context)[0], made, x)

    sparse = SMHA(4, 256, 2, rule=Full(), capacity_factor=1.0)
    dense = Attention(4, 256, rule=Full())
    # 8 x 1024 x 1024 for projections, 4 x 16 x 1024 for scores (under 1 %) a token.
    assert flops(sparse, 16, 1024) / flops(dense, 16, 1024) == pytest.approx(1 / 2, rel=0.02)
    # 4 x 2048 x 1024 for scores, 8 x 16 x 1024 (1.5 %) for projections a token.
    assert flops(sparse, 2048, 16) / flops(dense, 2048, 16) == pytest.approx(1 / 4, rel=0.04)
    # Masking computes everything.
    assert flops(sparse.clone(dispatch="dense"), 2048, 16) >= flops(dense, 2048, 16)


@functools.partial(jax.jit, static_argnums=0)
def extend(module, params, x, cache, length, tree, depth):
    context = Context(length[:, None] + depth, length=length, tree=tree)
    return module.apply({"params": params}, x, context, cache)


@jax.jit
def append(cache, fresh, path, length, count):
    rows = jax.tree.map(lambda x: jnp.take_along_axis(x, path[:, None, :, None], axis=2), fresh)
    return cache.append(rows, length, count)


def test_a_cache_gives_what_a_full_pass_gives():
    """A prefix, a tree of which a path is kept, appended rows that are forgotten, more tokens, rows exchanged."""
    module = COMPACT  # whose positions depend on what heads took before
    x = jnp.concatenate([tokens(), tokens(2)], axis=1)[:, :16]
    run_all = jax.jit(lambda x: module.apply({"params": params()}, x, places(length=16)))
    full, rows = run_all(x)
    length = jnp.array([5, 7])
    cache = module.init_cache(BATCH, 20, 0, jnp.float32)
    assert cache.key.shape == (BATCH, HEADS, 10, DIM)  # half of 20 tokens
    everything = jnp.broadcast_to(jnp.arange(16), (BATCH, 16))
    cache = append(cache, rows, everything, jnp.zeros_like(length), length)

    # Nodes 0 - 2 - 3 are the next tokens; 1 and 4 hang off 0 and 2.
    path = jnp.array([[0, 2, 3, 0, 0]] * BATCH)
    at = length[:, None] + jnp.arange(3)
    nodes = tokens(3)[:, :5].at[:, path[0, :3]].set(jnp.take_along_axis(x, at[..., None], axis=1))
    tree, depth = np.eye(5, dtype=bool), jnp.array([0, 1, 1, 2, 2])
    for node, parent in ((1, 0), (2, 0), (3, 2), (4, 2)):
        tree[node] |= tree[parent]
    y, fresh = extend(module, params(), nodes, cache, length, jnp.asarray(tree)[None], depth)
    close(y[:, path[0, :3]], jnp.take_along_axis(full, at[..., None], axis=1), 1e-5)
    # Row 0's node 1: behind five tokens and node 0.
    branch = x.at[0, 6].set(nodes[0, 1])
    again = run_all(branch)[0]
    close(y[0, 1], again[0, 6], 1e-5)

    # All five rows are appended and forgotten before the path is: stale slots must not come back.
    cache = append(cache, fresh, jnp.broadcast_to(jnp.arange(5), (BATCH, 5)), length, jnp.array([5, 5]))
    cache = append(cache, fresh, path, length, jnp.array([3, 1]))
    chain = jnp.tril(jnp.ones((1, 5, 5), bool))
    rest = jnp.array([8, 8])
    y, fresh = extend(module, params(), x[:, 8:13], cache, rest, chain, jnp.arange(5))
    close(y, full[:, 8:13], 1e-5)
    cache = append(cache, fresh, path, rest, jnp.array([1, 1])).select(jnp.array([1, 0]))
    y, _ = extend(module, params(), x[::-1, 9:14], cache, rest + 1, chain, jnp.arange(5))
    close(y, full[::-1, 9:14], 1e-5)


def test_rows_that_a_head_did_not_take_are_not_cached():
    rows = jnp.arange(1.0, 9.0).reshape(1, 2, 4, 1)
    taken = jnp.array([[[1, 0, 1, 0], [0, 1, 1, 1]]], bool)[..., None]
    fresh = (rows, -rows, taken)
    cache = SelectiveCache.empty(1, 3, 2, 1, jnp.float32)
    cache = append(cache, fresh, jnp.arange(4)[None], jnp.array([0]), jnp.array([3]))
    assert cache.key[0, :, :, 0].tolist() == [[1, 3, 0], [6, 7, 0]]  # the fourth row is beyond the count
    assert cache.value[0, :, :, 0].tolist() == [[-1, -3, 0], [-6, -7, 0]]
    assert cache.token[0, :, :2].tolist() == [[0, 2], [1, 2]]
    # Token 2 is replaced by a row that head 0 does not take: its slot is empty, however long the sequence gets.
    cache = append(cache, fresh, jnp.full((1, 4), 1), jnp.array([2]), jnp.array([1]))
    assert cache.key[0, 1, :, 0].tolist() == [6, 6, 0]
    assert cache.read(jnp.array([9]))[3][0].tolist() == [[True, False, False], [True, True, False]]


def test_bad_input():
    for options, message in (
        (dict(k=5), "k=5: a token goes to between 1 and all 4 experts"),
        (dict(rule=Window(4)), "heads of selected tokens take Causal"),
        (dict(norm="softmax_topk"), "norm='softmax_topk': slices have weight 1"),
    ):
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            SMALL.clone(**options)
    encoder = SMALL.clone(rule=Full())
    cache = encoder.init_cache(BATCH, 8, 0, jnp.float32)
    with pytest.raises(UserError, match=r"a cache needs rule=Causal\(\)"):
        jax.eval_shape(encoder.apply, {"params": params()}, tokens(), places(), cache)
