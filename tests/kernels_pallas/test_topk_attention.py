"""Top-k selection: exactly the set of a stable argsort of the scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.topk_attention import Unsupported, gpu, topk_attention, tpu
from kernels_pallas.topk_attention.common import kth_largest, ordered

KERNELS = {"tpu": tpu, "gpu": gpu}


def make(batch=3, heads=4, kv_heads=2, slots=700, dim=16, dtype=jnp.float32):
    """Small whole numbers: sums are exact in any order and most scores occur many times."""
    rng = np.random.default_rng(0)
    shapes = ((heads,), (kv_heads, slots))
    return tuple(jnp.asarray(rng.integers(-2, 3, size=(batch, *shape, dim)), dtype) for shape in shapes)


def written_out(query, key, length, k, per):
    """Ascending slots of the k first of a stable descending argsort; 0 behind them."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    batch, heads, _ = query.shape
    kv_heads = key.shape[1]
    scores = np.einsum("bhgd,bhkd->bhgk", query.reshape(batch, kv_heads, heads // kv_heads, -1), key)
    scores = scores.reshape(batch, heads, -1) if per == "head" else scores.max(axis=2)
    indices = np.zeros((*scores.shape[:2], k), np.int32)
    for b, h in np.ndindex(indices.shape[:2]):
        chosen = np.sort(np.argsort(-scores[b, h, : length[b]], kind="stable")[:k])
        indices[b, h, : len(chosen)] = chosen
    return indices, np.minimum(length, k)


def compare(found, right):
    assert found[0].dtype == found[1].dtype == jnp.int32
    np.testing.assert_array_equal(found[0], right[0])
    np.testing.assert_array_equal(found[1], right[1])


def unheld_is_nan(key, length):
    return jnp.where((jnp.arange(key.shape[2]) < length[:, None])[:, None, :, None], key, jnp.nan)


@pytest.mark.parametrize("per", ["head", "group"])
def test_the_plain_form_takes_the_first_of_equals(per):
    query, key = make()
    length = np.asarray([537, 0, 7])
    found = topk_attention(
        query, unheld_is_nan(key, length), jnp.asarray(length), 9, per=per, implementation="reference"
    )
    compare(found, written_out(query, key, length, 9, per))
    few = topk_attention(query, key[:, :, :5], jnp.asarray([5, 0, 3]), 9, per=per, implementation="reference")
    compare(few, written_out(query, key[:, :, :5], np.asarray([5, 0, 3]), 9, per))


# On TPU more than one line of 128 results, on GPU two splits whose lists overflow.
@pytest.mark.parametrize(
    ("implementation", "per", "k", "block"),
    [("tpu", "head", 130, 128), ("tpu", "group", 5, 256), ("gpu", "head", 5, 16), ("gpu", "group", 40, 16)],
)
def test_is_the_set_of_a_stable_argsort(implementation, per, k, block):
    """More slots than a chunk square of the TPU's and than a GPU list hold; lengths of 0, below k, and all. A TPU
    takes keys of 128 as rows and smaller ones as columns."""
    slots = 17_000 if (implementation, per) == ("tpu", "head") else 1_100
    query, key = make(slots=slots, dim=128 if (implementation, per) == ("tpu", "group") else 16)
    length = np.asarray([slots, 0, 4])
    arguments = (query, unheld_is_nan(key, length), jnp.asarray(length), k)
    kernel = jax.jit(
        lambda *x: KERNELS[implementation].topk_attention(*x, k, per=per, block=block, interpret=True)
    )
    compare(kernel(*arguments[:3]), written_out(query, key, length, k, per))


@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16(implementation):
    """Keys and queries of 8 bits; whole numbers, so that nothing is rounded."""
    query, key = make(batch=1, slots=200, dtype=jnp.bfloat16)
    length = np.asarray([199])
    found = topk_attention(query, key, jnp.asarray(length), 33, implementation=implementation, interpret=True)
    compare(found, written_out(query, key, length, 33, "head"))


def test_integers_in_the_order_of_floats():
    """Zero has one sign. The k-th largest of 3, -1, 3, -inf, 0: 3, 3, 0, -1, -inf."""
    floats = jnp.asarray([-jnp.inf, -2.5, -1e-30, -0.0, 0.0, 1e-30, 2.5, jnp.inf])
    whole = np.asarray(ordered(floats))
    assert np.all(np.diff(whole)[[0, 1, 2, 4, 5, 6]] > 0) and whole[3] == whole[4] == 0
    scores = ordered(jnp.asarray([3.0, -1.0, 3.0, -jnp.inf, 0.0]))
    found = kth_largest(lambda t: jnp.sum(scores >= t[:, None], axis=1), jnp.arange(6), (6,))
    right = [jnp.iinfo(jnp.int32).max, *ordered(jnp.asarray([3.0, 3.0, 0.0, -1.0, -jnp.inf]))]
    np.testing.assert_array_equal(found, right)


def test_in_the_simulator(simulator):
    query, key = make(batch=2, heads=2, kv_heads=1, slots=300, dim=8)
    length = np.asarray([130, 300])
    found = tpu.topk_attention(
        query, unheld_is_nan(key, length), jnp.asarray(length), 6, per="head", block=128, interpret=simulator
    )
    compare(found, written_out(query, key, length, 6, "head"))


@pytest.mark.parametrize("implementation", KERNELS)
def test_lowers_without_the_device(implementation, lower):
    """131072 slots for 32 heads on 8, bfloat16; an odd float32 cache."""
    marker = {"tpu": "tpu_custom_call", "gpu": "triton"}[implementation]
    for sizes, k in (((2, 32, 8, 131_072, 128, jnp.bfloat16), 512), ((2, 6, 3, 1001, 64, jnp.float32), 20)):
        shapes = (
            *jax.eval_shape(lambda sizes=sizes: make_zeros(*sizes)),
            jax.ShapeDtypeStruct((2,), jnp.int32),
        )
        for per in ("head", "group"):
            assert marker in lower(
                lambda *x, k=k, per=per: topk_attention(*x, k, per=per, implementation=implementation),
                shapes,
                implementation,
            )


def make_zeros(batch, heads, kv_heads, slots, dim, dtype):
    return jnp.zeros((batch, heads, dim), dtype), jnp.zeros((batch, kv_heads, slots, dim), dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=0), "k=0: at least one slot"),
        (dict(per="row"), "per='row': there are 'head' and 'group'"),
        (dict(k=5000, implementation="gpu"), "k=5000: the gpu kernel selects up to 4096"),
        (
            dict(slots=5_000_000, implementation="tpu"),
            "5000000 slots: the scores of a key head's queries take",
        ),
        (dict(dim=24, implementation="gpu"), "head_dim=24: the gpu kernel takes powers of two"),
        (dict(dtype=jnp.float16, implementation="tpu"), "query is float16"),
        (dict(kv_heads=3), "4 query heads are not a multiple of 3 key heads"),
    ],
)
def test_what_cannot_be_computed_is_refused(change, message):
    options = dict(implementation="reference", k=4, per="head") | change
    sizes = dict(batch=1, heads=4, kv_heads=2, slots=32, dim=16, dtype=jnp.float32)
    sizes |= {name: options.pop(name) for name in sizes if name in options}
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(lambda: topk_attention(*make_zeros(**sizes), jnp.zeros(1, jnp.int32), **options))
