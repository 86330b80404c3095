"""UoME: slices of an MLP that are routed to; dense models cut into unions and merged again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.moe.experts import merge_slices, slice_dense
from research.moe.selective_attention import SMHA
from research.moe.union import UoME, dense_model, to_dense, to_union, union_model
from research.nn.accounting import count_flops
from research.nn.attention import Attention, Context
from research.nn.fuse import fuse_projections
from research.nn.mlp import MLP, GatedMLP
from research.nn.norm import RMSNorm
from research.nn.reports import apply_reporting
from research.nn.rotary import Rotary
from research.nn.transformer import Block, scan_params
from tests.programs import call

BATCH, LENGTH, WIDTH, SLICES, UNITS, K = 2, 8, 8, 4, 4, 2
PLAIN = UoME(SLICES, K, UNITS)
GATED = UoME(SLICES, K, UNITS, activation="silu", gated=True, use_bias=False)
WHOLE = jnp.ones((BATCH, LENGTH), jnp.int32)
PADDED = WHOLE.at[1, 5:].set(0)


def places(segments, **fields):
    return Context(jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape), segments, **fields)


def tokens(seed=1):
    return jax.random.normal(jax.random.key(seed), (BATCH, LENGTH, WIDTH))


def random_params(make):
    """Normal values in the shapes that `make` has, without compiling an initialization."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / 3, jnp.float32), jax.eval_shape(make)
    )


@functools.lru_cache
def params(module):
    return random_params(lambda: module.init(jax.random.key(0), tokens(), places(WHOLE))["params"])


def run(module, params, x, segments=WHOLE):
    """-> output, gradient of a sum in which every element counts differently, measurements."""
    return _run(module, params, x, segments)


@functools.partial(jax.jit, static_argnums=0)
def _run(module, params, x, segments):
    def total(params, x):
        y, losses, measured = apply_reporting(module, {"params": params}, x, places(segments))
        assert losses == {}
        return jnp.sum(jnp.sin(y + jnp.arange(WIDTH))), (y, measured)

    gradient, (y, measured) = jax.grad(total, (0, 1), has_aux=True)(params, x)
    return y, gradient, measured


