"""Choices and gates, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.moe import routing as routers
from research.moe.routing import NORMS, Router
from tests.programs import call, drawn

# One program a shape instead of one an operation.
route = jax.jit(routers.route, static_argnames=("k", "norm", "ranks"))
expert_choice = jax.jit(routers.expert_choice, static_argnames="capacity")

# Softmax of log weights: probabilities 1/10, 4/10, 2/10, 3/10.
LOGITS = np.log(np.asarray([[1.0, 4.0, 2.0, 3.0]], np.float32))


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "norm, gates",
    [
        ("softmax_topk", [0.4, 0.3]),
        ("softmax_topk_renorm", [4 / 7, 3 / 7]),
        ("topk_softmax", [4 / 7, 3 / 7]),
        ("unit", [1.0, 1.0]),
        ("unit_straight_through", [1.0, 1.0]),
    ],
)
def test_gates(norm, gates):
    routing = route(LOGITS, 2, norm=norm)
    assert routing.index.tolist() == [[1, 3]]
    np.testing.assert_allclose(routing.gate, [gates], rtol=1e-6)
    np.testing.assert_allclose(routing.probs, [[0.1, 0.4, 0.2, 0.3]], rtol=1e-6)


def test_unit_gates_are_exactly_one_and_only_straight_through_has_a_gradient():
    logits = normal(50, 4) * 5
    assert (np.asarray(route(logits, 2, norm="unit_straight_through").gate) == 1).all()

    def gate(norm):
        return jax.jit(jax.grad(lambda z: route(z, 1, norm=norm).gate[0, 0]))(LOGITS)

    np.testing.assert_array_equal(gate("unit"), 0)
    # p / stop_gradient(p) has the gradient of log p: 1 - 0.4 for the chosen, -p for the others.
    np.testing.assert_allclose(gate("unit_straight_through"), [[-0.1, 0.6, -0.2, -0.3]], rtol=1e-5)


def test_ranks():
    assert route(LOGITS, 2, ranks=(1,)).index.tolist() == [[3]]
    assert route(LOGITS, 2, ranks=(3, 0)).index.tolist() == [[0, 1]]
    np.testing.assert_array_equal(
        route(LOGITS, 2, ranks=(1,)).gate, [[1.0]]
    )  # the only one has all the weight
    logits = normal(50, 6)
    both = route(logits, 3), route(logits, 3, ranks=(0, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, *both)
    first = route(logits, 1), route(logits, 3, ranks=(0,))
    jax.tree.map(np.testing.assert_array_equal, *first)


def test_a_rank_without_probability_gets_no_gate_rather_than_nan():
    logits = np.asarray([[0.0, -200.0]], np.float32)
    assert route(logits, 1, norm="softmax_topk_renorm", ranks=(1,)).gate.tolist() == [[0.0]]
    assert route(logits, 1, norm="unit_straight_through", ranks=(1,)).gate.tolist() == [[1.0]]


def test_ties_go_to_the_lower_number():
    assert route(np.zeros_like(LOGITS), 3).index.tolist() == [[0, 1, 2]]
    assert route(np.asarray([[1.0, 2.0, 1.0, 2.0]], np.float32), 3).index.tolist() == [[1, 3, 0]]


def test_random_experts_are_uniform():
    routing = route(np.zeros((4000, 4)), 2, ranks="random", key=jax.random.key(0))
    assert routing.index.shape == (4000, 1)
    # 4000 draws: 1000 each, standard deviation sqrt(4000 * 1/4 * 3/4) = 27.
    assert np.abs(np.bincount(np.ravel(routing.index)) - 1000).max() < 5 * 27


def test_padding_has_gates_of_zero():
    mask = np.asarray([True, False])
    assert route(np.zeros((2, 4)), 2, mask=mask).gate.tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_logits_are_float32():
    routing = route(np.ones((1, 2), jnp.bfloat16), 1)
    assert routing.logits.dtype == routing.gate.dtype == jnp.float32


def test_expert_choice():
    # Expert 0 prefers tokens 2, 0, 1; expert 1 the reverse.
    probs = np.asarray([[[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]]], np.float32)
    index, gate = expert_choice(probs, 2)
    assert index.tolist() == [[[2, 0], [1, 0]]]
    np.testing.assert_allclose(gate, [[[0.9, 0.5], [0.8, 0.5]]], rtol=1e-6)
    _, gate = expert_choice(probs, 3, np.asarray([[True, True, False]]))
    np.testing.assert_allclose(gate, [[[0.5, 0.2, 0.0], [0.8, 0.5, 0.0]]], rtol=1e-6)
    with pytest.raises(UserError, match="capacity=0: an expert takes between 1 and all 3 tokens"):
        expert_choice(probs, 0)


def test_router_computes_in_float32():
    x = np.ones((1, 2), jnp.bfloat16)
    kernel = np.asarray([[1.0, 1.0], [0.0, 2.0**-12]], np.float32)  # 1 + 2**-12 is 1 in bfloat16
    logits = np.asarray(call(Router(2), {"kernel": kernel}, x))
    assert logits.dtype == np.float32 and logits[0, 1] - logits[0, 0] == 2.0**-12


def test_noise_is_drawn_in_training_only():
    router, x = Router(4, noise=2.0), np.zeros((500, 3), np.float32)
    params = drawn(router, x)
    assert not np.any(call(router, params, x))
    noisy = jax.jit(lambda key: router.apply({"params": params}, x, rngs={"dropout": key}))(jax.random.key(1))
    # 2000 draws of standard deviation 2; that of the estimate is 2 / sqrt(2 * 2000) = 0.03.
    assert abs(np.std(noisy) - 2.0) < 5 * 0.03


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(k=5), r"k=5: a token goes to between 1 and all 4 experts \(num_experts\)"),
        (dict(k=0), "k=0"),
        (dict(k=2, ranks=(4,)), r"ranks=\(4,\): ranks are different and lie in 0..3"),
        (dict(k=2, ranks=(1, 1)), "ranks are different"),
        (dict(k=2, ranks="random"), 'ranks="random" needs a key'),
        (
            dict(k=2, norm="topk-softmax"),
            "norm='topk-softmax': no such gate normalisation; did you mean 'topk_softmax'",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        route(LOGITS, **arguments)


def test_another_number_of_experts_names_the_command():
    with pytest.raises(UserError, match="the parameters have 4 experts, the model 8.*experiments.upcycle"):
        call(Router(8), {"kernel": np.zeros((3, 4))}, np.zeros((1, 3)))


def test_norms_agree_where_they_are_the_same():
    logits = normal(64, 8)
    gates = jax.jit(lambda z: {norm: routers.route(z, 3, norm=norm).gate for norm in NORMS})(logits)
    # Two roundings of 2**-24 more or less.
    np.testing.assert_allclose(gates["topk_softmax"], gates["softmax_topk_renorm"], rtol=1e-6)
    assert math.isclose(float(np.sum(gates["topk_softmax"])), 64, rel_tol=1e-6)
