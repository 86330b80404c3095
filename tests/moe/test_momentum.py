"""Momentum through depth: closed forms by hand, the plain residual bit for bit, and every way to run a stack alike.

After two layers of sums of at most 24 terms, programs that order sums differently agree to about
100 * 2 ** -24 = 6e-6 of values of order 1, hence `close`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.moe.layer import MoE
from research.moe.momentum import Adam, HeavyBall, Momentum, MomentumBlock, robust_momentum
from research.nn.attention import Attention, Context
from research.nn.masks import Full
from research.nn.mlp import MLP, GatedMLP
from research.nn.norm import LayerNorm
from research.nn.reports import apply_reporting
from research.nn.rotary import Rotary
from research.nn.transformer import Block, LayerStack, scan_params
from research.training.task import cast_floats
from research.vision.vit import ViT
from tests.programs import call, drawn, scaled

VOCAB, WIDTH, LENGTH, LAYERS = 24, 8, 6, 2
TOKENS = jax.random.randint(jax.random.key(0), (2, LENGTH), 1, VOCAB)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
exactly = np.testing.assert_array_equal

ROBUST = robust_momentum(kappa=20.0, smoothness=2.0)
PLAIN = HeavyBall(mu=0.0, gamma=1.0)


# Stacks without attention, whose FFNs are known functions, against arithmetic by hand.


class NoMixing(nn.Module):
    """Attention that adds nothing."""

    def __call__(self, x, context, cache=None):
        return jnp.zeros_like(x), ()


class Identity(nn.Module):
    def __call__(self, x):
        return x


class Given(nn.Module):
    """An FFN whose output, one vector, is its parameter."""

    @nn.compact
    def __call__(self, x):
        u = self.param("u", nn.initializers.normal(1.0), (x.shape[-1],))
        return jnp.broadcast_to(u, x.shape).astype(x.dtype)


class Springs(nn.Module):
    """u = -s x with a stiffness of its own for every coordinate."""

    stiffness: tuple[float, ...]

    def __call__(self, x):
        return -jnp.asarray(self.stiffness) * x


class Stack(LayerStack):
    def setup(self):
        self.make_layers()

    def __call__(self, x):
        return self.run_layers(x, Context(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])))[0]


def bare(cell, mlp, num_layers, *more, **fields):
    """x [1, 1, width] -> x after layers that are nothing but the cell's steps, and their parameters."""
    block = MomentumBlock(NoMixing(), mlp, Identity(), momentum=cell)
    return Stack((block, *more), num_layers, **fields)


def outputs(params, count):
    """The u of every layer, in float64."""
    return [np.asarray(params[f"layer_{i}"]["mlp"]["u"], np.float64) for i in range(count)]


@pytest.mark.parametrize("mu,gamma", [(0.7, 1.0), (-0.4, 0.5)])
def test_heavy_ball_is_its_closed_form(mu, gamma):
    """x_T = x_0 + gamma sum_t sum_{s <= t} mu^(t - s) u_s."""
    stack = bare(HeavyBall(mu, gamma), Given(), 5)
    x = jnp.arange(4.0).reshape(1, 1, 4)
    params = drawn(stack, x, seed=1)
    u = outputs(params, 5)
    expected = np.asarray(x[0, 0]) + gamma * sum(mu ** (t - s) * u[s] for t in range(5) for s in range(t + 1))
    close(call(stack, params, x)[0, 0], expected)


def test_dense_layers_pass_the_state_on():
    """GLaM's pattern, MoE and dense in turn: what dense layers add does not enter the buffer.

    Layers 0 and 2 step, 1 and 3 add: x + u0 + u1 + (mu u0 + u2) + u3.
    """
    stack = bare(HeavyBall(0.5), Given(), 4, Block(NoMixing(), Given(), Identity()))
    x = jnp.ones((1, 2, 4))
    params = drawn(stack, x, seed=2)
    u = outputs(params, 4)
    close(call(stack, params, x)[0, 1], 1 + u[0] + u[1] + 0.5 * u[0] + u[2] + u[3])


