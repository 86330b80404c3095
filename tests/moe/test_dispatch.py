"""Every backend equals the dense oracle, forward and backward; capacity drops what it says; padding never matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import cpu_rows, cpu_training
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
from research.nn.cpu_kernels import without_cpu_kernels
from research.nn.weights import LowRank, Sum

N, K, E, D, F = 24, 2, 4, 8, 6
ROWS = ("sort_pairs", "weighted_rows", "weighted_rows_gradient")
MASK = np.arange(N) % 5 > 0

BACKENDS = {
    "capacity": CapacityDispatch.make,
    "sorted": SortedDispatch.make,  # 48 pairs in tiles of 8: by tiles
    "sorted, tiles of 1": lambda r: SortedDispatch.make(r, 1),
    "sorted, tiles of 5": lambda r: SortedDispatch.make(r, 5),  # 52 rows > 2 * 5 * 4: expert by expert
    "blocks": SortedDispatch.make_blocks,  # of 16 rows, three of the first expert's 19 left over: product by product
    "blocks, tiles of 1": lambda r: SortedDispatch.make_blocks(r, 1),  # of 12, seven left over: the whole FFN
}


def inputs(dtype=jnp.float32) -> dict:
    normal = np.random.default_rng(1).standard_normal
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    params = {
        name: {
            "kernel": (normal((E, *shape)) / shape[0] ** 0.5).astype(dtype),
            "bias": normal((E, shape[1])).astype(dtype),
        }
        for name, shape in shapes.items()
    }
    x = normal((N, D)).astype(dtype)
    # Loads 2, 1, 0 and 1 times the mean: an expert without tokens among them.
    logits = normal((N, E)).astype(np.float32) + np.asarray([2.0, 0.0, -30.0, 0.0], np.float32)
    return {"x": x, "logits": logits, "params": params}


def value_and_gradients(make, values):
    """The output, and the gradients of a function of it by x, the router's logits and all parameters."""

    def layer(values):
        routing = route(values["logits"], K, mask=MASK)
        dispatch = make(routing)
        y = experts.feed_forward(dispatch, dispatch.scatter(values["x"]), values["params"], "silu")
        return dispatch.combine(y, routing.gate)

    def objective(values):
        y = layer(values)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape)), dtype=jnp.float32), y

    (_, y), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(values)
    return jax.tree.map(np.asarray, (y, gradients))


@pytest.fixture(scope="module")
def oracle():
    return value_and_gradients(DenseDispatch.make, inputs())


def close(a, b, tolerance=2e-5):
    # Sums of at most 48 products of size 1, in another order: 48 * 2**-24 = 3e-6, through two layers and back.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize(
    "name, piece, left_over",
    [
        *((name, 256, 0.25) for name in BACKENDS),
        ("sorted, tiles of 5", 3, 0.25),
        ("blocks", 256, 0.05),  # two rows may be left over, so these loads are sorted
        ("blocks, tiles of 1", 3, 0.05),
    ],
)
def test_equals_the_oracle_forward_and_backward(name, piece, left_over, oracle, monkeypatch):
    monkeypatch.setattr(grouped, "PIECE", piece)
    monkeypatch.setattr("research.moe.dispatch.LEFT_OVER", left_over)
    ours = value_and_gradients(BACKENDS[name], inputs())
    close(ours, oracle)
    y, gradients = ours
    np.testing.assert_array_equal(y[~MASK], 0)  # padding comes back as 0, and nothing depends on it
    np.testing.assert_array_equal(gradients["x"][~MASK], 0)
    np.testing.assert_array_equal(gradients["params"]["up"]["kernel"][2], 0)  # no token, no gradient


@pytest.mark.parametrize("backend", ["sorted", "capacity"])
@pytest.mark.parametrize(
    "biases, used", [(False, {"grouped_ffn"}), (True, {"grouped_dot"})], ids=["the whole FFN", "products"]
)
def test_kernels_for_a_cpu_equal_the_oracle(biases, used, backend, monkeypatch):
    for name in ("_ROWS", "_OF_AN_EXPERT", "_PRODUCTS"):
        monkeypatch.setattr(grouped, name, 1)
    monkeypatch.setattr("research.moe.dispatch._LARGE", 1)
    called = set()

    def watched(name, function):
        return lambda *args: (called.add(name), function(*args))[1]

    for module, names in ((cpu_training, ("grouped_ffn", "grouped_dot")), (cpu_rows, ROWS)):
        for name in names:
            monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    values = inputs()
    if not biases:
        values["params"] = {name: {"kernel": part["kernel"]} for name, part in values["params"].items()}
    ours = value_and_gradients(BACKENDS[backend], values)
    assert called == used | {*ROWS}
    with without_cpu_kernels():
        close(ours, value_and_gradients(DenseDispatch.make, values))
    y, gradients = ours
    np.testing.assert_array_equal(y[~MASK], 0)
    np.testing.assert_array_equal(gradients["x"][~MASK], 0)
    np.testing.assert_array_equal(gradients["params"]["up"]["kernel"][2], 0)


