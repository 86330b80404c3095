"""Attention kernels against loops in float64 and against each other, forward and backward.

Values are of order 1 and every output is a mean of at most 150 of them, so float32 rounding stays near
150 * 2 ** -24 = 1e-5; gradients sum as many such terms again.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.nn.attention_kernels import (
    AutoAttention,
    AutoCachedAttention,
    BlockedAttention,
    DenseAttention,
    PlainCachedAttention,
    SpanAttention,
    TreeAttention,
)
from research.nn.masks import Causal, Full, Prefix, Window

PLAIN = dict(segments=None, prefix=None, scale=0.3, softcap=None)


def inputs(length, heads=4, kv_heads=2, batch=2, dim=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = [(batch, h, length, dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def loops(query, key, value, visible, scale=0.3, softcap=None):
    """Attention in float64 by its definition. visible(b, h, q, k) -> bool; at least one key a query."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    for b, h, q in np.ndindex(query.shape[:3]):
        group = h // (query.shape[1] // key.shape[1])
        keys = [k for k in range(key.shape[2]) if visible(b, h, q, k)]
        scores = key[b, group, keys] @ query[b, h, q] * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, h, q] = weights @ value[b, group, keys] / weights.sum()
    return out


SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 3, 3]])
CASES = {
    "full": (Full(), {}, lambda b, h, q, k: True),
    "causal": (Causal(), {}, lambda b, h, q, k: k <= q),
    "window": (Window(3), {}, lambda b, h, q, k: q - 2 <= k <= q),
    "sinks": (Window(2, sinks=1), {}, lambda b, h, q, k: q - 1 <= k <= q or k == 0),
    "spans": (Window((1, 2, 3, 7)), {}, lambda b, h, q, k: q - (1, 2, 3, 7)[h] < k <= q),
    "softcap": (Causal(), dict(softcap=0.5), lambda b, h, q, k: k <= q),
    "prefix": (
        Prefix(),
        dict(prefix=jnp.asarray([3, 0])),
        lambda b, h, q, k: k <= q or max(q, k) < (3, 0)[b],
    ),
    "segments": (
        Causal(),
        dict(segments=SEGMENTS),
        lambda b, h, q, k: k <= q and SEGMENTS.tolist()[b][k] == SEGMENTS.tolist()[b][q],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_dense_attention_is_its_definition(case, kv_heads):
    rule, options, visible = CASES[case]
    query, key, value, _ = inputs(7, kv_heads=kv_heads)
    options = {**PLAIN, **options}
    result = jax.jit(lambda *qkv: DenseAttention()(*qkv, rule, **options))(query, key, value)
    expected = loops(query, key, value, visible, softcap=options["softcap"])
    np.testing.assert_allclose(result, expected, atol=2e-6)


def segments_of(length):
    """Three documents and padding at the end of row 0, padding on the left of row 1."""
    first = np.repeat([1, 2, 3, 0], [length // 4, length // 3, length // 3, length])[:length]
    return jnp.asarray([first, np.where(np.arange(length) < length // 5, 0, 1)])


@pytest.mark.parametrize(
    ("rule", "length", "kv_heads", "packed"),
    [
        (Causal(), 64, 2, False),  # whole blocks
        (Causal(), 37, 1, True),  # a last block of 5
        (Window(5), 37, 4, True),  # keys below the window are never touched
        (Window((1, 3, 20, 40)), 50, 2, False),
        (Window(4, sinks=2), 33, 2, True),  # a last block of 1
        (Causal(), 3, 2, False),  # shorter than a block
    ],
    ids=str,
)
def test_blocked_equals_dense_forward_and_backward(rule, length, kv_heads, packed):
    query, key, value, cotangent = inputs(length, kv_heads=kv_heads)
    segments = segments_of(length) if packed else None
    if packed:  # what padding rows compute is unspecified, so no loss reads them
        cotangent = cotangent * (segments > 0)[:, None, :, None]

    def both(kernel):
        def run(*qkv):
            return kernel(*qkv, rule, **{**PLAIN, "segments": segments})

        def forward_and_backward(*qkv):
            out, pullback = jax.vjp(run, *qkv)
            return out, pullback(cotangent)

        return jax.jit(forward_and_backward)(query, key, value)

    (dense, dense_gradients), (blocked, gradients) = both(DenseAttention()), both(BlockedAttention(16))
    real = np.ones((2, length), bool) if segments is None else np.asarray(segments) > 0
    np.testing.assert_allclose(blocked.swapaxes(1, 2)[real], dense.swapaxes(1, 2)[real], atol=1e-5)
    for ours, theirs in zip(gradients, dense_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


def test_span_attention_equals_dense_forward_and_backward():
    """Packed documents, spans for each head and sinks; a Causal rule is a window of the whole row."""
    query, key, value, cotangent = inputs(13)
    segments = segments_of(13)
    rules = (Window((1, 3, 7, 40), sinks=2), Causal())

    def run(kernel, *qkv):
        options = {**PLAIN, "segments": segments, "softcap": 2.0}
        out = jnp.stack([kernel(*qkv, rule, **options) for rule in rules])
        out = jnp.where((segments > 0)[:, None, :, None], out, 0)
        return jnp.sum(out * cotangent), out

    kernels = (SpanAttention("reference"), DenseAttention())
    gradient = jax.value_and_grad(run, argnums=(1, 2, 3), has_aux=True)
    ours, theirs = jax.jit(lambda *qkv: [gradient(kernel, *qkv) for kernel in kernels])(query, key, value)
    for found, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(found, right, atol=3e-5)


def test_span_attention_refuses_what_it_cannot_compute():
    query, key, value, _ = inputs(4)
    with pytest.raises(UserError, match="computes Window and Causal rules, got Full"):
        SpanAttention()(query, key, value, Full(), **PLAIN)
    with pytest.raises(UserError, match="expected one int, or 4 ints.*AutoAttention runs everywhere"):
        SpanAttention("reference")(query, key, value, Window((1, 2)), **PLAIN)


@pytest.mark.parametrize("kernel", [DenseAttention(), BlockedAttention(4)], ids=lambda k: type(k).__name__)
def test_fully_padded_rows_give_no_nan(kernel):
    query, key, value, cotangent = inputs(10)
    segments = jnp.zeros((2, 10), jnp.int32).at[1, 5:].set(1)

    def run(*qkv):
        return jnp.sum(kernel(*qkv, Window(3), **{**PLAIN, "segments": segments}) * cotangent)

    for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(query, key, value)):
        assert np.isfinite(leaf).all()


def test_bfloat16_agrees_to_its_rounding():
    query, key, value, _ = inputs(20, dtype=jnp.bfloat16)
    exact = DenseAttention()(*(x.astype(jnp.float32) for x in (query, key, value)), Causal(), **PLAIN)
    for kernel in (DenseAttention(), BlockedAttention(8)):
        out = jax.jit(lambda *qkv, kernel=kernel: kernel(*qkv, Causal(), **PLAIN))(query, key, value)
        assert out.dtype == jnp.bfloat16
        # Probabilities and the result are rounded to 8 bits: 2 * 2 ** -8 of values up to about 3.
        np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.025)


@pytest.mark.parametrize(
    ("rule", "changes"),
    [(Causal(), dict(softcap=5.0)), (Full(), {}), (Prefix(), dict(prefix=jnp.zeros(2, jnp.int32)))],
)
def test_blocked_attention_refuses_what_it_cannot_compute(rule, changes):
    query, key, value, _ = inputs(4)
    with pytest.raises(
        UserError, match="a key range and no soft cap; got .* Use DenseAttention or AutoAttention"
    ):
        BlockedAttention()(query, key, value, rule, **{**PLAIN, **changes})


@pytest.mark.parametrize(
    ("rule", "length", "changes", "kernel"),
    [
        (Causal(), 65, {}, BlockedAttention()),
        (Causal(), 64, {}, DenseAttention()),  # one block: nothing to skip
        (Causal(), 101, {}, DenseAttention()),  # beyond `longest`
        (Causal(), 65, dict(softcap=5.0), DenseAttention()),
        (Full(), 65, {}, DenseAttention()),
    ],
)
def test_auto_attention_chooses_without_the_kernel_for_a_cpu(rule, length, changes, kernel, monkeypatch):
    monkeypatch.setenv("LATHE_CPU_KERNELS", "off")
    query, key, value, _ = inputs(length)
    options = {**PLAIN, **changes}

    def program(k):
        return str(jax.make_jaxpr(lambda *qkv: k(*qkv, rule, **options))(query, key, value))

    assert program(AutoAttention(longest=100)) == program(kernel)


WINDOW = Window(9)


def test_auto_attention_takes_the_kernel_for_a_cpu(monkeypatch):
    def runs_kernel(rule=WINDOW, length=33, dim=16, dtype=jnp.float32, **changes) -> bool:
        query, key, value, _ = inputs(length, dim=dim, dtype=dtype)
        run = jax.jit(lambda *qkv: AutoAttention()(*qkv, rule, **{**PLAIN, **changes}))
        return "lathe_span_attention" in run.lower(query, key, value).as_text()

    assert runs_kernel() and runs_kernel(Causal()) and runs_kernel(length=1100, softcap=5.0)
    assert runs_kernel(segments=segments_of(33))
    assert not runs_kernel(length=32)
    assert not runs_kernel(Full())
    assert not runs_kernel(Prefix(), prefix=jnp.zeros(2, jnp.int32))
    assert not runs_kernel(dim=20)
    assert not runs_kernel(dtype=jnp.bfloat16)
    monkeypatch.setenv("LATHE_CPU_KERNELS", "off")
    assert not runs_kernel()


@pytest.mark.parametrize("rule", [Causal(), Window((1, 3, 40, 60), sinks=2)])
def test_auto_attention_equals_dense_on_tokens_forward_and_backward(rule):
    """In padding, what the kernels compute differs and no loss reads it."""
    query, key, value, cotangent = inputs(70, dim=16)
    segments = segments_of(70)
    cotangent = cotangent * (segments > 0)[:, None, :, None]

    def both(kernel):
        out, pullback = jax.vjp(
            lambda *qkv: kernel(*qkv, rule, **{**PLAIN, "segments": segments}), query, key, value
        )
        return (out * (segments > 0)[:, None, :, None], *pullback(cotangent))

    found, right = jax.jit(lambda: (both(AutoAttention()), both(DenseAttention())))()
    for ours, theirs in zip(found, right, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


def test_vmap_equals_one_at_a_time():
    query, key, value, _ = (jnp.stack([x, 2 * x]) for x in inputs(10))
    segments = jnp.stack([segments_of(10), jnp.ones((2, 10), jnp.int32)])

    def run(q, k, v, s):
        return jnp.sum(BlockedAttention(4)(q, k, v, Causal(), **{**PLAIN, "segments": s})[1, :, 2:])

    mapped = jax.jit(jax.vmap(jax.grad(run, argnums=(0, 1, 2))))(query, key, value, segments)
    for i in range(2):
        single = jax.jit(jax.grad(run, argnums=(0, 1, 2)))(query[i], key[i], value[i], segments[i])
        for ours, theirs in zip(mapped, single, strict=True):
            np.testing.assert_allclose(ours[i], theirs, atol=1e-5)


CACHED = {
    "plain": PlainCachedAttention(),
    "auto": AutoCachedAttention(),
    "reference": TreeAttention("reference"),
    "cpu": TreeAttention("cpu"),
} | {name: TreeAttention(name, interpret=True) for name in ("tpu", "gpu")}


@pytest.mark.parametrize("name", CACHED)
def test_cached_attention_is_attention_over_both_sets_of_keys(name):
    query, key, value, _ = inputs(7, dim=16)
    new, mask = 3, jnp.ones((1, 1, 3, 4), bool).at[..., 0].set(False)  # token 0 was forgotten
    parts = [(x[:, :, :-new], x[:, :, -new:]) for x in (key, value)]
    out = CACHED[name](
        query[:, :, -new:],
        (parts[0][0], parts[1][0]),
        (parts[0][1], parts[1][1]),
        jnp.full((query.shape[0],), 4),
        mask,
        jnp.tril(jnp.ones((new, new), bool))[None, None],
        scale=0.3,
        softcap=2.0,
    )
    expected = loops(query, key, value, lambda b, h, q, k: k == q or 0 < k <= q, softcap=2.0)
    np.testing.assert_allclose(out, expected[:, :, -new:], atol=2e-6)


def test_a_kernel_that_cannot_run_is_refused():
    query, key, value, _ = inputs(2)
    one, tree = jnp.ones((query.shape[0],), jnp.int32), jnp.ones((1, 1, 1, 1), bool)
    parts = [(x[:, :, :1], x[:, :, 1:]) for x in (key, value)]
    cached, fresh = zip(*parts, strict=True)
    with pytest.raises(UserError, match="PlainCachedAttention runs everywhere"):
        TreeAttention("gpu")(query[:, :, 1:], cached, fresh, one, None, tree, scale=1.0, softcap=None)


def test_auto_takes_the_kernel_for_few_float32_rows_only(monkeypatch):
    query, key, value, _ = inputs(8, dim=16)
    cached, new = (key[:, :, :4], value[:, :, :4]), 4

    def runs_kernel(query: jax.Array, cached: tuple[jax.Array, jax.Array]) -> bool:
        count = query.shape[2]
        fresh = tuple(jnp.zeros((*x.shape[:2], count, 16), query.dtype) for x in cached)
        tree = jnp.eye(count, dtype=bool)[None, None]
        length = jnp.full((query.shape[0],), 4)
        run = jax.jit(
            lambda q, c: AutoCachedAttention()(q, c, fresh, length, None, tree, scale=1.0, softcap=None)
        )
        return "lathe_tree_attention" in run.lower(query, cached).as_text()

    assert runs_kernel(query[:, :, -new:], cached)
    assert not runs_kernel(jnp.tile(query, (1, 1, 9, 1)), cached)  # 72 rows
    assert not runs_kernel(query[:, :, -new:].astype(jnp.bfloat16), cached)
    monkeypatch.setenv("LATHE_CPU_KERNELS", "off")
    assert not runs_kernel(query[:, :, -new:], cached)
