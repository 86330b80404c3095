"""Decode attention over all slots, listed slots and listed pages, against attention written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import (
    Partial,
    Unsupported,
    decode_attention,
    gather_attention,
    gpu,
    merge,
    tpu,
)

IMPLEMENTATIONS = ("reference", "tpu", "gpu")
KERNELS = {"tpu": tpu, "gpu": gpu}


def make(batch=2, heads=4, kv_heads=2, count=2, slots=100, dim=16, dtype=jnp.float32):
    """query, key, value."""
    rng = np.random.default_rng(slots)
    shapes = ((heads, count), (kv_heads, slots), (kv_heads, slots))
    return tuple(jnp.asarray(rng.normal(size=(batch, *shape, dim)), dtype) for shape in shapes)


def written_out(query, key, value, seen, scale=None, softcap=None) -> Partial:
    """`seen(b, h)` gives the slots that a query sees; one query at a time, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out, lse = np.zeros(query.shape), np.full(query.shape[:3], -np.inf)
    for b, h, n in np.ndindex(lse.shape):
        group, slots = h // (query.shape[1] // key.shape[1]), seen(b, h)
        if len(slots):
            scores = (
                key[b, group, slots] @ query[b, h, n] * (query.shape[-1] ** -0.5 if scale is None else scale)
            )
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            lse[b, h, n] = np.logaddexp.reduce(scores)
            out[b, h, n] = np.exp(scores - lse[b, h, n]) @ value[b, group, slots]
    return Partial(out, lse)


def compare(found: Partial, right: Partial, atol=2e-6):
    assert found.out.dtype == found.lse.dtype == jnp.float32
    np.testing.assert_allclose(found.out, right.out, atol=atol)
    np.testing.assert_allclose(found.lse, right.lse, atol=2 * atol)


def unheld_is_nan(length, *arrays):
    held = (jnp.arange(arrays[0].shape[2]) < length[:, None])[:, None, :, None]
    return tuple(jnp.where(held, x, jnp.nan) for x in arrays)


@pytest.mark.parametrize(("implementation", "dim"), [*((name, 16) for name in IMPLEMENTATIONS), ("tpu", 128)])
def test_over_all_held_slots(implementation, dim):
    """Lengths of 0, at the edges of a block and all; what is not held is NaN. On GPU every block is a split; a TPU
    takes heads of 128 as rows and smaller ones as columns."""
    query, key, value = make(batch=4, slots=300, dim=dim)
    length = jnp.asarray([0, 128, 129, 300])
    options = dict(scale=0.4, softcap=2.0)
    right = written_out(query, key, value, lambda b, h: np.arange(length[b]), **options)
    arguments = (query, *unheld_is_nan(length, key, value), length)
    if implementation == "reference":
        run = functools.partial(decode_attention, implementation=implementation)
    else:
        run = functools.partial(KERNELS[implementation].decode_attention, block=128, interpret=True)
    compare(jax.jit(lambda *arguments: run(*arguments, **options))(*arguments), right)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("page", "sets"), [(1, 4), (8, 2)])