def test_kernels_want_float32_many_rows_and_no_blocks():
    kernel, groups = jnp.zeros((E, 512, 512)), grouped.Groups.sorted(jnp.zeros(E, jnp.int32))
    fits = lambda rows, kernel=kernel, groups=groups: grouped.in_one_call(rows, kernel, groups)  # noqa: E731
    assert fits(jnp.zeros((48, 512))) and not fits(jnp.zeros((47, 512)))
    assert not fits(jnp.zeros((48, 512), jnp.bfloat16)) and not fits(
        jnp.zeros((48, 512)), kernel.astype(jnp.bfloat16)
    )
    assert not fits(jnp.zeros((48, 8)), jnp.zeros((E, 8, 8)))  # too little to do
    assert not fits(jnp.zeros((48, 512)), jnp.zeros((16, 512, 512)))  # three rows an expert
    assert not fits(jnp.zeros((48, 512)), groups=groups.replace(block=8))
    with without_cpu_kernels():
        assert not fits(jnp.zeros((48, 512)))


def test_the_oracle_is_a_loop_over_tokens_and_experts(oracle):
    values = inputs()
    routing = jax.jit(lambda logits: route(logits, K))(values["logits"])
    params = values["params"]
    for n in range(5):
        y = np.zeros(D)
        for e, gate in zip(np.asarray(routing.index[n]), np.asarray(routing.gate[n]), strict=True):
            x = values["x"][n]
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
    close(y.astype(np.float32), dense.astype(np.float32), 3e-2)
    close(gradients["logits"], dense_gradients["logits"], 6e-2)