def test_robust_momentum_looks_ahead():
    """Against the method as Cyrus et al. write it, for f(x) = s x^2 / 2:
    x_{t+1} = x_t + mu (x_t - x_{t-1}) - gamma s y_t, y_t = x_t + alpha (x_t - x_{t-1})."""
    kappa, smoothness, rho = 9.0, 3.0, 0.7  # between 1 - 1/3 and 1 - 1/9
    cell = robust_momentum(kappa, smoothness, rho)
    mu = 9 * 0.343 / 8  # kappa rho^3 / (kappa - 1) = 0.385875
    gamma = 9 * 0.09 * 1.7 / 3  # kappa (1 - rho)^2 (1 + rho) / L = 0.459
    alpha = 0.343 / (8 * 0.09 * 1.7)  # 0.280229
    close([cell.mu, cell.gamma, cell.alpha], [mu, gamma, alpha])
    close(cell.alpha * cell.gamma, cell.mu / smoothness)
    stiffness = np.asarray([0.5, 3.0])
    old = new = np.ones(2)
    for _ in range(6):
        y = new + alpha * (new - old)
        old, new = new, new + mu * (new - old) - gamma * stiffness * y
    stack = bare(cell, Springs(tuple(stiffness.tolist())), 6)
    close(call(stack, {}, jnp.ones((1, 1, 2)))[0, 0], new)
    fastest = robust_momentum(kappa, smoothness)  # rho = 2/3: mu = rho^2 / (2 - rho), gamma = (1 + rho) / L
    close([fastest.mu, fastest.gamma], [1 / 3, 5 / 9])


def test_adam_is_adam():
    cell = Adam(gamma=0.3, beta1=0.8, beta2=0.9, epsilon=1e-4, decay=0.1)
    stack = bare(cell, Given(), 4)
    x = jnp.full((1, 1, 4), 2.0)
    params = drawn(stack, x, seed=3)
    expected, first, second = np.full(4, 2.0), np.zeros(4), np.zeros(4)
    for u in outputs(params, 4):
        first, second = 0.8 * first + 0.2 * u, 0.9 * second + 0.1 * u**2
        expected = expected + 0.3 * first / np.sqrt(second + 1e-4) - 0.1 * expected
    close(call(stack, params, x)[0, 0], expected)


def test_adam_first_then_heavy_ball():
    """The released stack's cells: layer 0 replaces x (decay 1) by gamma m / sqrt(v) and fills the buffer too.

    From zero, m / sqrt(v) = 0.1 u / sqrt(0.001 u^2) = 3.162 sign(u); then x + mu u0 + u1.
    """
    stack = bare(Adam(decay=1.0, mu=0.5), Given(), 2, MomentumBlock(NoMixing(), Given(), Identity()))
    stack = stack.clone(blocks=(stack.blocks[0], stack.blocks[1].clone(momentum=HeavyBall(0.5))))
    x = jnp.full((1, 1, 4), 2.0)
    params = jax.tree.map(lambda u: 10 * u, drawn(stack, x, seed=4))
    u = outputs(params, 2)
    expected = 0.1 / np.sqrt(0.001) * np.sign(u[0]) + 0.5 * u[0] + u[1]
    np.testing.assert_allclose(call(stack, params, x)[0, 0], expected, rtol=1e-3)  # epsilon


def test_the_released_post_norm_layer():
    """h = norm(x), then norm(h + norm(h + p)), with norms that halve: x = 4 -> h = 2, p = u, (2 + (2 + u) / 2) / 2."""

    class Half(nn.Module):
        def __call__(self, x):
            return 0.5 * x

    block = MomentumBlock(NoMixing(), Given(), Half(), momentum=HeavyBall(0.5), post_norm_double=True)
    stack = Stack((block,), 2)
    x = jnp.full((1, 1, 4), 4.0)
    params = drawn(stack, x, seed=5)
    u = outputs(params, 2)
    first = (2 + (2 + u[0]) / 2) / 2
    h = first / 2
    close(call(stack, params, x)[0, 0], (h + (h + 0.5 * u[0] + u[1]) / 2) / 2)
    with pytest.raises(UserError, match="post_norm_double has its own norms"):
        Stack((block.clone(post_norms=True),), 1).init(jax.random.key(5), x)