def test_over_listed_slots_and_pages(implementation, page, sets):
    """A list for every query head or key head, in any order, of 0 to 20 entries and of more than a step holds; the
    cache ends inside a page, and what is not listed is NaN."""
    query, key, value = make(slots=180)
    rng = np.random.default_rng(1)
    pages = -(-180 // page)
    indices = np.stack([[rng.permutation(pages)[:20] for _ in range(sets)] for _ in range(2)])
    counts = np.asarray([[20, 3, 17, 0], [1, 20, 5, 2]])[:, :sets]
    length = np.asarray([180, 150])

    def listed(b, s):
        slots = (indices[b, s, : counts[b, s], None] * page + np.arange(page)).ravel()
        return slots[slots < length[b]]

    right = written_out(query, key, value, lambda b, h: listed(b, h // (4 // sets)))
    read = np.zeros((2, 2, 180, 1), bool)
    for b, s in np.ndindex(2, sets):
        read[b, s // (sets // 2), listed(b, s)] = True
    if page == 1:  # a TPU copies no less than the tile of 8 rows around a slot
        key, value = (jnp.where(read, x, jnp.nan) for x in (key, value))
    indices = np.where(np.arange(20) < counts[..., None], indices, -(10**6))
    run = functools.partial(gather_attention, page=page, implementation=implementation, interpret=True)
    compare(jax.jit(run)(query, key, value, indices, counts, length), right)


@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16(implementation):
    arguments = make(dtype=jnp.bfloat16, count=1)
    indices = jnp.asarray([[[4, 0, 2], [1, 5, 6]]] * 2)
    found = gather_attention(
        *arguments, indices, jnp.asarray([3, 0]), page=16, implementation=implementation, interpret=True
    )
    # The inputs are the same rounded numbers; weights are rounded to 8 bits.
    pages = np.asarray(indices)[0, :, :, None] * 16 + np.arange(16)
    pages = pages.reshape(2, -1)
    right = written_out(*arguments, lambda b, h: pages[h // 2][pages[h // 2] < 100] if b == 0 else [])
    compare(found, right, atol=1e-2)


def test_parts_of_a_cache_merge_into_the_whole():
    """In any grouping; parts without keys change nothing, and only parts without keys give none."""
    query, key, value = make(slots=96)
    length = jnp.asarray([90, 40])
    attend = jax.jit(lambda *arguments: decode_attention(*arguments, implementation="reference"))
    whole = attend(query, key, value, length)
    first, second, third = (
        attend(
            query,
            *(np.asarray(x)[:, :, start : start + 32] for x in (key, value)),
            jnp.clip(length - start, 0, 32),
        )
        for start in (0, 32, 64)
    )
    assert np.all(np.isneginf(third.lse[1])) and not np.any(third.out[1])
    for merged in (merge(first, second, third), merge(third, merge(second, first))):
        compare(merged, whole, atol=1e-6)
    nothing = merge(*(jax.tree.map(lambda x: x[1], third),) * 2)
    assert np.all(np.isneginf(nothing.lse)) and not np.any(nothing.out)


def test_in_the_simulator(simulator, monkeypatch):
    """Two blocks, of which one row needs one; listed slots in three steps, of which one row needs two."""
    query, key, value = make(heads=2, kv_heads=1, count=1, slots=200, dim=8)
    length = jnp.asarray([100, 200])
    options = dict(scale=1.0, interpret=simulator)
    found = tpu.decode_attention(query, *unheld_is_nan(length, key, value), length, block=128, **options)
    compare(found, written_out(query, key, value, lambda b, h: np.arange(length[b]), scale=1.0), atol=1e-5)
    monkeypatch.setattr(tpu, "_PAGES", 2)
    indices = jnp.asarray(np.random.default_rng(0).permutation(200)[:10].reshape(2, 1, 5))
    count = jnp.asarray([[5], [3]])
    found = tpu.gather_attention(query, key, value, indices, count, jnp.full(2, 200), **options)
    right = written_out(query, key, value, lambda b, h: indices[b, 0, : count[b, 0]], scale=1.0)
    compare(found, right, atol=1e-5)


@pytest.mark.parametrize("implementation", KERNELS)
def test_lowers_without_the_device(implementation, lower):
    """A cache of 32768 slots for 32 heads on 8, bfloat16; an odd one of float32."""
    marker = {"tpu": "tpu_custom_call", "gpu": "triton"}[implementation]
    options = dict(implementation=implementation)
    integers = jax.ShapeDtypeStruct((4,), jnp.int32)
    for sizes in ((4, 32, 8, 1, 32768, 128, jnp.bfloat16), (4, 6, 3, 5, 1001, 64)):
        arrays = jax.eval_shape(lambda sizes=sizes: make_zeros(*sizes))
        assert marker in lower(
            lambda *arguments: decode_attention(*arguments, **options), (*arrays, integers), implementation
        )
        for page, sets in ((1, sizes[1]), (16, sizes[2])):
            lists = jax.ShapeDtypeStruct((4, sets, 100), jnp.int32)
            assert marker in lower(
                lambda *arguments, page=page: gather_attention(*arguments, page=page, **options),
                (*arrays, lists, integers),
                implementation,
            )


def make_zeros(batch, heads, kv_heads, count, slots, dim, dtype=jnp.float32):
    return jnp.zeros((batch, heads, count, dim), dtype), *(
        jnp.zeros((batch, kv_heads, slots, dim), dtype),
    ) * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation=None), "no decode attention kernel for the backend 'cpu'"),
        (dict(implementation="gpu", dim=24), "head_dim=24: the gpu kernel takes powers of two"),
        (dict(implementation="tpu", dim=20), "head_dim=20: the tpu kernel takes multiples of 8"),
        (dict(implementation="tpu", page=4), "page=4: the tpu kernel takes single slots"),
        (dict(implementation="tpu", entries=60_000), "240000 indices: a tpu's scalar memory holds 200000"),
        (dict(page=0), "page=0: a page has at least one slot"),
        (dict(sets=3), r"indices has shape \(2, 3, 4\), expected \[2, s, K\] with s a multiple of 2"),
        (dict(counts=(3,)), r"count has shape \(3,\), expected \(2,\) or \(2, 2\)"),
        (dict(dtype=jnp.float16, implementation="tpu"), "query is float16"),
        (dict(kv_heads=3), "4 query heads are not a multiple of 3 key heads"),
    ],
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what happens where there is no kernel")
def test_what_cannot_be_computed_is_refused(change, message):
    options = dict(implementation="reference", page=1, sets=2, entries=4, counts=(2,)) | change
    sizes = dict(batch=2, heads=4, kv_heads=2, count=1, slots=32, dim=16, dtype=jnp.float32)
    sizes |= {name: options.pop(name) for name in sizes if name in options}
    lists = jnp.zeros((2, options.pop("sets"), options.pop("entries")), jnp.int32)
    count = jnp.zeros(options.pop("counts"), jnp.int32)
    with pytest.raises(Unsupported, match=message):
        gather_attention(*make_zeros(**sizes), lists, count, **options)
