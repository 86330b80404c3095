"""Every backend equals the dense oracle, forward and backward; capacity drops what it says; padding never matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.moe import experts, grouped
from research.moe.dispatch import (
    CapacityDispatch,
    DenseDispatch,
    SortedDispatch,
    expert_capacity,
    make_dispatch,
)
from research.moe.routing import Routing, route
from research.nn.weights import LowRank, Sum

N, K, E, D, F = 24, 2, 4, 8, 6
MASK = jnp.arange(N) % 5 > 0

BACKENDS = {
    "capacity": CapacityDispatch.make,
    "sorted": SortedDispatch.make,  # 48 pairs in tiles of 8: by tiles
    "sorted, tiles of 1": lambda r: SortedDispatch.make(r, 1),
    "sorted, tiles of 5": lambda r: SortedDispatch.make(r, 5),  # 52 rows > 2 * 5 * 4: expert by expert
}


def inputs(dtype=jnp.float32) -> dict:
    keys = jax.random.split(jax.random.key(1), 8)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    params = {
        name: {
            "kernel": jax.random.normal(key, (E, *shape), dtype) / shape[0] ** 0.5,
            "bias": jax.random.normal(key, (E, shape[1]), dtype),
        }
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    x = jax.random.normal(keys[3], (N, D), dtype)
    # Loads 2, 1, 0 and 1 times the mean: an expert without tokens among them.
    logits = jax.random.normal(keys[4], (N, E)) + jnp.asarray([2.0, 0.0, -30.0, 0.0])
    return {"x": x, "logits": logits, "params": params}


def value_and_gradients(make, values, run=None):
    """The output, and the gradients of a function of it by x, the router's logits and all parameters."""

    def layer(values):
        routing = route(values["logits"], K, mask=MASK)
        dispatch = make(routing)
        y = experts.feed_forward(dispatch, dispatch.scatter(values["x"]), values["params"], "silu")
        return dispatch.combine(y, routing.gate)

    def objective(values):
        y = (run or layer)(values)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape)), dtype=jnp.float32), y

    (_, y), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True, allow_int=True))(values)
    return y, gradients


@pytest.fixture(scope="module")
def oracle():
    return value_and_gradients(DenseDispatch.make, inputs())


def close(a, b, tolerance=2e-5):
    # Sums of at most 48 products of size 1, in another order: 48 * 2**-24 = 3e-6, through two layers and back.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("name, piece", [*((name, 256) for name in BACKENDS), ("sorted, tiles of 5", 3)])
def test_equals_the_oracle_forward_and_backward(name, piece, oracle, monkeypatch):
    monkeypatch.setattr(grouped, "PIECE", piece)
    ours = value_and_gradients(BACKENDS[name], inputs())
    close(ours, oracle)
    y, gradients = ours
    np.testing.assert_array_equal(y[~MASK], 0)  # padding comes back as 0, and nothing depends on it
    np.testing.assert_array_equal(gradients["x"][~MASK], 0)
    np.testing.assert_array_equal(gradients["params"]["up"]["kernel"][2], 0)  # no token, no gradient


def test_the_oracle_is_a_loop_over_tokens_and_experts(oracle):
    values = inputs()
    routing = route(values["logits"], K)
    params = jax.tree.map(np.asarray, values["params"])
    for n in range(5):
        y = np.zeros(D)
        for e, gate in zip(np.asarray(routing.index[n]), np.asarray(routing.gate[n]), strict=True):
            x = np.asarray(values["x"][n])
            up, gated = (x @ params[p]["kernel"][e] + params[p]["bias"][e] for p in ("up", "gate"))
            hidden = gated / (1 + np.exp(-gated)) * up
            y += gate * (hidden @ params["down"]["kernel"][e] + params["down"]["bias"][e])
        np.testing.assert_allclose(oracle[0][n], y if MASK[n] else 0, rtol=1e-5, atol=1e-5)


def test_half_precision_rounds_what_it_must_and_no_more(oracle):
    values = inputs(jnp.bfloat16)
    y, gradients = value_and_gradients(BACKENDS["sorted, tiles of 5"], values)
    assert y.dtype == gradients["params"]["up"]["kernel"].dtype == jnp.bfloat16
    dense, dense_gradients = value_and_gradients(DenseDispatch.make, values)
    # Both round to 8 bits after each product; sums are float32 in both.
    close(y.astype(jnp.float32), dense.astype(jnp.float32), 3e-2)
    close(gradients["logits"], dense_gradients["logits"], 6e-2)