@pytest.mark.parametrize("mu", [0.0, 0.7, -0.5])
def test_the_boundary_of_stability(mu):
    """u = -s x through 1500 layers: bounded just where the 2x2 matrix has spectral radius below 1, that is where
    gamma s < 2 (1 + mu), here on a grid that leaves out one percent about the boundary."""
    gamma, boundary = 0.5, 2 * (1 + mu)
    steps = np.concatenate([np.linspace(0.05, 0.99, 12), np.linspace(1.01, 1.5, 12)]) * boundary  # gamma s
    radius = [
        np.abs(np.linalg.eigvals([[1 - step, gamma * mu], [-step / gamma, mu]])).max() for step in steps
    ]
    exactly(np.asarray(radius) < 1, steps < boundary)
    springs = Springs(tuple((steps / gamma).tolist()))
    stack = bare(HeavyBall(mu, gamma), springs, 1500, scan_layers=True)
    size = np.abs(call(stack, {}, jnp.ones((1, 1, len(steps))))[0, 0])
    assert (size[steps < boundary] < 1e-3).all()
    assert (~(size[steps > boundary] < 1e3)).all()  # large, or infinite and not a number by now


# Whole models.


DENSE = GatedMLP(12)


def model(*cells, mlp=DENSE, num_layers=LAYERS, **fields) -> DecoderLM:
    """With plain blocks where no cell is given."""
    attention = Attention(num_heads=2, head_dim=4, rotary=Rotary())
    blocks = tuple(MomentumBlock(attention, mlp, momentum=cell) for cell in cells) or (Block(attention, mlp),)
    sizes = dict(vocab_size=VOCAB, width=WIDTH, max_length=32, num_layers=num_layers)
    return DecoderLM(blocks=blocks, **sizes, **fields)


@functools.cache
def params_of(mlp=DENSE):
    """Of the plain stack, and so of every other without learned coefficients."""
    params = drawn(model(mlp=mlp), TOKENS, seed=6)
    return scaled(params, 2.0)


# XLA may keep more bits than bfloat16 has inside a fusion, and then the bits depend on how it fuses.
rounded = jax.jit(
    lambda model, params: model.apply({"params": params}, TOKENS),
    static_argnums=0,
    compiler_options={"xla_allow_excess_precision": False},
)


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params):
    """-> gradient, logits."""

    def loss(params):
        logits = call(model, params, TOKENS)
        return jnp.sum(jnp.sin(logits)), logits

    return jax.grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("dtype,layout", [("float32", "flat"), ("bfloat16", "batched")])
def test_without_momentum_it_is_the_smoe_stack_bit_for_bit(dtype, layout):
    experts = MoE(num_experts=4, k=2, hidden_dim=6, gated=False, dispatch="dense")
    plain = model(mlp=experts, token_layout=layout)
    params = params_of(experts)
    same = model(PLAIN, mlp=experts, token_layout=layout)
    shapes = jax.eval_shape(same.init, jax.random.key(6), TOKENS)["params"]
    assert shapes == jax.eval_shape(lambda: params)  # one tree: no parameter is added
    params = cast_floats(params, dtype)
    exactly(rounded(same, params), rounded(plain, params))


