"""The MoE layer: what it reduces to, what never matters, in a decoder, and on 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import build, load_config, of
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.moe.inspection import router_agreement, routings
from research.moe.layer import MoE
from research.nn.attention import Attention, Context
from research.nn.mlp import MLP, GatedMLP
from research.nn.reports import apply_reporting
from research.nn.transformer import Block, scan_params
from research.training.figures import draw_figures
from research.training.optimizers import adamw, constant
from research.training.partitioning import batch_sharding, make_mesh, parameter_shardings
from research.training.stages import Stage
from research.training.task import LanguageModelling
from research.training.workdir import open_workdir
from tests.programs import call, drawn

B, T, D, F, E, K = 2, 7, 8, 12, 4, 2
# Sums of at most 24 products of order 1 in float32, in another order, through two products.
CLOSE = dict(rtol=2e-5, atol=2e-6)
DISPATCHES = ("dense", "capacity", "sorted")
SEGMENTS = np.asarray([[1, 1, 1, 1, 0, 0, 0], [1, 1, 2, 2, 2, 2, 0]])


def context(segments=None) -> Context:
    return Context(np.broadcast_to(np.arange(T), (B, T)), segments)


def moe(**fields) -> MoE:
    return MoE(**dict(num_experts=E, k=K, hidden_dim=F) | fields)


def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def params(layer: MoE) -> dict:
    """New ones, which a test may change. Biases are not 0."""
    return jax.tree.map(np.array, drawn(layer, x(), context(), seed=1))


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, params, x, segments=None):
    return apply_reporting(layer, {"params": params}, x, context(segments))


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("gated", [True, False])
def test_one_expert_is_the_dense_layer(dispatch, gated):
    layer = moe(num_experts=1, k=1, dispatch=dispatch, gated=gated, activation="gelu", use_bias=True)
    tree = params(layer)
    dense = GatedMLP(F, "gelu", use_bias=True) if gated else MLP(F)
    expected = call(dense, jax.tree.map(lambda y: y[0], tree["experts"]), x())
    np.testing.assert_allclose(apply(layer, tree, x())[0], expected, **CLOSE)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_equal_experts_are_the_dense_layer_whatever_the_router_says(dispatch):
    layer = moe(dispatch=dispatch)
    tree = params(layer)
    tree["experts"] = jax.tree.map(lambda y: np.broadcast_to(y[:1], y.shape), tree["experts"])
    expected = call(GatedMLP(F), jax.tree.map(lambda y: y[0], tree["experts"]), x())
    np.testing.assert_allclose(apply(layer, tree, x())[0], expected, **CLOSE)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_the_order_of_experts_does_not_matter(dispatch):
    layer, order = moe(dispatch=dispatch, router_bias=True), np.asarray([2, 0, 3, 1])
    tree = params(layer)
    permuted = {
        "router": jax.tree.map(lambda y: y[..., order], tree["router"]),
        "experts": jax.tree.map(lambda y: y[order], tree["experts"]),
    }
    ours, losses, measured = apply(layer, tree, x())
    theirs, other_losses, other = apply(layer, permuted, x())
    np.testing.assert_allclose(ours, theirs, **CLOSE)
    np.testing.assert_allclose(losses["balance"], other_losses["balance"], rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(measured["load"][0])[order], other["load"][0])


@pytest.mark.parametrize("dispatch", [*DISPATCHES, "capacity 1"])
def test_padding_never_matters(dispatch):
    factor = 1.0 if dispatch == "capacity 1" else None
    layer = moe(dispatch=dispatch.split()[0], capacity_factor=factor, balance="gshard", z_weight=0.1)
    tree = params(layer)
    real = (SEGMENTS > 0)[..., None]
    y, losses, measured = apply(layer, tree, x(), SEGMENTS)
    other = apply(layer, tree, np.where(real, x(), 100.0 * x()[::-1]), SEGMENTS)
    jax.tree.map(np.testing.assert_array_equal, (y, losses, measured), other)
    np.testing.assert_array_equal(np.where(real, 0.0, y), 0.0)
    assert float(measured["load"][1]) == K * real.sum()


def test_what_is_dropped_gets_nothing_but_the_shared_expert():
    layer = moe(capacity_factor=0.1, k=1, shared=GatedMLP(4))  # ceil(0.1 * 14 / 4) = 1, rounded up to 4 slots
    tree = params(layer)
    tree["router"]["kernel"][:] = 0  # all choose expert 0
    y, _, measured = apply(layer, tree, x())
    y, shared = (np.reshape(part, (-1, D)) for part in (y, call(GatedMLP(4), tree["shared"], x())))
    assert tuple(map(float, measured["dropped"])) == (10.0, 14.0)
    np.testing.assert_array_equal(y[4:], shared[4:])
    assert (y[:4] != shared[:4]).any(axis=1).all()


def test_shared_experts_are_added_and_gated():
    plain, layer = moe(), moe(shared=GatedMLP(4), gate_shared=True, output_bias=True)
    tree = params(layer)
    tree["bias"] = np.arange(D, dtype=np.float32)
    gate = 1 / (1 + np.exp(-x() @ tree["shared_gate"]["kernel"]))
    expected = np.asarray(apply(plain, {name: tree[name] for name in ("router", "experts")}, x())[0])
    expected = expected + gate * call(GatedMLP(4), tree["shared"], x()) + tree["bias"]
    np.testing.assert_allclose(apply(layer, tree, x())[0], expected, **CLOSE)


def test_reports():
    layer = moe(balance="switch", balance_weight=0.5, z_weight=2.0)
    tree = params(layer)
    tree["router"]["kernel"][:] = 0
    _, losses, measured = apply(layer, tree, x(), SEGMENTS)
    # Equal probabilities: E f P = 1 whatever the choices, logsumexp = ln 4, entropy ln 4; experts 0 and 1 have all.
    np.testing.assert_allclose(losses["balance"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(losses["router_z"], 2 * np.log(4) ** 2, rtol=1e-6)
    means = {name: np.asarray(total) / np.asarray(weight) for name, (total, weight) in measured.items()}
    np.testing.assert_allclose(means.pop("load"), [0.5, 0.5, 0, 0])
    expected = {"max_over_mean": 2.0, "entropy": np.log(4), "dropped": 0, "router_non_finite": 0}
    assert means == pytest.approx(expected)
    tree["router"]["kernel"][:, 1] = np.nan
    assert apply(layer, tree, x(), np.ones_like(SEGMENTS))[2]["router_non_finite"] == (14.0, 56.0)
    assert apply(moe(balance_weight=0.0), tree, x())[1] == {}


def decoder(mlp: MoE, num_layers: int = 2, **fields) -> DecoderLM:
    block = Block(Attention(num_heads=2, head_dim=4), mlp)
    return DecoderLM(vocab_size=16, width=D, max_length=16, num_layers=num_layers, blocks=(block,), **fields)


TOKENS = np.arange(2 * 6).reshape(2, 6) * 5 % 16


@pytest.fixture(scope="module")
def tree() -> dict:
    return drawn(decoder(moe()), TOKENS)


@pytest.mark.parametrize("dispatch", ["sorted", "capacity"])
def test_decoding_step_by_step_is_the_whole_sequence(dispatch, tree):
    model = decoder(moe(dispatch=dispatch))
    whole = np.asarray(call(model, tree, TOKENS))

    @jax.jit
    def step(tokens, cache):
        logits, _, fresh = model.apply({"params": tree}, tokens, cache, method="extend")
        return logits[:, 0], cache.commit(fresh, None, jnp.ones(2, jnp.int32))

    cache = jax.jit(lambda: model.init_cache(2, 8))()
    for t in range(TOKENS.shape[1]):
        logits, cache = step(TOKENS[:, t : t + 1], cache)
        np.testing.assert_allclose(logits, whole[:, t], rtol=1e-4, atol=1e-4)


def test_decoding_drops_nothing(tree):
    small, none = decoder(moe(capacity_factor=0.1)), decoder(moe(dispatch="sorted"))

    def run(model):
        extend = lambda: model.apply({"params": tree}, TOKENS, model.init_cache(2, 8), method="extend")[0]  # noqa: E731
        return jax.jit(extend)(), call(model, tree, TOKENS)

    (decoded, whole), (other, reference) = run(small), run(none)
    np.testing.assert_array_equal(decoded, other)
    assert not np.allclose(whole, reference)


@functools.partial(jax.jit, static_argnums=1)
@jax.value_and_grad
def loss(params, model):
    logits, losses, _ = apply_reporting(model, {"params": params}, TOKENS)
    return jnp.sum(jnp.sin(logits)) + losses["balance"]


scanned = jax.jit(functools.partial(scan_params, period=1))


@pytest.mark.parametrize("scan, remat", [(True, "full"), (False, "dots")])
def test_scan_and_remat_change_nothing(scan, remat, tree):
    plain, gradient = loss(tree, decoder(moe()))
    value, other = loss(scanned(tree) if scan else tree, decoder(moe(), scan_layers=scan, remat=remat))
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    expected = scanned(gradient) if scan else gradient
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), other, expected)


@pytest.mark.parametrize(
    "fields", [dict(dispatch="capacity"), dict(capacity_factor=1.0), dict(dispatch="sorted")]
)
def test_eight_devices_compute_what_one_does(fields, tree):
    """Experts over 4 groups of devices, records over all 8: loss, loads and gradients, and each kernel divided by 4."""
    task = LanguageModelling(decoder(moe(**fields), num_layers=1))
    tree = {name: leaves for name, leaves in tree.items() if name != "layer_1"}
    tokens = np.arange(8 * 6, dtype=np.int32).reshape(8, 6) * 7 % 16
    batch = {
        "tokens": tokens,
        "targets": tokens[:, ::-1],
        "positions": np.broadcast_to(np.arange(6, dtype=np.int32), (8, 6)),
        "segments": np.ones((8, 6), np.int32),
        "target_bytes": np.ones((8, 6), np.int32),
        "weights": np.ones((8, 6), np.float32),
    }
    batch["segments"][3, 4:] = 0

    def run(sizes):
        mesh = make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values()]))])
        shardings = parameter_shardings(tree, mesh)
        placed = jax.device_put(tree, shardings)
        rows = jax.device_put(batch, batch_sharding(mesh))

        def objective(params):
            metrics = task.loss(params, rows, jax.random.key(0))
            return metrics["loss"][0], metrics

        with jax.set_mesh(mesh):
            found = jax.jit(jax.grad(objective, has_aux=True))(placed)
        return found, placed["layer_0"]["mlp"]["experts"]["up"]["kernel"].addressable_shards[0].data.shape

    one, _ = run({"data": 1})
    eight, shape = run({"data": 2, "expert": 4})
    assert shape == (1, D, F)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), eight, one)


def test_experts_that_do_not_divide_over_the_axis():
    tree = {"mlp": {"experts": {"up": {"kernel": jax.ShapeDtypeStruct((6, D, F), jnp.float32)}}}}
    with pytest.raises(UserError, match=r"mlp/experts/up/kernel .* 6 is not a multiple of 4 \(expert\)"):
        parameter_shardings(tree, make_mesh({"expert": 4, "data": 2}))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(k=5), "k=5: a token goes to between 1 and all 4 experts"),
        (dict(num_experts=0), "num_experts=0: there must be at least 1 expert"),
        (dict(capacity_factor=0.0), "capacity_factor=0.0: experts need a capacity above 0"),
        (dict(dispatch="sorted", capacity_factor=1.0), "dispatch='sorted' drops nothing"),
        (dict(gate_shared=True), "gate_shared weighs the output of `shared`, and there is none"),
    ],
)
def test_mistakes_are_told_when_the_layer_is_made(fields, message):
    with pytest.raises(UserError, match=message):
        moe(**fields)
    with pytest.raises(UserError, match=message):
        build(of(MoE, **dict(num_experts=E, k=K, hidden_dim=F) | fields))


def test_parameters_of_another_number_of_experts():
    tree = params(moe(num_experts=8))
    tree["router"] = params(moe())["router"]
    with pytest.raises(
        UserError, match="experts/gate: the parameters have 8 experts, the model 4; .*upcycle"
    ):
        apply(moe(), tree, x())


def test_the_tiny_config_trains_and_measures_its_load(tmp_path):
    config = load_config("configs/smoe.py:tiny")
    model = config.task.model
    model.width, model.num_layers, model.vocab_size, model.max_length = 8, 2, 4096, 16
    model.blocks[0].mlp.hidden_dim, model.blocks[0].attention.head_dim = 8, 2
    optimizer = of(adamw, schedule=of(constant, peak=1e-3))
    config.stages = (of(Stage, name="pretrain", steps=2, batch_size=4, optimizer=optimizer, accumulate=2),)
    config.data.length = config.evaluators[0].data.length = 16
    config.evaluators[0].batches = 1
    config.checkpoint_every = 1
    trainer = build(config)
    with open_workdir(tmp_path / "run", config) as workdir:
        final = trainer.run(workdir, progress=False, devices=jax.devices()[:1])
    assert final["train/loss"] == pytest.approx(
        final["train/cross_entropy"] + final["train/balance"] + final["train/router_z"], rel=1e-5
    )
    assert final["validation/layer_1/mlp/dropped"] == 0
    experts = 2 * 8 * 3 * 8 * 8
    assert final["validation/parameters"] - final["validation/active_parameters"] == experts * 3 // 4
    assert {path.name for path in draw_figures(workdir.path)} == {"loss.png", "load.png"}
    shares = router_agreement(workdir.path, TOKENS)
    assert list(shares) == ["layer_0/mlp", "layer_1/mlp"]
    assert all(step == 2 and 0.5 < share <= 1 for ((step, share),) in shares.values())  # one step of 1e-3


def test_routings_are_those_of_every_layer_scanned_or_not(tree):
    found = jax.jit(functools.partial(routings, decoder(moe())))(tree, TOKENS)
    assert list(found) == ["layer_0/mlp", "layer_1/mlp"]
    assert found["layer_1/mlp"].index.shape == (TOKENS.size, K)
    again = jax.jit(functools.partial(routings, decoder(moe(), scan_layers=True)))(scanned(tree), TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    dense = decoder(GatedMLP(F))
    with pytest.raises(UserError, match="no layer of DecoderLM routes its tokens"):
        jax.eval_shape(functools.partial(routings, dense), drawn(dense, TOKENS), TOKENS)
