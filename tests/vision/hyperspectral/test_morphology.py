"""Dilation and erosion against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from research.errors import UserError
from research.vision.hyperspectral.morphology import correlate, dilate, erode, neighbours

X = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
ELEMENT = jnp.abs(jax.random.normal(jax.random.key(1), (3, 3, 3)))
FLAT = jnp.zeros((3, 3, 3))


@pytest.fixture(scope="module")
def results():
    @jax.jit
    def run(x, element, flat):
        opened = dilate(erode(x, flat), flat)
        window = dict(window_dimensions=(1, 3, 3, 1), window_strides=(1, 1, 1, 1), padding="SAME")
        return {
            "dilation": dilate(x, element),
            "erosion": erode(x, element),
            "dual": -dilate(-x, element),
            "flat dilation": dilate(x, flat),
            "flat erosion": erode(x, flat),
            "flat dual": -dilate(-x, flat),
            "maximum": lax.reduce_window(x, -jnp.inf, lax.max, **window),
            "minimum": lax.reduce_window(x, jnp.inf, lax.min, **window),
            "opened": opened,
            "opened twice": dilate(erode(opened, flat), flat),
            "sum": correlate(x, element),
            "gradients": jax.grad(lambda x, k: jnp.sum(dilate(x, k) + erode(x, k)), (0, 1))(x, element),
        }

    return run(X, ELEMENT, FLAT)


def around(r: int, c: int) -> list[tuple[int, int, int, int]]:
    """(row, column, row of the element, its column) of all places in the image."""
    every = [(r + u - 1, c + v - 1, u, v) for u in range(3) for v in range(3)]
    return [place for place in every if 0 <= place[0] < 5 and 0 <= place[1] < 4]


def test_definitions(results):
    x, k = np.asarray(X), np.asarray(ELEMENT)
    dilation, erosion, total = (np.zeros_like(x) for _ in range(3))
    for r, c in np.ndindex(5, 4):
        dilation[:, r, c] = np.max([x[:, i, j] + k[u, v] for i, j, u, v in around(r, c)], axis=0)
        erosion[:, r, c] = np.min([x[:, i, j] - k[u, v] for i, j, u, v in around(r, c)], axis=0)
        total[:, r, c] = np.sum([x[:, i, j] * k[u, v] for i, j, u, v in around(r, c)], axis=0)
    np.testing.assert_array_equal(results["dilation"], dilation)
    np.testing.assert_array_equal(results["erosion"], erosion)
    np.testing.assert_allclose(results["sum"], total, rtol=0, atol=1e-5)  # 9 products of order 1


def test_duality_and_flat_elements(results):
    np.testing.assert_array_equal(results["erosion"], results["dual"])
    np.testing.assert_array_equal(results["flat erosion"], results["flat dual"])
    np.testing.assert_array_equal(results["flat dilation"], results["maximum"])
    np.testing.assert_array_equal(results["flat erosion"], results["minimum"])
    np.testing.assert_array_equal(results["opened"], results["opened twice"])
    assert (results["opened"] <= X).all() and (results["opened"] < X).any()


def test_order_where_the_element_has_its_origin(results):
    for kind in ("", "flat "):
        assert (results[f"{kind}erosion"] <= X).all() and (results[f"{kind}dilation"] >= X).all()


def test_gradients_go_to_what_was_chosen(results):
    to_x, to_element = results["gradients"]
    # Every output of the dilation passes 1 to one pixel and one place of the element, and the erosion 1 and -1.
    assert np.isclose(to_x.sum(), 2 * X.size) and np.isclose(to_element.sum(), 0.0, atol=1e-4)
    x, k = np.asarray(X), np.asarray(ELEMENT)
    wanted = np.zeros_like(k)
    for b, r, c, channel in np.ndindex(x.shape):
        places = around(r, c)
        highest = max(places, key=lambda p: x[b, p[0], p[1], channel] + k[p[2], p[3], channel])
        lowest = min(places, key=lambda p: x[b, p[0], p[1], channel] - k[p[2], p[3], channel])
        wanted[highest[2], highest[3], channel] += 1
        wanted[lowest[2], lowest[3], channel] -= 1
    np.testing.assert_allclose(to_element, wanted, atol=1e-4)


def test_even_elements_are_refused():
    with pytest.raises(UserError, match="an element of 4x4 places has no middle"):
        neighbours(X, 4, 0.0)