# Heavy-ball momentum is the robust method without its look-ahead, Adam alone is the first layer of the other.
CELLS = {
    "robust": (ROBUST,),
    "adam, then heavy-ball": (Adam(gamma=0.1, mu=0.7), HeavyBall(0.7), HeavyBall(0.7)),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_cache_changes_nothing(name):
    """A prompt of two tokens, then a token with a wrong and a right child."""
    decoder = model(*CELLS[name])
    params = params_of()
    whole = call(decoder, params, TOKENS)
    cache = decoder.init_cache(2, 16)
    logits, _, fresh = call(decoder, params, TOKENS[:, :2], jnp.full(2, 2), method="prefill")
    close(logits, whole[:, 1])
    cache = cache.commit(fresh, None, jnp.full(2, 2))
    nodes = jnp.stack([TOKENS[:, 2], TOKENS[:, 3] % (VOCAB - 1) + 1, TOKENS[:, 3]], axis=1)
    tree = jnp.asarray([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    logits, _, fresh = call(decoder, params, nodes, cache, tree, jnp.asarray([0, 1, 1]), method="extend")
    close(logits[:, 0], whole[:, 2])
    close(logits[:, 2], whole[:, 3])


@pytest.mark.parametrize("name", CELLS)
def test_it_is_causal(name):
    decoder = model(*CELLS[name])
    changed = TOKENS.at[:, 3].set(TOKENS[:, 3] % (VOCAB - 1) + 1)
    one, other = (call(decoder, params_of(), tokens) for tokens in (TOKENS, changed))
    exactly(one[:, :3], other[:, :3])
    assert (one[:, 3:] != other[:, 3:]).any(-1).all()


def test_scanned_and_rematerialised_layers_carry_the_state():
    cell = Adam(gamma=0.1, mu=0.7)  # all three arrays
    plain, scanned = model(cell), model(cell, scan_layers=True, remat="full")
    params = params_of()
    found, logits = gradient(scanned, scan_params(params, 1))
    expected, expected_logits = gradient(plain, params)
    close(logits, expected_logits)
    jax.tree.map(close, found, scan_params(expected, 1))


def test_states_are_float32_and_as_few_as_needed():
    x = jnp.ones((2, 3), jnp.bfloat16)
    for cell, count in ((HeavyBall(), 1), (ROBUST, 1), (Adam(), 2), (Adam(mu=0.7), 3)):
        state = cell.start(x)
        after = cell.step(x, x, state)
        for leaves in (jax.tree.leaves(state), jax.tree.leaves(after[1])):
            assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [((2, 3), jnp.float32)] * count
        assert after[0].dtype == cell.point(x, state).dtype == jnp.bfloat16
    # 1 + 2^-10 is not a bfloat16: the buffer keeps what the residual stream rounds away.
    p = HeavyBall(0.5).step(x, jnp.full_like(x, 2.0**-10), Momentum(jnp.full((2, 3), 2.0)))[1].p
    exactly(p, 1 + 2.0**-10)


class Rows(struct.PyTreeNode):
    states: jax.Array
    layers: tuple[int, ...] = struct.field(pytree_node=False)
    sizes, size = (1,), 1

    def rows(self, group, x):
        return self.states


def test_rows_that_join_between_layers_begin_without_momentum():
    """One that joins before layer 1 is what a stack without layer 0 makes of its state; the others never notice."""
    decoder = model(HeavyBall(0.7))
    params = params_of()
    cache = decoder.init_cache(2, 16)
    token, copied = TOKENS[:, :1], TOKENS[:, 1:2]
    alone, depth = jnp.eye(2, dtype=bool), jnp.zeros(2, jnp.int32)  # neither sees the other
    rows = Rows(params["embedding"]["table"][copied], (1,))
    joined = call(decoder, params, token, cache, alone, depth, rows, method="extend")[1]
    close(joined[:, :1], call(decoder, params, token, cache, method="extend")[1])
    shorter = {**params, "layer_0": params["layer_1"]}
    del shorter["layer_1"]
    cache = cache.replace(layers=cache.layers[:1])
    one = model(HeavyBall(0.7), num_layers=1)
    close(joined[:, 1:], call(one, shorter, copied, cache, method="extend")[1])


def test_learned_coefficients():
    learned, fixed = model(ROBUST.clone(learned=("mu", "gamma"))), model(ROBUST)
    cell = {"mu": jnp.float32(ROBUST.mu), "gamma": jnp.float32(ROBUST.gamma)}
    params = {name: {**value} for name, value in params_of().items()}
    for i in range(LAYERS):
        params[f"layer_{i}"]["momentum"] = cell
    start = jax.eval_shape(learned.init, jax.random.key(6), TOKENS)["params"]
    assert start == jax.eval_shape(lambda: params)
    only = jax.eval_shape(model(HeavyBall(learned=("gamma",))).init, jax.random.key(6), TOKENS)["params"]
    assert list(only["layer_0"]["momentum"]) == ["gamma"]
    found, logits = gradient(learned, params)
    close(logits, call(fixed, params_of(), TOKENS))
    # mu of the first layer multiplies a buffer of zeros.
    assert float(found["layer_0"]["momentum"]["mu"]) == 0.0
    assert all(float(found[f"layer_{i}"]["momentum"]["gamma"]) != 0 for i in range(LAYERS))
    assert float(found["layer_1"]["momentum"]["mu"]) != 0.0


def test_norms_are_reported_over_real_tokens():
    """One layer with u = 0 puts out its input: |(3, 4)| = 5 and |(0, 1)| = 1 where the third token is padding."""
    block = MomentumBlock(NoMixing(), Springs((0.0, 0.0)), Identity())

    class One(Stack):
        def __call__(self, x):
            context = Context(jnp.zeros((1, 3), jnp.int32), jnp.asarray([[1, 1, 0]]))
            return self.run_layers(x, context)[0]

    x = jnp.asarray([[[3.0, 4.0], [0.0, 1.0], [9.0, 9.0]]])
    _, losses, measured = apply_reporting(One((block,), 1), {}, x)
    assert losses == {} and {k: tuple(map(float, v)) for k, v in measured.items()} == {
        "layer_0/output_norm": (6.0, 2.0)
    }


def test_it_runs_in_a_vision_transformer():
    """With the plain cell in every other layer, the logits of the plain ViT, bit for bit."""
    attention = Attention(num_heads=2, head_dim=4, rule=Full())
    dense = Block(attention, MLP(12), LayerNorm())
    vit = ViT(blocks=(dense,), num_layers=2, num_classes=3, width=WIDTH, patch=2)
    images = jax.random.normal(jax.random.key(7), (2, 4, 4, 1))
    params = drawn(vit, images, seed=8)
    step = MomentumBlock(attention, MLP(12), LayerNorm(), momentum=PLAIN)
    exactly(call(vit.clone(blocks=(dense, step)), params, images), call(vit, params, images))


def test_what_can_not_be_is_told():
    for make, told in (
        (lambda: HeavyBall(mu=1.0), r"HeavyBall.mu: 1.0 is not in \(-1, 1\)"),
        (lambda: HeavyBall(gamma=0.0), "HeavyBall.gamma: 0.0 is not a positive step size"),
        (lambda: HeavyBall(learned=("alpha",)), "HeavyBall.learned: 'alpha' is not one of mu, gamma"),
        (lambda: robust_momentum(1.0, 1.0), "kappa 1.0 and smoothness 1.0 must be above 1"),
        (lambda: robust_momentum(4.0, 1.0, 0.9), "rho 0.9 is not between 0.5 and 0.75 of kappa 4.0"),
        (lambda: Adam(beta1=1.0), r"Adam.beta1: 1.0 is not in \[0, 1\)"),
        (lambda: Adam(epsilon=0.0), "Adam.epsilon: 0.0 must be positive"),
    ):
        with pytest.raises(UserError, match=told):
            make()
    for cells, told in (
        ((Adam(), HeavyBall()), "give Adam the `mu` of the buffer"),
        ((HeavyBall(), Adam()), "begin with Adam"),
    ):
        with pytest.raises(UserError, match=told):
            jax.eval_shape(model(*cells).init, jax.random.key(0), TOKENS)