def close(a, b, atol=1e-5):
    """Float32 sums of at most 32 terms of order 1: 32 x 6e-8 of a few units."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), a, b)


@pytest.mark.parametrize("module", [PLAIN, GATED], ids=["plain", "gated"])
def test_all_slices_are_the_dense_mlp(module):
    sliced = params(module)
    dense = merge_slices(sliced["experts"])
    cls = GatedMLP if module.gated else MLP
    whole = cls(SLICES * UNITS, module.activation, module.use_bias)
    if module.use_bias:  # every slice has an output bias: the dense one is their sum
        close(dense["down"]["bias"], sliced["experts"]["down"]["bias"].sum(axis=0))
    apply = jax.jit(module.clone(k=SLICES, dispatch="dense").apply)
    expected = call(whole, dense, tokens())
    close(apply({"params": sliced}, tokens(), places(WHOLE)), expected)
    cut = {"router": sliced["router"], "experts": slice_dense(dense, SLICES)}
    close(apply({"params": cut}, tokens(), places(WHOLE)), expected)


def test_a_set_of_slices_and_its_complement_add_up():
    """A bias of the router that outweighs everything chooses the set; K = 2 of 4, so two of them are all."""
    sliced = params(PLAIN)

    def with_set(chosen):
        router = {**sliced["router"], "bias": jnp.full(SLICES, -100.0).at[jnp.array(chosen)].set(100.0)}
        return run(PLAIN, {**sliced, "router": router}, tokens())[0]

    dense = {"params": merge_slices(sliced["experts"])}
    close(with_set([0, 2]) + with_set([1, 3]), MLP(SLICES * UNITS).apply(dense, tokens()))
    # Slice by slice, in float64.
    x, experts = np.asarray(tokens(), np.float64), jax.tree.map(np.float64, sliced["experts"])
    expected = 0.0
    for e in (0, 2):
        hidden = x @ experts["up"]["kernel"][e] + experts["up"]["bias"][e]
        hidden = np.asarray(jax.nn.gelu(jnp.float32(hidden), approximate=False))
        expected = expected + hidden @ experts["down"]["kernel"][e] + experts["down"]["bias"][e]
    close(with_set([0, 2]), expected)


OPTIONS = {
    "token": {},
    "token with slots": dict(capacity_factor=1.0),
    "ranked": dict(selection="ranked", capacity_factor=0.75),
    "sample": dict(selection="sample"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_way_to_compute_equals_the_dense_oracle(name):
    module = PLAIN.clone(**OPTIONS[name])
    own = run(module, params(module), tokens(), PADDED)
    oracle = run(module.clone(dispatch="dense"), params(module), tokens(), PADDED)
    close(own, oracle)
    y, (gradient, _), measured = own
    assert (y[1, 5:] == 0).all() and (y[1, :5] != 0).any()
    assert (gradient["router"]["kernel"] != 0).any()  # straight through
    dropped, choices = measured["dropped"]
    assert choices == 13 * K and (dropped > 0) == ("capacity_factor" in OPTIONS[name])
    # Padding is nowhere, the gate of a whole sequence included.
    noise = tokens().at[1, 5:].set(7.0)
    np.testing.assert_array_equal(run(module, params(module), noise, PADDED)[0], y)


def test_unit_gates_have_the_same_value_and_leave_the_router_alone():
    y, (gradient, _), _ = run(PLAIN.clone(norm="unit"), params(PLAIN), tokens())
    same, (through, _), _ = run(PLAIN, params(PLAIN), tokens())
    np.testing.assert_array_equal(y, same)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["router"]))
    close(gradient["experts"], through["experts"])


@pytest.mark.parametrize("name", OPTIONS)
def test_who_looks_ahead(name):
    module = PLAIN.clone(**OPTIONS[name])
    changed = tokens().at[:, 6].set(3.0)
    before, after = (np.asarray(run(module, params(module), x, WHOLE)[0]) for x in (tokens(), changed))
    ahead = name in ("ranked", "sample")
    assert (before[:, :6] != after[:, :6]).any() == ahead
    assert (before[:, 6] != after[:, 6]).any()


def test_a_sample_chooses_once():
    module = PLAIN.clone(selection="sample")
    x = jnp.stack([tokens()[0], tokens()[0]]).at[0, 3].set(tokens()[1, 3])
    _, _, measured = run(module, params(module), x)
    load, _ = measured["load"]
    assert set(np.asarray(load).tolist()) <= {0.0, 8.0, 16.0}  # of 8 tokens each, all or none
    message = "selection='sample' was made for sequences of 8 tokens, got 5"
    with pytest.raises(UserError, match=message):
        jax.eval_shape(module.apply, {"params": params(module)}, x[:, :5], places(WHOLE[:, :5]))


def test_flops_are_k_of_n():
    """512 tokens of width 256 through 1024 units, a million operations a token in products. What else is counted
    (router, slots, sums) is below a hundredth of that."""
    x, context = jax.ShapeDtypeStruct((1, 512, 256), jnp.float32), places(jnp.ones((1, 512), jnp.int32))

    def flops(module, *args):
        made = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, *args)["params"], x)
        return count_flops(lambda p, x: module.apply({"params": p}, x, *args), made, x)

    dense = flops(MLP(1024))
    for k in (1, 2, 4):
        sparse = flops(UoME(4, k, 256, capacity_factor=1.0), context)
        assert sparse / dense == pytest.approx(k / 4, abs=0.01)
    assert flops(UoME(4, 2, 256, dispatch="dense"), context) >= dense


def test_with_a_cache_nothing_is_left_out_and_nothing_ahead_is_used():
    """Eight tokens in a call with a cache, of which no slots are counted, are the eight of a call without slots."""
    module = PLAIN.clone(capacity_factor=0.5)
    context = places(WHOLE, length=jnp.array([3, 5]))
    y = jax.jit(lambda: module.apply({"params": params(PLAIN)}, tokens(), context))()
    close(y, run(PLAIN, params(PLAIN), tokens())[0])
    for name in ("ranked", "sample"):
        ahead = PLAIN.clone(**OPTIONS[name])
        with pytest.raises(
            UserError, match=f"selection='{name}' looks at the whole sequence and can't decode"
        ):
            jax.eval_shape(ahead.apply, {"params": params(ahead)}, tokens(), context)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(k=0), "k=0: a token goes to between 1 and all 4 experts"),
        (dict(selection="tokens"), "selection='tokens'; did you mean 'token'"),
        (dict(selection="ranked"), "set capacity_factor"),
        (dict(selection="sample", capacity_factor=1.0), "it has no capacity_factor"),
        (dict(capacity_factor=1.0, dispatch="sorted"), "dispatch='sorted' leaves nothing out"),
        (dict(norm="topk_softmax"), "norm='topk_softmax': slices have weight 1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        PLAIN.clone(**options)


# Dense models made into unions and back.


def decoder(mlp=GatedMLP(16), **attention):  # noqa: B008
    heads = Attention(4, 2, rotary=Rotary(), **attention)
    return DecoderLM(blocks=(Block(heads, mlp),), num_layers=2, vocab_size=16, width=8, max_length=16)


def logits(model, params):
    text = jnp.arange(12).reshape(2, 6) % 7
    return jax.jit(lambda p: model.apply({"params": p}, text))(params)


def test_a_dense_model_is_the_union_of_all_its_slices_and_comes_back():
    model = decoder(mlp=MLP(16), use_bias=True, output_bias=True)
    dense = random_params(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    union = union_model(model, num_experts=4, k=4, k_heads=4, capacity_factor=1.0)
    cut = to_union(dense, num_experts=4, num_heads=4, key=jax.random.key(1))
    fresh = jax.eval_shape(lambda: union.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, fresh)
    close(logits(union, cut), logits(model, dense), 1e-4)  # of order 10
    assert dense_model(union) == model
    # Divided by 4 and added up again, an output bias is the same, bit by bit.
    jax.tree.map(np.testing.assert_array_equal, to_dense(cut), dense)
    routers = [cut[f"layer_{i}"][part]["router"]["kernel"] for i in (0, 1) for part in ("mlp", "attention")]
    assert all((a != b).any() for i, a in enumerate(routers) for b in routers[i + 1 :])
    # Stacked layers are cut alike, and have routers of their own as well.
    stacked = to_union(scan_params(dense, 1), num_experts=4, num_heads=4, key=jax.random.key(1))
    layer = stacked["layers"]["layer_0"]
    kernel = layer["mlp"]["router"]["kernel"]
    assert kernel.shape == (2, 8, 4) and (kernel[0] != kernel[1]).any()
    expected = [cut[f"layer_{i}"]["mlp"]["experts"] for i in (0, 1)]
    jax.tree.map(
        np.testing.assert_array_equal,
        layer["mlp"]["experts"],
        jax.tree.map(lambda *x: jnp.stack(x), *expected),
    )
    jax.tree.map(np.testing.assert_array_equal, to_dense(stacked), scan_params(dense, 1))


def test_fewer_slices():
    (block,) = union_model(decoder(), 4, 2, 3, capacity_factor=1.0).blocks
    assert isinstance(block.attention, SMHA) and isinstance(block.mlp, UoME)
    assert (block.attention.k, block.attention.capacity_factor) == (3, 1.0)
    assert (block.mlp.k, block.mlp.hidden_dim, block.mlp.gated) == (2, 4, True)


def test_what_cannot_be_cut():
    union = union_model(decoder(), 4, 2, 2)
    for make, message in (
        (lambda: union_model(decoder(num_kv_heads=2), 4, 2, 2), "num_kv_heads=2: heads that share keys"),
        (lambda: union_model(decoder(query_norm=RMSNorm()), 4, 2, 2), "SMHA has no query_norm"),
        (lambda: union_model(decoder(mlp=MLP(18)), 4, 2, 2), "18 hidden units do not divide into 4 experts"),
        (lambda: union_model(union, 4, 2, 2), "not of SMHA"),
        (lambda: dense_model(decoder()), "only a union of SMHA and UoME is merged, not Attention"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    shapes = jax.eval_shape(lambda: decoder().init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
    fused = fuse_projections(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes))
    with pytest.raises(UserError, match="fused for decoding"):
        to_union(fused, 4, 4, jax.random.key(0))