@pytest.mark.parametrize("name", ["sorted, tiles of 1", "sorted, tiles of 5"])
def test_structured_kernels(name):
    """A sum of an array and a low-rank product, stacked by experts, multiplies as its matrices do."""
    keys = jax.random.split(jax.random.key(2), 3)
    low = LowRank(jax.random.normal(keys[0], (E, D, 2)), jax.random.normal(keys[1], (E, 2, F)))
    kernel = Sum((jax.random.normal(keys[2], (E, D, F)), low))
    routing, x = route(inputs()["logits"], K), inputs()["x"]
    dispatch = BACKENDS[name](routing)

    def run(kernel):
        return lambda x: dispatch.gather_slots(dispatch.dot(dispatch.scatter(x), kernel))

    whole = kernel.terms[0] + jnp.einsum("edr,erf->edf", low.down, low.up)
    y, pull = jax.vjp(lambda x, kernel: run(kernel)(x), x, kernel)
    expected, expected_pull = jax.vjp(lambda x, kernel: run(kernel)(x), x, whole)
    close(y, expected, 1e-4)
    dx, d_kernel = pull(jnp.ones_like(y))
    dx_expected, d_whole = expected_pull(jnp.ones_like(y))
    close(dx, dx_expected, 1e-4)
    close(d_kernel.terms[0], d_whole, 1e-4)
    close(d_kernel.terms[1].down, jnp.einsum("edf,erf->edr", d_whole, low.up), 1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_slots_are_gathered_where_they_were_scattered(name):
    routing = route(inputs()["logits"], K, mask=MASK)
    dispatch = BACKENDS[name](routing)
    rows = jax.random.normal(jax.random.key(0), (N, K, D))
    kept = rows * MASK[:, None, None]
    np.testing.assert_array_equal(dispatch.gather_slots(dispatch.scatter_slots(rows)), kept)
    x = rows[:, 0]
    np.testing.assert_array_equal(dispatch.gather_slots(dispatch.scatter(x))[:, 1], kept[:, 0])
    oracle = DenseDispatch.make(routing)
    np.testing.assert_array_equal(oracle.gather_slots(oracle.scatter_slots(rows)), kept)


def test_choices_of_few_tokens_read_few_kernels():
    """Decoding: experts without tokens may hold NaN, they are not read."""
    routing = route(jnp.asarray([[0.0, 1.0, 5.0, 4.0]] * 2), K)
    dispatch = make_dispatch(routing)
    kernel = jnp.ones((E, D, F)).at[:2].set(jnp.nan)
    y = dispatch.gather_slots(dispatch.dot(dispatch.scatter(jnp.ones((2, D))), kernel))
    np.testing.assert_array_equal(y, jnp.full((2, K, F), float(D)))


def test_blocks_of_a_large_kernel_add_up(monkeypatch):
    monkeypatch.setattr(grouped, "BLOCK", 64)  # bytes: D * F * 4 = 192 of them in 3 or more blocks
    rows, kernel = jax.random.normal(jax.random.key(0), (5, D)), inputs()["params"]["up"]["kernel"]
    assert grouped._block_count(kernel) == 4  # the first divisor of 8 from 3 on
    y = grouped.grouped_dot(rows.at[4].set(0), kernel, jnp.asarray([0, 3, 0, 1]), 2)
    close(y, jnp.stack([*(rows[i] @ kernel[1] for i in range(3)), rows[3] @ kernel[3], jnp.zeros(F)]))


# Three tokens, each with a first and a second choice; every expert has ceil(1 * 2 * 3 / 2) = 3, rounded up to 4 and
# cut to the 3 tokens; with a factor of 1/3 it has one slot.
CHOICES = jnp.asarray([[1, 0], [0, 1], [0, 1]])


def chosen(index, mask=None) -> Routing:
    index = jnp.asarray(index)
    tokens = index.shape[0]
    logits = jnp.zeros((tokens, int(index.max()) + 1))
    mask = jnp.ones(tokens, bool) if mask is None else jnp.asarray(mask)
    return Routing(logits, jax.nn.softmax(logits), index, jnp.ones(index.shape), mask)


def test_first_choices_come_before_second_ones(monkeypatch):
    monkeypatch.setattr("research.moe.dispatch.expert_capacity", lambda *_: 1)
    dispatch = CapacityDispatch.make(chosen(CHOICES))
    # Expert 0: first choices of tokens 1 and 2, second of token 0: token 1. Expert 1: first of 0, second of 1 and 2.
    assert dispatch.scatter(jnp.asarray([[1.0], [2.0], [3.0]])).ravel().tolist() == [2.0, 1.0]
    assert dispatch.dropped == 4 and dispatch.counts.tolist() == [3, 3]
    y = dispatch.combine(jnp.asarray([[[10.0]], [[20.0]]]), jnp.ones((3, 2)))
    assert y.ravel().tolist() == [20.0, 10.0, 0.0]  # the last token is dropped by both


def test_padding_takes_no_slot(monkeypatch):
    monkeypatch.setattr("research.moe.dispatch.expert_capacity", lambda *_: 1)
    dispatch = CapacityDispatch.make(chosen(CHOICES, [True, False, True]))
    assert dispatch.scatter(jnp.asarray([[1.0], [2.0], [3.0]])).ravel().tolist() == [3.0, 1.0]
    assert dispatch.dropped == 2 and dispatch.counts.tolist() == [2, 2]


def test_capacity_sweep():
    routing = route(inputs()["logits"], K)
    # ceil(factor * 2 * 24 / 4 = 12 factor), up to a multiple of 4, at most 24 tokens.
    wanted = {0.25: 4, 0.5: 8, 1.0: 12, 1.25: 16, 2.0: 24, 4.0: 24, None: 24}
    assert {factor: expert_capacity(N, E, K, factor) for factor in wanted} == wanted
    dropped = [float(make_dispatch(routing, "capacity", factor).dropped) for factor in wanted]
    assert dropped == sorted(dropped, reverse=True) and dropped[0] > 0 and dropped[-3:] == [0, 0, 0]


@pytest.mark.parametrize(
    "backend, factor, message",
    [
        ("capacity", 0.0, "capacity_factor=0.0: experts need a capacity above 0"),
        ("capacity", float("nan"), "capacity_factor=nan"),
        ("sorted", 1.25, "capacity_factor=1.25: dispatch='sorted' drops nothing; use 'capacity'"),
        ("sort", None, "dispatch='sort': no such backend; did you mean 'sorted'"),
    ],
)
def test_mistakes_are_one_line(backend, factor, message):
    with pytest.raises(UserError, match=message):
        make_dispatch(route(jnp.zeros((N, E)), K), backend, factor)
