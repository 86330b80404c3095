"""Cross-entropy and its gradient on a CPU: by hand, against float64, and wherever logits are no finite numbers."""

import math
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.cross_entropy import Unsupported, cpu, cross_entropy

UNIT = 2.0**-24  # by which a rounding changes a number at most


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def labels_of(rows: int, classes: int) -> np.ndarray:
    return np.random.default_rng(9).integers(0, classes, rows).astype(np.int32)


def pulled(function, logits, labels, nats, partition):
    """nats, logsumexp, correct, and the gradient of the logits from cotangents of the first two."""
    outputs, pull = jax.vjp(lambda logits: function(logits, labels), logits)
    return tuple(map(np.asarray, (*outputs, *pull((nats, partition, np.ones_like(nats))))))


def plain(logits, labels):
    return cross_entropy(logits, labels, implementation="reference")


def test_by_hand():
    # Classes of probability 1/4 and 3/4. Of nats: p - onehot; of logsumexp: p.
    logits = np.log(np.float32([[1, 3], [1, 3]]))
    cotangents = np.float32([1, 2]), np.float32([0, 10])
    nats, partition, correct, gradient = pulled(cross_entropy, logits, np.int32([0, 1]), *cotangents)
    np.testing.assert_allclose(nats, [math.log(4), math.log(4 / 3)], rtol=1e-6)
    np.testing.assert_allclose(partition, [math.log(4)] * 2, rtol=1e-6)
    assert correct.tolist() == [0, 1]
    np.testing.assert_allclose(gradient, [[-0.75, 0.75], [0.25 * 12, 0.75 * 12 - 2]], rtol=1e-6)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("rows, classes", [(1, 1), (1, 5), (9, 16), (8, 64), (3, 100), (20, 333), (2, 4096)])
def test_against_float64(lanes: int, rows: int, classes: int):
    # Wider vectors than the processor's are cut by LLVM: the code of every processor runs here.
    logits, labels = 3 * drawn((rows, classes)), labels_of(rows, classes)
    a, b = drawn((rows,), 1), drawn((rows,), 2)
    kernel = lambda logits, labels: cpu.cross_entropy(logits, labels, lanes)  # noqa: E731
    nats, partition, correct, gradient = pulled(kernel, logits, labels, a, b)
    wide = logits.astype(np.float64)
    top = wide.max(1, keepdims=True)
    total = np.exp(wide - top).sum(1, keepdims=True)
    expected, chosen = (top + np.log(total))[:, 0], wide[np.arange(rows), labels]
    # The sum runs in 16 parts at least; an exponential is wrong by 4 units for the difference and its polynomial.
    roundings = (classes / 16 + 16) * UNIT
    bound = roundings + 4 * UNIT * (np.abs(expected) + np.abs(chosen))
    assert np.all(np.abs(partition - expected) <= bound)
    assert np.all(np.abs(nats - (expected - chosen)) <= bound)
    assert np.array_equal(correct, labels == logits.argmax(1))
    # The difference to the maximum, up to 20 here, is rounded before the exponential.
    soft = np.exp(wide - top) / total * (a + b)[:, None]
    hot = np.eye(classes)[labels] * a[:, None]
    assert np.all(
        np.abs(gradient - (soft - hot)) <= (roundings + 20 * UNIT) * np.abs(soft) + 2 * UNIT * np.abs(hot)
    )


def test_ties_are_correct():
    logits = np.float32([[1, 2, 2, 0]] * 4)
    _, _, correct = cross_entropy(logits, np.int32([0, 1, 2, 3]))
    assert correct.tolist() == [0, 1, 1, 0]


def test_large_logits_are_exact():
    logits = np.float32([[1e4, 0, -1e4]] * 3)
    one, none = np.ones(3, np.float32), np.zeros(3, np.float32)
    nats, partition, correct, gradient = pulled(cross_entropy, logits, np.int32([0, 1, 2]), one, none)
    assert (
        nats.tolist() == [0, 1e4, 2e4] and partition.tolist() == [1e4] * 3 and correct.tolist() == [1, 0, 0]
    )
    assert gradient.tolist() == [[0, 0, 0], [1, -1, 0], [1, 0, -1]]


def test_classes_that_are_masked_out_take_no_part():
    logits, labels = drawn((4, 50)), labels_of(4, 20)
    masked = logits.copy()
    masked[:, 20:] = -np.inf
    one = np.ones(4, np.float32)
    found, few = (
        pulled(cross_entropy, masked, labels, one, one),
        pulled(cross_entropy, logits[:, :20], labels, one, one),
    )
    np.testing.assert_allclose(found[0], few[0], rtol=1e-6)
    np.testing.assert_allclose(found[3][:, :20], few[3], rtol=1e-5, atol=1e-6)
    assert not found[3][:, 20:].any()


