"""Span attention on a CPU: the plain form with all gradients, the same bits whatever stands beside a row, and what is
not seen is not read."""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import cpu
from kernels_pallas.span_attention import Unsupported, span_attention, takes_on_cpu

DIM = 2 * cpu.lanes()
# Of four heads on two: a short window; its sinks alone; everything; window and sinks.
SPANS = ((3, 0, 1000, 150), (0, 2, 2, 17))
# 300 tokens: more than one section of queries and than two chunks of keys. A segment that comes back, and padding.
SEGMENTS = np.repeat([[1, 2, 3, 0, 0], [1, 5, 1, 2, 2]], [20, 113, 107, 47, 13], axis=1).astype(np.int32)


def make(batch=2, heads=4, kv_heads=2, length=300, dim=DIM) -> tuple[jax.Array, ...]:
    """query, key, value, and a gradient of the output."""
    rng = np.random.default_rng(length)
    sizes = (heads, kv_heads, kv_heads, heads)
    return tuple(jnp.asarray(rng.normal(size=(batch, h, length, dim)), jnp.float32) for h in sizes)


@partial(jax.jit, static_argnames=("window", "sink", "softcap", "scale", "implementation"))
def results(query, key, value, gradient, segments=None, *, window, sink=0, implementation="cpu", **options):
    """The output and the gradients of query, key and value."""

    def run(*arrays):
        return span_attention(*arrays, window, sink, segments, implementation=implementation, **options)

    out, pull = jax.vjp(run, query, key, value)
    return out, *pull(gradient)


def compare(found, right) -> None:
    """An output is a mean of numbers of size 1 to 4. A gradient is a sum of up to 600 products of size 10 at most, and
    each of their roundings is 2**-24 of it: together about sqrt(600) 10 2**-24 = 1.5e-5."""
    for name, atol, one, other in zip(
        ("out", "query", "key", "value"), (1e-5, *[5e-5] * 3), found, right, strict=True
    ):
        np.testing.assert_allclose(one, other, atol=atol, err_msg=name)


def same(found, right) -> None:
    for name, one, other in zip(("out", "query", "key", "value"), found, right, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


def test_by_hand():
    """Queries of 0 weigh all they see alike. Values 1, 2, 4, 8, window 2, one sink: 1, (1 + 2) / 2, (1 + 2 + 4) / 3,
    (1 + 4 + 8) / 3. Window 0 without sinks sees nothing; in segments 1 1 2 0 the sink is seen in its own alone: 1,
    3 / 2, 4, nothing. Powers of 2^0 and sums of halves are exact, thirds are rounded.

    Gradients of one for every output: a value's is the sum of its weights, 1 + 1/2 + 1/3 + 1/3 for the first."""
    value = jnp.broadcast_to(jnp.asarray([1.0, 2.0, 4.0, 8.0])[:, None], (1, 1, 4, DIM))
    query = jnp.zeros((1, 2, 4, DIM))

    def run(*segments):
        return results(query, value, value, jnp.ones_like(query), *segments, window=(2, 0), sink=(1, 0))

    out, d_query, d_key, d_value = run()
    np.testing.assert_array_equal(out[0, :, :2, 0], [[1, 1.5], [0, 0]])
    np.testing.assert_allclose(out[0, :, :, 0], [[1, 1.5, 7 / 3, 13 / 3], [0, 0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(d_value[0, 0, :, 0], [13 / 6, 5 / 6, 2 / 3, 1 / 3], rtol=1e-6)
    assert not np.any(d_key)  # the queries are 0
    np.testing.assert_array_equal(d_query[0, 1], np.zeros((4, DIM)))
    out = run(jnp.asarray([[1, 1, 2, 0]]))[0]
    np.testing.assert_array_equal(out[0, 0, :, 0], [1, 1.5, 4, 0])


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (dict(), dict(window=1000)),
        (dict(), dict(window=SPANS[0], sink=SPANS[1])),
        (dict(), dict(window=SPANS[0], sink=SPANS[1], segments=SEGMENTS, softcap=3.0)),
        (dict(), dict(window=1000, segments=SEGMENTS)),
        (dict(kv_heads=4, length=75), dict(window=40, softcap=2.0, scale=0.5)),
        (dict(kv_heads=1, length=130, dim=3 * cpu.lanes()), dict(window=1000)),
        (dict(batch=1, length=700, dim=128), dict(window=600, sink=3)),
        (dict(length=90), dict(window=1000, scale=1.0)),  # scores of up to 25: weights of nearly 0 and 1
        (dict(length=40), dict(window=7, sink=100, scale=-0.2)),
    ],
)
def test_is_the_plain_form_with_its_gradients(sizes, options):
    arguments = make(**sizes)
    compare(results(*arguments, **options), results(*arguments, **options, implementation="reference"))


def test_spans_as_arrays():
    arguments = make(length=70)[:3]
    static = span_attention(*arguments, *SPANS, implementation="cpu")
    spans = [jnp.asarray(x, jnp.int32) for x in SPANS]
    run = jax.jit(lambda *spans: span_attention(*arguments, *spans, implementation="cpu"))
    np.testing.assert_array_equal(run(*spans), static)


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_any_length(lanes, monkeypatch):
    """Wider vectors than the processor's are cut by LLVM: the code of every processor runs here."""
    monkeypatch.setattr("kernels_pallas.span_attention.cpu.lanes", lambda: lanes)
    for dim in (lanes, 48):
        arguments = make(length=150, dim=dim)
        options = dict(window=SPANS[0], sink=SPANS[1], segments=SEGMENTS[:, 100:250], softcap=3.0)
        found = jax.jit(lambda *x, options=options: results.__wrapped__(*x, **options))(*arguments)
        compare(found, results(*arguments, **options, implementation="reference"))


def test_every_length_gives_the_bits_of_a_longer_one():
    """Later tokens are not seen, and where their gradients are 0 they add zeros: a shorter row is the beginning of one
    of 70 tokens, to the bit. Lengths of every part of a tile, and around multiples of tiles and blocks."""
    *arrays, gradient = make(length=70)
    for length in (*range(1, 18), 23, 31, 32, 33, 40, 48, 63, 64, 65):
        cut = gradient.at[:, :, length:].set(0)
        right = [x[:, :, :length] for x in results(*arrays, cut, window=50, sink=1)]
        same(results(*(x[:, :, :length] for x in (*arrays, gradient)), window=50, sink=1), right)


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_a_row_has_the_same_bits_twice_alone_and_among_others(segments):
    arguments = make()
    run = partial(results, window=SPANS[0], sink=SPANS[1])
    together = run(*arguments, segments)
    same(run(*arguments, segments), together)
    alone = run(*(x[1:] for x in arguments), None if segments is None else segments[1:])
    same(alone, [x[1:] for x in together])


def test_many_callers_at_once():
    """Who finds the threads taken computes alone, with the same bits."""
    sets = [tuple(x * (1 + i) for x in make(length=200)) for i in range(3)]
    expected = [results(*x, window=90) for x in sets]

    def call(number: int) -> None:
        same(results(*sets[number % 3], window=90), expected[number % 3])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(60)))


