"""Grouped products in the forms of training: exact where numbers are whole, at every edge, and the FFN made of them."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import Unsupported, grouped_matmul
from kernels_pallas.grouped_matmul import cpu_training as grouped
from kernels_pallas.matmul import cpu as dense


def whole(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Whole numbers: their products' sums here stay far below 2**24, so that float32 keeps them exactly."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def begins(sizes: list[int]) -> list[int]:
    return [sum(sizes[:group]) for group in range(len(sizes))]


def placed(starts: list[int], sizes: list[int]) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(starts, jnp.int32), jnp.asarray(sizes, jnp.int32)


def by_group(x: np.ndarray, w: np.ndarray, starts: list[int], sizes: list[int]) -> np.ndarray:
    y = np.zeros((len(x), w.shape[2]))
    for group, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        y[start : start + size] = x[start : start + size].astype(np.float64) @ w[group]
    return y


def gradient(x: np.ndarray, dy: np.ndarray, starts: list[int], sizes: list[int]) -> np.ndarray:
    pairs = [(x[a : a + n], dy[a : a + n]) for a, n in zip(starts, sizes, strict=True)]
    return np.stack([mine.T.astype(np.float64) @ theirs for mine, theirs in pairs])


# Rows around tiles of 12 and 6 and blocks of up to 512, columns around vectors of 16 and panels of 32, 256 terms at a
# time; groups without rows, all rows of one, rows of nobody before, between and behind groups.
CASES = [
    (1, 1, [0], [1], 1),
    (7, 5, [0, 1, 1, 4], [1, 0, 3, 2], 6),
    (33, 16, [0, 0, 0], [0, 0, 17], 17),
    (40, 95, [2, 14, 29], [12, 13, 11], 45),
    (130, 257, [0, 24, 24], [24, 0, 25], 49),
    (300, 65, [0], [1100], 1100),
    (20, 70, [0, 512, 800, 1400], [512, 257, 513, 3], 1410),
    (48, 520, [5, 5, 5], [0, 600, 0], 700),
    (600, 40, [0, 9], [9, 40], 49),
    (30, 33, [0] * 8, [0] * 8, 10),
]


@pytest.mark.parametrize("inputs, columns, starts, sizes, rows", CASES)
def test_whole_numbers_are_exact(inputs: int, columns: int, starts: list[int], sizes: list[int], rows: int):
    x, dy, w = whole((rows, inputs)), whole((rows, columns), 1), whole((len(sizes), inputs, columns), 2)
    mine = np.zeros(rows, bool)
    for start, size in zip(starts, sizes, strict=True):
        mine[start : start + size] = True
    x[~mine] = dy[~mine] = np.nan  # nobody reads them
    groups = placed(starts, sizes)
    assert np.array_equal(grouped.product(x, w, groups, "nn"), by_group(x, w, starts, sizes))
    dx = by_group(dy, w.swapaxes(1, 2), starts, sizes)
    assert np.array_equal(grouped.product(dy, w, groups, "nt"), dx)
    assert np.array_equal(grouped.summed((dy, 2 * dy), (w, 3 * w), groups), 7 * dx)
    dw, other = grouped.gradients([(x, dy), (dy, x)], groups)
    assert np.array_equal(dw, gradient(x, dy, starts, sizes))
    assert np.array_equal(other, gradient(dy, x, starts, sizes))


def test_the_derivative_is_made_of_products():
    starts, sizes = [0, 5, 5], [5, 0, 20]
    x, w, wanted = whole((27, 40)), whole((3, 40, 33), 1), whole((27, 33), 2)

    @jax.jit
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(grouped.grouped_dot(x, w, *placed(starts, sizes)) * wanted)

    dx, dw = jax.grad(loss, (0, 1))(x, w)
    assert np.array_equal(dx, by_group(wanted, w.swapaxes(1, 2), starts, sizes))
    assert np.array_equal(dw, gradient(x, wanted, starts, sizes))


def test_as_the_kernel_that_is_asked_for():
    x, w, sizes = whole((27, 40)), whole((3, 40, 33), 1), np.int32([5, 0, 20])
    y = grouped_matmul(x, w, sizes, implementation="cpu")
    assert np.array_equal(y, grouped_matmul(x, w, sizes, implementation="reference"))
    with pytest.raises(
        Unsupported, match="x is bfloat16, weights are float32: the kernel for a CPU takes float32"
    ):
        grouped_matmul(jnp.asarray(x, jnp.bfloat16), w, sizes, implementation="cpu")
    with pytest.raises(Unsupported, match=r"weights \(0, 40, 33\) are empty"):
        grouped_matmul(x, w[:0], sizes[:0], implementation="cpu")


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_any_length_give_the_bits_of_the_dense_product(lanes: int):
    # Wider vectors than the processor's are cut by LLVM: the code of every processor runs here.
    x, dy, w = drawn((600, 300)), drawn((600, 70), 1), drawn((2, 300, 70), 2)
    groups, runs = placed([0, 45], [45, 555]), [slice(0, 45), slice(45, 600)]

    def of_each(form: str, left: np.ndarray, right: np.ndarray) -> list[jax.Array]:
        pick = [right[rows] if form == "tn" else right[e] for e, rows in enumerate(runs)]
        return [
            dense.matmul(jnp.asarray(left[rows]), jnp.asarray(r), form)
            for rows, r in zip(runs, pick, strict=True)
        ]

    y, dx = grouped.product(x, w, groups, "nn", lanes), grouped.product(dy, w, groups, "nt", lanes)
    assert np.array_equal(y, np.concatenate(of_each("nn", x, w)))
    assert np.array_equal(dx, np.concatenate(of_each("nt", dy, w)))
    assert np.array_equal(grouped.gradients([(x, dy)], groups, lanes)[0], np.stack(of_each("tn", x, dy)))
    assert np.array_equal(grouped.gated(x, w, w, groups, lanes)[0], y)


def test_sums_go_on_where_the_first_product_ends():
    # One chain of multiply-adds over both: the product of what stands side by side.
    a, b, v, w = drawn((30, 50)), drawn((30, 50), 1), drawn((1, 20, 50), 2), drawn((1, 20, 50), 3)
    together = np.concatenate([a, b], axis=1), np.concatenate([v[0], w[0]], axis=1)
    found = grouped.summed((a, b), (v, w), placed([0], [30]))
    assert np.array_equal(found, dense.matmul(*map(jnp.asarray, together), "nt"))


def test_a_row_has_the_same_bits_alone_and_among_others():
    x, w = drawn((2000, 128)), drawn((4, 128, 96), 1)
    sizes = [700, 0, 1, 1290]
    together = grouped.product(x, w, placed(begins(sizes), sizes), "nn")
    for start, rows in ((3, 1), (3, 100), (650, 50)):
        alone = grouped.product(x[start : start + rows], w[:1], placed([0], [rows]), "nn")
        assert np.array_equal(alone, together[start : start + rows])


def test_bits_do_not_depend_on_how_work_is_cut(monkeypatch):
    sizes = [300, 20, 0, 700]
    x, dy, groups = drawn((1020, 140)), drawn((1020, 150), 1), placed(begins(sizes), sizes)
    w = drawn((4, 140, 150), 2)
    y, dw = grouped.product(x, w, groups, "nn"), grouped.gradients([(x, dy)], groups)[0]
    monkeypatch.setattr(grouped, "plan", lambda *_: (24, 32))
    assert np.array_equal(grouped.product(x, w, groups, "nn"), y)
    # As for 16 threads, of which there may be fewer: more rectangles.
    monkeypatch.setattr(grouped, "cores", lambda: 16)
    kernel = grouped.gradient_kernel.__wrapped__(1, dense.cpu.lanes())
    name = type(kernel)("lathe_test_more_rectangles", kernel.code).register()
    out = [jax.ShapeDtypeStruct(dw.shape, dw.dtype)]
    assert np.array_equal(jax.ffi.ffi_call(name, out)(*groups, np.zeros(1, np.int32), x, dy)[0], dw)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def test_an_ffn_by_hand():
    # One row 1 to an expert with gate 0, so silu'(0) = 1 / 2, up 3, down 5; another to one with gate 2, up 1, down 1.
    x, gate, up, down = (np.float32(v) for v in ([[1], [1]], [[[0]], [[2]]], [[[3]], [[1]]], [[[5]], [[1]]]))
    groups = placed([0, 1], [1, 1])
    y, pull = jax.vjp(lambda *args: grouped.grouped_ffn(*args, *groups), x, gate, up, down)
    dx, d_gate, d_up, d_down = map(np.ravel, pull(np.float32([[1], [1]])))
    s = 1 / (1 + np.exp(-2.0))
    slope = s + 2 * s * (1 - s)
    for found, wanted in (
        (np.ravel(y), [0, 2 * s]),
        (d_down, [0, 2 * s]),  # hidden
        (d_up, [0, 2 * s]),  # down silu(gate) x
        (d_gate, [5 * 3 / 2, slope]),  # down up silu'(gate) x
        (dx, [0, 2 * s + 2 * slope]),  # d_up up + d_gate gate
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "width, hidden, starts, sizes, rows",
    [(16, 40, [0, 30, 30, 42], [30, 0, 12, 1], 43), (70, 33, [3, 300], [290, 5], 310)],
)
def test_an_ffn_against_float64(width: int, hidden: int, starts: list[int], sizes: list[int], rows: int):
    count = len(sizes)
    x, dy = drawn((rows, width)), drawn((rows, width), 1)
    gate, up = drawn((count, width, hidden), 2) / width**0.5, drawn((count, width, hidden), 3) / width**0.5
    down = drawn((count, hidden, width), 4) / hidden**0.5
    arguments = x, gate, up, down

    @jax.jit
    def run(*arguments):
        y, pull = jax.vjp(lambda *args: grouped.grouped_ffn(*args, *placed(starts, sizes)), *arguments)
        return y, *pull(dy)

    a, b = by_group(x, gate, starts, sizes), by_group(x, up, starts, sizes)
    h = silu(a) * b
    dh = by_group(dy, down.swapaxes(1, 2), starts, sizes)
    s = 1 / (1 + np.exp(-a))
    da, db = dh * b * (s + a * s * (1 - s)), dh * silu(a)
    dx = by_group(da, gate.swapaxes(1, 2), starts, sizes) + by_group(db, up.swapaxes(1, 2), starts, sizes)
    wanted = (
        by_group(h, down, starts, sizes),
        dx,
        gradient(x, da, starts, sizes),
        gradient(x, db, starts, sizes),
        gradient(h, dy, starts, sizes),
    )
    # Sums of at most 290 products of numbers near 1, each rounded: 290 * 2**-24 = 2e-5 of their sum of sizes, < 300.
    for found, expected in zip(run(*arguments), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_silu_and_its_gradient_over_their_whole_range():
    gate = np.float32([[-200, -90, -87, -30, -1e-3, 0, 1e-3, 30, 87, 90, 200]])
    one, groups = np.ones((1, 1, 11), np.float32), placed([0], [1])
    a, b, hidden = grouped.gated(np.ones((1, 1), np.float32), gate[None], one, groups)
    d_gate, d_up = grouped.gated_backward(np.ones((1, 1), np.float32), one.swapaxes(1, 2), (a, b), groups)
    wide = gate.astype(np.float64)
    s = 1 / (1 + np.exp(-wide))
    # Far below 0 the exponential ends at e^88: what is 1e-36 or less may be anything as small.
    np.testing.assert_allclose(hidden, silu(wide), rtol=1e-6, atol=1e-35)
    np.testing.assert_allclose(d_up, silu(wide), rtol=1e-6, atol=1e-35)
    np.testing.assert_allclose(d_gate, s + wide * s * (1 - s), rtol=1e-5, atol=1e-35)


def test_groups_outside_of_the_rows_write_nowhere():
    x, w = whole((10, 8)), whole((3, 8, 4), 1)
    y = grouped.product(x, w, placed([0, 8, 40], [4, 500, 5]), "nn")
    assert np.array_equal(y, by_group(x, w, [0, 8, 10], [4, 2, 0]))
    dw = grouped.gradients([(x, x)], placed([0, 8, 40], [4, 500, 5]))[0]
    assert np.array_equal(dw, gradient(x, x, [0, 8, 10], [4, 2, 0]))


def test_inside_a_loop_under_jit_and_vmap():
    x, w, sizes = whole((2, 13, 6)), whole((2, 6, 6), 1), np.int32([[4, 9], [0, 13]])

    @jax.jit
    def twice(x: jax.Array, sizes: jax.Array) -> jax.Array:
        groups = jnp.cumsum(sizes) - sizes, sizes
        return jax.lax.fori_loop(0, 2, lambda _, y: grouped.grouped_dot(y, w, *groups), x)

    for found, mine, size in zip(jax.vmap(twice)(x, sizes), x, sizes.tolist(), strict=True):
        once = by_group(mine, w, begins(size), size).astype(np.float32)
        assert np.array_equal(found, by_group(once, w, begins(size), size))


def test_many_callers_at_once():
    x, w, groups = drawn((1200, 64)), drawn((2, 64, 96), 1), placed([0, 500], [500, 700])
    call = jax.jit(lambda x: grouped.product(x, w, groups, "nn"))
    wanted = np.asarray(call(x))
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: np.asarray(call(x)), range(40)):
            assert np.array_equal(found, wanted)


@pytest.mark.parametrize("threads", [1, 2, 16, 64])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_plans_are_of_whole_tiles_and_have_a_piece_for_every_thread(threads: int, lanes: int):
    for rows, columns, depth in ((8192, 256, 128), (8192, 1024, 512), (50, 32, 32), (1, 1, 1)):
        tall, wide = grouped.plan(rows, columns, depth, threads, lanes)
        assert tall % grouped.rows_of_a_tile(lanes) == 0 and wide % (grouped.VECTORS * lanes) == 0
        assert 0 < tall <= grouped.MOST_ROWS and 0 < wide < columns + grouped.VECTORS * lanes
        if rows == 8192:
            assert rows / tall * -(-columns // wide) >= threads