@pytest.mark.parametrize("name", ["sorted, tiles of 1", "sorted, tiles of 5", "blocks", "blocks, tiles of 1"])
def test_structured_kernels(name):
    """A sum of an array and a low-rank product, stacked by experts, multiplies as its matrices do."""
    shapes = (E, D, 2), (E, 2, F), (E, D, F)
    down, up, term = (np.random.default_rng(2).standard_normal(s).astype(np.float32) for s in shapes)

    @jax.jit
    def run(logits, x, kernel):
        dispatch = BACKENDS[name](route(logits, K))
        y, pull = jax.vjp(lambda x, k: dispatch.gather_slots(dispatch.dot(dispatch.scatter(x), k)), x, kernel)
        return y, pull(jnp.ones_like(y))

    tokens = inputs()["logits"], inputs()["x"]
    y, (dx, d_kernel) = run(*tokens, Sum((term, LowRank(down, up))))
    expected, (dx_expected, d_whole) = run(*tokens, term + down @ up)
    close(y, expected, 1e-4)
    close(dx, dx_expected, 1e-4)
    close(d_kernel.terms[0], d_whole, 1e-4)
    close(d_kernel.terms[1].down, np.einsum("edf,erf->edr", d_whole, up), 1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_slots_are_gathered_where_they_were_scattered(name):

    @jax.jit
    def there_and_back(logits, rows):
        routing = route(logits, K, mask=MASK)
        dispatch, oracle = BACKENDS[name](routing), DenseDispatch.make(routing)
        token = dispatch.gather_slots(dispatch.scatter(rows[:, 0]))[:, 1]
        return *(made.gather_slots(made.scatter_slots(rows)) for made in (dispatch, oracle)), token

    rows = np.random.default_rng(0).standard_normal((N, K, D)).astype(np.float32)
    kept = rows * MASK[:, None, None]
    slots, oracle, token = there_and_back(inputs()["logits"], rows)
    np.testing.assert_array_equal(slots, kept)
    np.testing.assert_array_equal(token, kept[:, 0])
    np.testing.assert_array_equal(oracle, kept)


def test_choices_of_few_tokens_read_few_kernels():
    """Decoding: experts without tokens may hold NaN, they are not read."""

    @jax.jit
    def run(logits, x, kernel):
        dispatch = make_dispatch(route(logits, K))
        return dispatch.gather_slots(dispatch.dot(dispatch.scatter(x), kernel))

    kernel = np.ones((E, D, F), np.float32)
    kernel[:2] = np.nan
    y = run(np.asarray([[0.0, 1.0, 5.0, 4.0]] * 2, np.float32), np.ones((2, D), np.float32), kernel)
    np.testing.assert_array_equal(y, np.full((2, K, F), float(D)))


def test_blocks_of_a_large_kernel_add_up(monkeypatch):
    monkeypatch.setattr(grouped, "BLOCK", 64)  # bytes: D * F * 4 = 192 of them in 3 or more blocks
    rows = np.random.default_rng(0).standard_normal((5, D)).astype(np.float32)
    kernel = inputs()["params"]["up"]["kernel"]
    rows[4] = 0
    assert grouped._block_count(kernel) == 4  # the first divisor of 8 from 3 on
    groups = grouped.Groups.sorted(np.asarray([0, 3, 0, 1]))
    y = jax.jit(lambda *args: grouped.grouped_dot(*args, 2))(rows, kernel, groups)
    close(y, np.stack([*(rows[i] @ kernel[1] for i in range(3)), rows[3] @ kernel[3], np.zeros(F)]))


# Three tokens, each with a first and a second choice; every expert has ceil(1 * 2 * 3 / 2) = 3, rounded up to 4 and
# cut to the 3 tokens; with a factor of 1/3 it has one slot.
CHOICES = np.asarray([[1, 0], [0, 1], [0, 1]])


def chosen(index, mask, experts=None) -> Routing:
    logits = np.zeros((len(index), experts or index.max() + 1), np.float32)
    return Routing(logits, logits + 1 / logits.shape[1], index, np.ones(index.shape), np.asarray(mask))


def one_slot(mask):
    """Tokens 1, 2 and 3 scattered to one slot an expert, and 10 and 20 combined from there."""

    @jax.jit
    def run(routing):
        dispatch = CapacityDispatch.make(routing)
        there = dispatch.scatter(jnp.asarray([[1.0], [2.0], [3.0]]))
        return dispatch, there, dispatch.combine(jnp.asarray([[[10.0]], [[20.0]]]), jnp.ones((3, 2)))

    return run(chosen(CHOICES, mask))


def test_first_choices_come_before_second_ones(monkeypatch):
    monkeypatch.setattr("research.moe.dispatch.expert_capacity", lambda *_: 1)
    dispatch, there, y = one_slot([True, True, True])
    # Expert 0: first choices of tokens 1 and 2, second of token 0: token 1. Expert 1: first of 0, second of 1 and 2.
    assert np.ravel(there).tolist() == [2.0, 1.0]
    assert float(dispatch.dropped) == 4 and dispatch.counts.tolist() == [3, 3]
    assert np.ravel(y).tolist() == [20.0, 10.0, 0.0]  # the last token is dropped by both


def test_padding_takes_no_slot(monkeypatch):
    monkeypatch.setattr("research.moe.dispatch.expert_capacity", lambda *_: 1)
    dispatch, there, _ = one_slot([True, False, True])
    assert np.ravel(there).tolist() == [3.0, 1.0]
    assert float(dispatch.dropped) == 2 and dispatch.counts.tolist() == [2, 2]


def test_capacity_sweep():
    # ceil(factor * 2 * 24 / 4 = 12 factor), up to a multiple of 4, at most 24 tokens.
    wanted = {0.25: 4, 0.5: 8, 1.0: 12, 1.25: 16, 2.0: 24, 4.0: 24, None: 24}
    assert {factor: expert_capacity(N, E, K, factor) for factor in wanted} == wanted

    @jax.jit
    def sweep(logits):
        routing = route(logits, K)
        return jnp.stack([make_dispatch(routing, "capacity", factor).dropped for factor in wanted])

    dropped = sweep(inputs()["logits"]).tolist()
    assert dropped == sorted(dropped, reverse=True) and dropped[0] > 0 and dropped[-3:] == [0, 0, 0]


def test_loads_that_differ_too_much_are_sorted():
    """10 rows in tiles of 2: blocks of 4. At most 10 / 4 rows may be left over, and one expert of four without any."""

    @jax.jit
    def layout(index):
        groups = SortedDispatch.make_blocks(chosen(index, [True] * 10, experts=4), 2).groups
        return groups.start, groups.size

    def laid_out(loads):
        start, size = layout(np.repeat(np.arange(4), loads)[:, None])
        return start.tolist(), size.tolist()

    blocks = [0, 4, 8, 12]
    assert laid_out([6, 2, 1, 1]) == ([blocks, [0, 2, 2, 2]], [[4, 2, 1, 1], [2, 0, 0, 0]])
    assert laid_out([6, 3, 1, 0]) == ([blocks, [0, 2, 2, 2]], [[4, 3, 1, 0], [2, 0, 0, 0]])
    assert laid_out([7, 1, 1, 1]) == ([[0, 7, 8, 9], [0] * 4], [[7, 1, 1, 1], [0] * 4])
    assert laid_out([6, 4, 0, 0]) == ([[0, 6, 10, 10], [0] * 4], [[6, 4, 0, 0], [0] * 4])

    def block(tokens, dtype):
        make = lambda: make_dispatch(route(jnp.zeros((tokens, E)), K), dtype=dtype)  # noqa: E731
        return jax.eval_shape(make).groups.block

    # A mean of 64 rows in tiles of 8, and one tile; none for rows that a kernel multiplies.
    assert (block(127, jnp.bfloat16), block(128, jnp.bfloat16), block(128, jnp.float32)) == (0, 72, 0)
    with without_cpu_kernels():
        assert block(128, jnp.float32) == 72


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
        make_dispatch(jax.eval_shape(lambda: route(jnp.zeros((N, E)), K)), backend, factor)