def test_what_is_not_seen_is_not_read():
    """NaN in the keys: queries that see it are none, the others keep their bits. NaN in values of chunks outside of all
    windows, and in another segment: a masked weight of 0 times NaN would show."""
    query, key, value, gradient = make(batch=1)
    right = results(query, key, value, gradient, window=1000)[0]
    found = results(query, key.at[:, :, 150].set(jnp.nan), value, gradient, window=1000)[0]
    np.testing.assert_array_equal(found[:, :, :150], right[:, :, :150])
    assert np.all(np.isnan(found[:, :, 150:]))

    spoiled = value.at[:, :, :128].set(jnp.nan)
    right = results(query, key, value, gradient, window=20)
    found = results(query, key, spoiled, gradient, window=20)
    for one, other in zip(found[:2], right[:2], strict=True):
        np.testing.assert_array_equal(one[:, :, 192:], other[:, :, 192:])
    assert np.all(np.isnan(found[0][:, :, 20:147]))

    segments = np.repeat([[1, 2, 0]], [128, 122, 50], axis=1)
    right = results(query, key, value, gradient, segments, window=1000)
    found = results(query, key, spoiled, gradient, segments, window=1000)
    for one, other in zip(found, right, strict=True):
        np.testing.assert_array_equal(one[:, :, 144:], other[:, :, 144:])
    assert not np.any(np.asarray(found[0])[:, :, 250:])  # padding sees nothing


def test_inside_loops_and_vmap_and_recomputed():
    *arrays, gradient = make(length=40)
    plain = results(*arrays, gradient, window=30)

    def layers(*arrays, times=1):
        def layer(query, _):
            return span_attention(query, *arrays[1:], 30, implementation="cpu"), None

        return jax.lax.scan(jax.checkpoint(layer), arrays[0], length=times)[0]

    @jax.jit
    def gradients(*arrays):
        out, pull = jax.vjp(layers, *arrays[:3])
        return out, *pull(arrays[3])

    same(gradients(*arrays, gradient), plain)
    both = [jnp.stack([x, x * 0.5]) for x in (*arrays, gradient)]
    found = jax.vmap(gradients)(*both)
    same([x[0] for x in found], plain)
    same([x[1] for x in found], gradients(*(x[1] for x in both)))

    twice = jax.jit(partial(layers, times=2))(*arrays)
    first = span_attention(*arrays, 30, implementation="cpu")
    np.testing.assert_array_equal(twice, span_attention(first, *arrays[1:], 30, implementation="cpu"))


def test_heads_stay_where_projections_leave_them():
    """From [B, L, H, d] and back: the compiled program moves nothing."""

    def loss(*arrays):
        heads = (x.swapaxes(1, 2) for x in arrays)
        return jnp.sum(span_attention(*heads, 30, implementation="cpu").swapaxes(1, 2) ** 2)

    arrays = [x.swapaxes(1, 2) for x in make(length=64)[:3]]
    text = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile().as_text()
    assert text.count('custom_call_target="lathe_span_attention') == 2
    assert not re.findall(r" (?:transpose|copy)\(", text)


def test_is_the_kernel_of_the_backend():
    arguments = make(length=20)[:3]
    found = span_attention(*arguments, 5)
    np.testing.assert_array_equal(found, span_attention(*arguments, 5, implementation="cpu"))


@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [
        (cpu.lanes() + 4, jnp.float32, f"head_dim={cpu.lanes() + 4}: the cpu kernel takes multiples of"),
        (512, jnp.float32, "head_dim=512: the cpu kernel takes multiples of .* up to 256"),
        (DIM, jnp.bfloat16, "query is bfloat16: the cpu kernel takes float32, all alike"),
    ],
)
def test_what_cannot_be_computed_is_refused(dim, dtype, message):
    array = jnp.zeros((1, 1, 4, dim), dtype)
    with pytest.raises(Unsupported, match=message):
        span_attention(array, array, array, 4, implementation="cpu")
    assert takes_on_cpu(dim) == (dim == DIM)
