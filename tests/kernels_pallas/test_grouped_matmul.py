"""The grouped product: every implementation against a loop over groups, with gradients; as part of a dispatch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_matmul as kernels
from kernels_pallas.grouped_matmul import Unsupported, common
from research.errors import UserError
from research.moe.dispatch import make_dispatch
from research.moe.grouped import PallasGroupedDot
from research.moe.routing import route

# One program a shape instead of one an operation.
grouped_matmul = jax.jit(kernels.grouped_matmul, static_argnames=("implementation", "interpret"))
schedule = jax.jit(common.schedule, static_argnums=(1, 2), static_argnames="gradient")

KERNELS = ("tpu", "gpu")
# Of 150 rows in tiles of 128 (tpu) or 32 (gpu): groups that end inside, at and behind tiles, empty ones at both ends
# and in between, everything in one group, nothing in any.
SIZES = ((0, 70, 58, 0, 20, 0), (0, 0, 150, 0, 0, 0), (0, 0, 0, 0, 0, 0), (100, 0, 0, 0, 3, 30))


def make(rows=150, features=16, columns=32, experts=6, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, weights, cotangent = (
        rng.normal(size=shape) for shape in ((rows, features), (experts, features, columns), (rows, columns))
    )
    return x.astype(dtype), weights.astype(dtype), cotangent.astype(dtype)


def written_out(x, weights, cotangent, sizes):
    """The product and both gradients, a group at a time in float64."""
    x, weights, cotangent = (np.asarray(a, np.float64) for a in (x, weights, cotangent))
    out, dx, d_weights = np.zeros(cotangent.shape), np.zeros(x.shape), np.zeros(weights.shape)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows], dx[rows] = x[rows] @ weights[group], cotangent[rows] @ weights[group].T
        d_weights[group] = x[rows].T @ cotangent[rows]
        start += size
    return out, dx, d_weights


def with_gradients(**options):
    @jax.jit
    def run(x, weights, cotangent, sizes):
        out, pull = jax.vjp(lambda *both: kernels.grouped_matmul(*both, sizes, **options), x, weights)
        return out, *pull(cotangent)

    return run


@pytest.mark.parametrize("implementation", ("reference", *KERNELS))
def test_is_a_product_for_every_group(implementation):
    """One program for all sizes, which are data. Rows of no group hold NaN: they must not reach anything."""
    run = with_gradients(implementation=implementation, interpret=True)
    x, weights, cotangent = make()
    for sizes in SIZES:
        x_lost = x.copy()
        x_lost[sum(sizes) :] = np.nan
        found = run(x_lost, weights, cotangent, np.asarray(sizes, np.int32))
        for value, right in zip(found, written_out(x, weights, cotangent, sizes), strict=True):
            np.testing.assert_allclose(value, right, atol=2e-5)  # float32 sums of up to 150 products


@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16(implementation):
    """Fewer rows than a tile; the matrices stay float32, as those of an optimizer do."""
    x, weights, cotangent = make(rows=20, dtype=jnp.bfloat16)
    sizes = (5, 0, 0, 9, 1, 0)
    run = with_gradients(implementation=implementation, interpret=True)
    found = run(x, weights.astype(np.float32), cotangent, np.asarray(sizes))
    assert [value.dtype for value in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for value, right in zip(found, written_out(x, weights, cotangent, sizes), strict=True):
        np.testing.assert_allclose(np.asarray(value, np.float64), right, rtol=2**-8, atol=1e-3)


def test_schedule_by_hand():
    """Groups of 3, 0 and 4 of 9 rows in tiles of 4: tile 0 for group 0, tiles 0 and 1 for group 2, tiles 1 and 2 for
    the rest, group 3, which fetches the matrix that is there. The gradient visits group 1 too, and no rest."""
    sizes = np.asarray([3, 0, 4])
    found = schedule(sizes, 9, 4, gradient=False)
    assert found.count.tolist()[0] == 5
    assert found.offsets.tolist() == [0, 3, 3, 7, 9]
    assert found.group.tolist()[:5] == [0, 2, 2, 3, 3]
    assert found.weight.tolist()[:5] == [0, 2, 2, 2, 2]
    assert found.tile.tolist()[:5] == [0, 0, 1, 1, 2]
    found = schedule(sizes, 9, 4, gradient=True)
    assert found.count.tolist()[0] == 4
    assert found.group.tolist()[:4] == [0, 1, 2, 2]
    assert found.tile.tolist()[:4] == [0, 0, 0, 1]


def test_in_the_simulator(simulator):
    """Two tiles and a boundary inside the first, empty groups, a rest behind."""
    x, weights, cotangent = make(rows=140, experts=3)
    sizes = (30, 0, 105)
    run = with_gradients(implementation="tpu", interpret=simulator)
    found = run(x, weights, cotangent, np.asarray(sizes))
    for value, right in zip(found, written_out(x, weights, cotangent, sizes), strict=True):
        np.testing.assert_allclose(value, right, atol=2e-5)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(("rows", "features", "columns"), [(32, 4096, 14336), (8192, 2048, 1408)])
def test_lowers_without_the_device(implementation, rows, features, columns, lower):
    """Mixtral in decoding; 64 narrow experts in training."""
    x, weights, cotangent = jax.eval_shape(lambda: make_shapes(rows, features, columns))
    sizes = jax.ShapeDtypeStruct(weights.shape[:1], jnp.int32)
    text = lower(
        with_gradients(implementation=implementation), (x, weights, cotangent, sizes), implementation
    )
    assert text.count({"tpu": "tpu_custom_call", "gpu": "triton"}[implementation]) >= 3


class Structured:
    """In the place of a kernel that is not an array."""


def make_shapes(rows, features, columns):
    experts = 8 if rows < 100 else 64
    shapes = ((rows, features), (experts, features, columns), (rows, columns))
    return tuple(jnp.zeros(shape, jnp.bfloat16) for shape in shapes)


def test_as_the_product_of_a_dispatch():
    """Sorted dispatch with the kernel gives what it gives without, and says where it cannot run."""
    rng = np.random.default_rng(0)
    x, logits = (rng.normal(size=(24, size)).astype(np.float32) for size in (16, 4))
    kernel = rng.normal(size=(4, 16, 16)).astype(np.float32)
    routing = jax.jit(functools.partial(route, k=2))(logits, mask=np.arange(24) < 20)

    @functools.partial(jax.jit, static_argnums=2)
    def run(routing, kernel, dot):
        dispatch = make_dispatch(routing, "sorted", grouped_dot=dot)
        return dispatch.combine(dispatch.dot(dispatch.scatter(x), kernel), routing.gate)

    def layer(dot):
        return run(routing, kernel, dot)

    np.testing.assert_allclose(layer(PallasGroupedDot("tpu", interpret=True)), layer(None), atol=1e-5)
    with pytest.raises(UserError, match="cannot run: a kernel is Structured, not an array"):
        PallasGroupedDot("tpu")(x, Structured(), np.zeros(4, np.int32))
    with pytest.raises(UserError, match="goes with dispatch='sorted'"):
        make_dispatch(routing, "dense", grouped_dot=PallasGroupedDot())
    if jax.default_backend() == "cpu":
        with pytest.raises(UserError, match="no grouped matmul kernel for the backend 'cpu'"):
            layer(PallasGroupedDot())


def test_what_cannot_be_computed_is_refused():
    x, weights, _ = make()
    sizes = np.zeros(6, np.int32)
    with pytest.raises(
        Unsupported, match=r"weights have shape \(6, 8, 32\), expected \[groups, 16, columns\]"
    ):
        grouped_matmul(x, weights[:, :8], sizes, implementation="reference")
    with pytest.raises(Unsupported, match=r"sizes has shape \(5,\), expected \(6,\)"):
        grouped_matmul(x, weights, sizes[:5], implementation="tpu")
    with pytest.raises(Unsupported, match="x is float16"):
        grouped_matmul(x.astype(jnp.float16), weights, sizes, implementation="gpu")
    with pytest.raises(Unsupported, match="8 features: the gpu kernel takes multiples of 16"):
        grouped_matmul(x[:, :8], weights[:, :8], sizes, implementation="gpu")
    with pytest.raises(
        Unsupported, match="700 columns: the tpu kernel takes multiples of 128, or at most 512"
    ):
        grouped_matmul(x, np.zeros((6, 16, 700), np.float32), sizes, implementation="tpu")
