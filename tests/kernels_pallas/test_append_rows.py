"""New rows written into many buffers by one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.append_rows import Unsupported, append_rows
from research.nn.cache import Cache, DenseCache
from research.nn.cpu_kernels import without_cpu_kernels


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BUFFERS = [drawn(3, 2, 7, 5), drawn(3, 4, 9, 20, seed=1), drawn(3, 1, 4, 16, seed=2)]
ROWS = [drawn(3, 2, 2, 5, seed=3), drawn(3, 4, 2, 20, seed=4), drawn(3, 1, 3, 16, seed=5)]


def test_rows_stand_where_they_belong():
    start = np.array([0, 4, 1], np.int32)
    found = append_rows(BUFFERS, ROWS, start)
    for buffer, rows, new in zip(BUFFERS, ROWS, found, strict=True):
        expected = buffer.copy()
        count, slots = rows.shape[2], buffer.shape[2]
        for b in range(3):
            place = min(start[b], slots - count)  # the last buffer has 4 slots: row 1 begins at 1
            expected[b, :, place : place + count] = rows[b]
        assert np.array_equal(new, expected)


@pytest.mark.parametrize("start", [[-3, 0, 2], [100, 5, -1]])
def test_places_outside_are_moved_inside(start: list[int]):
    start = np.array(start, np.int32)
    by_kernel, by_xla = (append_rows(BUFFERS, ROWS, start, implementation=i) for i in ("cpu", "reference"))
    assert all(map(np.array_equal, by_kernel, by_xla))


def test_a_loop_writes_in_place():
    def body(_, buffers):
        return append_rows(buffers, ROWS, jnp.zeros(3, jnp.int32))

    loop = jax.jit(lambda buffers: jax.lax.fori_loop(0, 3, body, buffers), donate_argnums=0)
    text = loop.lower(tuple(map(jnp.asarray, BUFFERS))).compile().as_text()
    # Buffers of 210, 2,160 and 192 numbers: a copy of one would be an operation of its shape.
    assert "lathe_append_rows" in text
    assert not any(f"f32[3,{shape}]{{3,2,1,0}} copy(" in text for shape in ("2,7,5", "4,9,20", "1,4,16"))


def test_gradients_go_to_what_was_written_and_what_was_left():
    start = np.array([0, 4, 1], np.int32)
    weights = [drawn(*buffer.shape, seed=9) for buffer in BUFFERS]

    def loss(implementation, buffers, rows):
        out = append_rows(buffers, rows, start, implementation=implementation)
        return sum(jnp.sum(x * w) for x, w in zip(out, weights, strict=True))

    one, other = (jax.grad(loss, (1, 2))(i, BUFFERS, ROWS) for i in ("cpu", "reference"))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_a_cache_is_the_same_with_and_without():
    layers = tuple(DenseCache(drawn(3, 2, 9, 4, seed=i), drawn(3, 2, 9, 4, seed=i + 5)) for i in range(3))
    cache = Cache(layers, jnp.array([0, 3, 6], jnp.int32))
    fresh = tuple((drawn(3, 2, 3, 4, seed=i + 20), drawn(3, 2, 3, 4, seed=i + 30)) for i in range(3))
    path, count = np.array([[0, 2], [1, 2], [2, 0]], np.int32), np.array([2, 1, 0], np.int32)
    for way in (None, path):
        together = cache.commit(fresh, way, count)
        with without_cpu_kernels():
            apart = cache.commit(fresh, way, count)
        assert jax.tree.all(jax.tree.map(np.array_equal, together, apart))


@pytest.mark.parametrize(
    "buffers, rows, start, message",
    [
        (BUFFERS, ROWS[:2], 3, "3 buffers, and rows for 2"),
        (
            BUFFERS[:1],
            ROWS[1:2],
            3,
            r"rows \[3, 4, 2, 20\] at \[3\] places do not fit a buffer \[3, 2, 7, 5\]",
        ),
        (BUFFERS[:1], ROWS[:1], 2, r"rows \[3, 2, 2, 5\] at \[2\] places do not fit"),
        ([BUFFERS[0].astype(np.float16)], ROWS[:1], 3, "an array is float16: the kernel takes float32"),
        (BUFFERS[:1], [ROWS[0][0]], 3, r"a buffer \[3, 2, 7, 5\] or its rows \[2, 2, 5\] have not 4 dimensions"),
    ],
)
def test_bad_arguments(buffers: list, rows: list, start: int, message: str):
    with pytest.raises(Unsupported, match=message):
        append_rows(buffers, rows, np.zeros(start, np.int32))


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float32, bool])
def test_places_are_counted_in_32_bits(dtype: type, implementation: str):
    with pytest.raises(Unsupported, match=f"start is {np.dtype(dtype)}, not int32"):
        append_rows(BUFFERS, ROWS, np.zeros(3, dtype), implementation=implementation)


def test_a_cache_whose_count_has_64_bits():
    with jax.enable_x64(True):
        cache = Cache((DenseCache(BUFFERS[0], BUFFERS[0]),), jnp.array([1, 5, 3], jnp.int32))
        (layer,) = cache.commit(((ROWS[0], ROWS[0]),), None, np.array([2, 2, 2])).layers
    for b, place in enumerate((1, 5, 3)):
        assert np.array_equal(layer.key[b, :, place : place + 2], ROWS[0][b])