def test_what_is_not_finite_comes_out_as_from_the_reference():
    inf, nan = np.inf, np.nan
    rows = [
        [0, nan, 1],
        [nan, nan, nan],
        [inf, 0, 1],
        [-inf, -inf, -inf],
        [inf, -inf, nan],
        [-inf, 0, 1],
        [0, 0, 0],
    ]
    logits, zero = np.float32(rows), np.zeros(len(rows), np.float32)
    for label in range(3):
        labels = np.full(len(rows), label, np.int32)
        found = pulled(cross_entropy, logits, labels, zero + 1, zero)
        expected = pulled(plain, logits, labels, zero + 1, zero)
        for number in range(3):
            np.testing.assert_allclose(found[number], expected[number], rtol=1e-6)  # equal where not finite
        # Without a finite maximum there is no gradient; the reference has zeros in some places of such a row.
        assert np.isnan(found[3][:5]).all() and np.isnan(expected[3][:5]).any(1).all()
        np.testing.assert_allclose(found[3][5:], expected[3][5:], rtol=1e-6)


def test_one_bad_logit_among_many_is_seen():
    for place in range(100):
        logits = drawn((1, 100))
        logits[0, place] = np.nan
        assert np.isnan(cross_entropy(logits, np.int32([5]))[0]).all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_labels_count_from_behind_and_may_be_no_class(dtype):
    labels = np.array([0, 6, 7, 100, 255, 249, 248]).astype(dtype)  # as int8: -1, -7, -8
    logits, a, b = drawn((7, 7)), drawn((7,), 1), drawn((7,), 2)
    found, expected = pulled(cross_entropy, logits, labels, a, b), pulled(plain, logits, labels, a, b)
    assert np.isnan(found[0]).sum() == np.isnan(expected[0]).sum() >= 3
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_gradient_does_not_overwrite_logits_that_are_used():
    logits, labels = drawn((9, 30)), labels_of(9, 30)

    @jax.jit
    def run(logits):
        logits = 2 * logits
        gradient = jax.grad(lambda x: jnp.sum(cross_entropy(x, labels)[0]))(logits)
        return logits, gradient, jnp.cumsum(logits, axis=1)

    kept, gradient, sums = run(logits)
    assert np.array_equal(kept, 2 * logits)
    np.testing.assert_allclose(sums, np.cumsum(2 * logits, axis=1), rtol=1e-5, atol=1e-5)
    one, none = np.ones(9, np.float32), np.zeros(9, np.float32)
    assert np.array_equal(gradient, pulled(cross_entropy, 2 * logits, labels, one, none)[3])


def test_a_row_has_the_same_bits_alone_and_among_others():
    logits, labels, a, b = drawn((100, 300)), labels_of(100, 300), drawn((100,), 1), drawn((100,), 2)
    together = pulled(cross_entropy, logits, labels, a, b)
    for first, last in ((0, 1), (7, 10), (50, 100)):
        own = pulled(cross_entropy, *(array[first:last] for array in (logits, labels, a, b)))
        assert all(np.array_equal(one, all_[first:last]) for one, all_ in zip(own, together, strict=True))


def test_many_callers_at_once():
    # Who finds the threads taken computes alone: the bits are the same with helpers and without.
    labels = labels_of(300, 400)
    gradient = jax.jit(jax.value_and_grad(lambda logits: jnp.sum(cross_entropy(logits, labels)[0])))
    logits = drawn((300, 400))
    expected = jax.device_get(gradient(logits))

    def call(_: int) -> bool:
        return all(map(np.array_equal, jax.device_get(gradient(logits)), expected))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(100)))


def test_under_jit_scan_remat_and_vmap():
    parts, labels = drawn((3, 6, 40)), labels_of(6, 40)

    def gradients(function):
        def loss(parts):
            @jax.checkpoint
            def add(total, logits):
                nats, partition, _ = function(logits, labels)
                return total + jnp.sum(nats + 0.1 * partition**2), None

            return jax.lax.scan(add, 0.0, parts)[0]

        each = jax.vmap(jax.grad(lambda logits: jnp.sum(function(logits, labels)[0])))
        return jax.jit(jax.grad(loss))(parts), each(parts)

    for one, other in zip(gradients(cross_entropy), gradients(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_no_rows():
    found = pulled(
        cross_entropy, np.zeros((0, 5), np.float32), np.zeros(0, np.int32), *np.zeros((2, 0), np.float32)
    )
    assert [array.shape for array in found] == [(0,), (0,), (0,), (0, 5)]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(logits=jnp.zeros((2, 5), jnp.bfloat16)),
            "logits are bfloat16, labels int32: expected float32 and",
        ),
        (
            dict(labels=np.zeros(2, np.float32)),
            "logits are float32, labels float32: expected float32 and integers",
        ),
        (
            dict(labels=np.zeros(3, np.int32)),
            r"logits \(2, 5\) with labels \(3,\): expected \[N, V\] and \[N\]",
        ),
        (dict(logits=np.zeros((2, 0), np.float32)), r"expected \[N, V\] and \[N\]"),
        (dict(implementation="tpu"), "no implementation 'tpu': there are reference and cpu"),
    ],
)
def test_bad_arguments(change: dict, message: str):
    given = dict(logits=np.zeros((2, 5), np.float32), labels=np.zeros(2, np.int32)) | change
    with pytest.raises(Unsupported, match=message):
        cross_entropy(**given)
