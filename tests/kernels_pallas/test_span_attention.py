"""Span attention: the kernels against the plain form, with all gradients; what is not listed is not read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.span_attention import Unsupported, span_attention, work

KERNELS = ("tpu", "gpu")
# Heads of 75 tokens, two a key head: a short window; one that sees its sinks alone; everything; window and sinks.
WINDOWS, SINKS = (3, 0, 75, 20), (0, 2, 2, 17)
SEGMENTS = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 1, 1]], [20, 13, 27, 15], axis=1))


def make(batch=2, heads=4, kv_heads=2, length=75, dim=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    sizes = (heads, kv_heads, kv_heads)
    return tuple(jnp.asarray(rng.normal(size=(batch, h, length, dim)), dtype) for h in sizes)


def results(arguments, *spans, **options):
    """The output, and the gradients of an asymmetric function of it."""

    def loss(*arguments):
        out = span_attention(*arguments, *spans, **options)
        return jnp.sum(out * (jnp.arange(out.size).reshape(out.shape) % 7 - 3.0)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
    return dict(zip(("out", "query", "key", "value"), (out, *gradients), strict=True))


def compare(found, right, atol):
    for name, value in right.items():
        np.testing.assert_allclose(
            np.asarray(found[name], np.float64), np.asarray(value, np.float64), atol=atol, err_msg=name
        )


def test_the_plain_form_is_attention_over_the_spans():
    """Queries of 0 weigh all they see alike. Values 1, 2, 4, 8, window 2, one sink: 1, (1 + 2) / 2,
    (1 + 2 + 4) / 3, (1 + 4 + 8) / 3. Window 0 without sinks sees nothing; in segments 1 1 2 0 the sink is
    seen in its own alone: 1, 3 / 2, 4, nothing."""
    value = jnp.broadcast_to(jnp.asarray([1.0, 2.0, 4.0, 8.0])[:, None], (1, 1, 4, 16))
    query = jnp.zeros((1, 2, 4, 16))

    def out(*arguments):
        return span_attention(query, value, value, (2, 0), (1, 0), *arguments, implementation="reference")[
            0, :, :, 0
        ]

    np.testing.assert_allclose(out(), [[1, 1.5, 7 / 3, 13 / 3], [0, 0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(out(jnp.asarray([[1, 1, 2, 0]]))[0], [1, 1.5, 4, 0], rtol=1e-6)


@pytest.mark.parametrize("implementation", KERNELS)
def test_is_the_plain_form_with_its_gradients(implementation):
    """75 is no multiple of the block; segments, a soft cap, rows that see nothing (sinks of another segment).
    Sums of up to 150 terms of size 10 at most."""
    spans = (WINDOWS, SINKS)
    if implementation == "gpu":
        spans = tuple(jnp.asarray(x) for x in spans)
    options = dict(softcap=3.0, segments=SEGMENTS)
    found = results(make(), *spans, **options, implementation=implementation, block=16, interpret=True)
    compare(found, results(make(), WINDOWS, SINKS, **options, implementation="reference"), atol=1e-5)
    assert not np.any(np.asarray(found["out"])[0, :, 60:])  # padding sees nothing


def test_tiles_that_are_not_listed_are_not_read():
    """Without segments; then with NaN in the second block of keys. Queries of blocks that do not list it keep their
    output and their gradient, to the bit."""
    arguments = make(heads=2, kv_heads=1, batch=1)
    spans = ((3, 20), (5, 0))
    options = dict(implementation="tpu", block=16, interpret=True)
    right = results(arguments, *spans, **options)
    compare(right, results(arguments, *spans, implementation="reference"), atol=1e-5)
    query, key, value = (x.at[:, :, 16:32].set(jnp.nan) if i else x for i, x in enumerate(arguments))
    found = results((query, key, value), *spans, **options)
    listed = work.tiles(*spans, 80, 16, 16)[0][:, :, 1]
    assert listed.tolist() == [[False, True, True, False, False], [False, True, True, True, False]]
    unread = np.repeat(~listed, 16, axis=1)[None, :, :75]
    for name in ("out", "query"):
        np.testing.assert_array_equal(np.asarray(found[name])[unread], np.asarray(right[name])[unread])
        assert np.all(np.isnan(np.asarray(found[name])[0, :, 16:32]))  # they see themselves


@pytest.mark.parametrize("sides", [(16, 16), (32, 16), (16, 32)])
def test_the_list_is_the_tiles_with_a_visible_pair(sides):
    heads, length = 4, 96
    place = np.arange(length)
    window, sink = (np.asarray(x)[:, None, None] for x in (WINDOWS, SINKS))
    distance = place[:, None] - place
    visible = (distance >= 0) & ((distance < window) | (place < sink))
    tiles = visible.reshape(heads, length // sides[0], sides[0], length // sides[1], sides[1])
    some, every = tiles.any(axis=(2, 4)), tiles.all(axis=(2, 4))
    found = work.by_query(WINDOWS, SINKS, length, *sides)
    np.testing.assert_array_equal(np.stack(found[:3], axis=1), np.argwhere(some))
    np.testing.assert_array_equal(found.flags & work.PARTIAL != 0, ~every[some])
    by_key = work.by_key(WINDOWS, SINKS, length, *sides, 2)
    assert set(zip(*(x.tolist() for x in by_key[:3]), strict=True)) == set(
        map(tuple, np.argwhere(some).tolist())
    )
    for flags, outputs in ((found.flags, heads * length // sides[0]), (by_key.flags, 2 * length // sides[1])):
        assert np.sum(flags & work.FIRST != 0) == np.sum(flags & work.LAST != 0) == outputs


def test_the_list_is_as_long_as_the_spans():
    """8 heads of 8192 tokens in tiles of 256 x 512. Queries 512 m to 512 m + 511, two blocks of them, end in key block
    m: causal, a head lists 2 * (1 + ... + 16) = 272. A window of 1024 n begins in key block m - 2 n, so that at most
    2 n + 1 are listed: 2 * (1 + 2 + 14 * 3) = 90 for n = 1, then 140, 182, 216, 242, 260, 270 and 272. A head that
    sees nothing lists one masked tile for each of its blocks."""
    windows = tuple(1024 * n for n in range(1, 9))
    assert len(work.by_query((8192,) * 8, (0,) * 8, 8192, 256, 512).head) == 8 * 272
    found = np.bincount(work.by_query(windows, (0,) * 8, 8192, 256, 512).head)
    assert found.tolist() == [90, 140, 182, 216, 242, 260, 270, 272]
    assert len(work.by_query((0,), (0,), 8192, 256, 512).head) == 32


@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16(implementation):
    arguments = make(batch=1, length=40, dtype=jnp.bfloat16)
    options = dict(implementation=implementation, interpret=True)
    found = jax.jit(lambda *x: span_attention(*x, 9, 2, **options, block=16))(*arguments)
    assert found.dtype == jnp.bfloat16
    exact = tuple(x.astype(jnp.float32) for x in arguments)
    exact = jax.jit(lambda *x: span_attention(*x, 9, 2, implementation="reference"))(*exact)
    # Inputs are the same rounded numbers; weights and the output are rounded to 8 bits once each.
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, atol=2e-2)


def test_in_the_simulator(simulator):
    """Two blocks; the first head has a window and a sink, the second nothing but a masked tile for each block."""
    arguments = make(batch=1, heads=2, kv_heads=1, length=32)
    spans = ((5, 0), (1, 0))
    found = results(arguments, *spans, implementation="tpu", block=16, interpret=simulator)
    compare(found, results(arguments, *spans, implementation="reference"), atol=1e-5)


@pytest.mark.parametrize("implementation", KERNELS)
def test_lowers_without_the_device(implementation, lower):
    """32 heads on 8 of 8192 tokens with their own spans, forward and backward; short float32 ones with segments."""
    windows = tuple(256 * (1 + h % 8) for h in range(32))

    def gradients(window, sink, segments, *arguments):
        def loss(*arguments):
            out = span_attention(*arguments, window, sink, segments, implementation=implementation)
            return jnp.sum(jnp.square(out.astype(jnp.float32)))

        return jax.grad(loss, argnums=(0, 1, 2))(*arguments)

    marker = {"tpu": "tpu_custom_call", "gpu": "triton"}[implementation]
    long = jax.eval_shape(lambda: make(1, 32, 8, 8192, 128, jnp.bfloat16))
    text = lower(lambda *arguments: gradients(windows, 64, None, *arguments), long, implementation)
    assert text.count(marker) >= 3  # forward, queries, keys
    short = jax.eval_shape(lambda: (jnp.zeros((2, 1000), jnp.int32), *make(2, 8, 8, 1000, 64)))
    text = lower(lambda segments, *arguments: gradients(100, 0, segments, *arguments), short, implementation)
    assert text.count(marker) >= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(window=jnp.asarray([1, 1, 1, 1]), implementation="tpu"), "window is an array: the tpu kernel"),
        (dict(window=(1, 2, 3)), r"window=\(1, 2, 3\): expected one int, or 4 ints"),
        (dict(sink=jnp.zeros(3, jnp.int32)), r"sink is int32\[3\], expected int32\[4\]"),
        (dict(segments=jnp.ones((2, 74), jnp.int32)), r"segments has shape \(2, 74\), expected \(2, 75\)"),
        (dict(dim=24, implementation="gpu"), "head_dim=24: the gpu kernel takes powers of two"),
        (dict(dim=20, implementation="tpu"), "head_dim=20: the tpu kernel takes multiples of 8"),
        (dict(dtype=jnp.float16, implementation="tpu"), "query is float16"),
        (dict(kv_heads=3), "4 query heads are not a multiple of 3 key heads"),
        # 128 blocks of 512: 128 * 129 / 2 tiles for each of 8 heads.
        (
            dict(length=65_536, window=65_536, heads=8, implementation="tpu"),
            "66048 visible tiles: the tpu kernel's list holds 60000",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(change, message):
    options = dict(implementation="reference", window=4) | change
    sizes = {
        name: options.pop(name) for name in ("heads", "kv_heads", "length", "dim", "dtype") if name in options
    }
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(lambda: span_attention(*make_zeros(**sizes), **options))


def make_zeros(batch=2, heads=4, kv_heads=2, length=75, dim=16, dtype=jnp.float32):
    return tuple(jnp.zeros((batch, h, length, dim), dtype) for h in (heads, kv_heads, kv_heads))
