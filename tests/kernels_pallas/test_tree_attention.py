"""Tree attention: every implementation against attention written out in float64, the shapes that matter in
Pallas' interpreter, and lowering for devices that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import tree_attention as kernels
from kernels_pallas.tree_attention import Unsupported, gpu, tpu

# One program a shape instead of one an operation.
tree_attention = jax.jit(
    kernels.tree_attention, static_argnames=("scale", "softcap", "implementation", "interpret")
)


def make(batch, heads, kv_heads, count, slots, dim, lengths, *, dtype=jnp.float32, tree_heads=1, mask=None):
    """Random arguments; every slot that holds no token holds NaN. `mask`: the leading axes of a prefix mask."""
    rng = np.random.default_rng(count + slots)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    length = np.asarray(lengths, np.int32)
    held = (np.arange(slots) < length[:, None])[:, None, :, None]
    nan = np.asarray(np.nan, dtype)
    cached = tuple(np.where(held, normal(batch, kv_heads, slots, dim), nan) for _ in range(2))
    fresh = (normal(batch, kv_heads, count, dim), normal(batch, kv_heads, count, dim))
    tree = np.tril(rng.random((batch, tree_heads, count, count)) < 0.5) | np.eye(count, dtype=bool)
    cached_mask = None if mask is None else rng.random((*mask, count, slots)) < 0.4
    return normal(batch, heads, count, dim), cached, fresh, length, tree, cached_mask


def written_out(query, cached, fresh, length, tree, cached_mask, scale=None, softcap=None):
    """One query at a time over the keys it sees, in float64."""
    query, cached, fresh = jax.tree.map(lambda x: np.asarray(x, np.float64), (query, cached, fresh))
    batch, heads, count, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    slots = cached[0].shape[2]
    tree = np.broadcast_to(tree, (batch, heads, count, count))
    seen = np.broadcast_to(True if cached_mask is None else cached_mask, (batch, heads, count, slots))
    out = np.zeros(query.shape)
    for b, h, n in np.ndindex(batch, heads, count):
        group = h // (heads // cached[0].shape[1])
        old = np.flatnonzero(seen[b, h, n, : int(length[b])])
        new = np.flatnonzero(tree[b, h, n])
        keys, values = (
            np.concatenate([c[b, group, old], f[b, group, new]]) for c, f in zip(cached, fresh, strict=True)
        )
        scores = keys @ query[b, h, n] * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, h, n] = weights @ values / weights.sum()
    return out


IMPLEMENTATIONS = ("reference", "tpu", "gpu", "cpu")
# N = 1 to 64, lengths 0, full, and between blocks, slots that are no multiple of a block, groups, masks.
CASES = {
    "one token": dict(batch=2, heads=4, kv_heads=2, count=1, slots=64, dim=32, lengths=[0, 64]),
    "empty caches": dict(batch=2, heads=2, kv_heads=2, count=3, slots=64, dim=16, lengths=[0, 0]),
    "odd sizes": dict(batch=3, heads=2, kv_heads=1, count=7, slots=200, dim=64, lengths=[1, 129, 199]),
    "64 nodes": dict(batch=1, heads=4, kv_heads=2, count=64, slots=192, dim=32, lengths=[150]),
    "masks": dict(
        batch=2, heads=4, kv_heads=2, count=5, slots=130, dim=16, lengths=[130, 40], tree_heads=4, mask=(1, 4)
    ),
    "one mask": dict(batch=2, heads=4, kv_heads=4, count=4, slots=70, dim=16, lengths=[3, 70], mask=(2, 1)),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_is_attention_over_the_prefix_and_the_tree(name, implementation):
    arguments = make(**CASES[name])
    out = tree_attention(*arguments, implementation=implementation, interpret=True)
    np.testing.assert_allclose(np.asarray(out), written_out(*arguments), atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scale_and_soft_cap(implementation):
    arguments = make(1, 2, 1, 2, 64, 16, [9])
    options = {"scale": 0.7, "softcap": 1.5}
    out = tree_attention(*arguments, **options, implementation=implementation, interpret=True)
    np.testing.assert_allclose(np.asarray(out), written_out(*arguments, **options), atol=2e-6)


@pytest.mark.parametrize("implementation", ("reference", "tpu", "gpu"))
def test_bfloat16(implementation):
    arguments = make(2, 4, 2, 6, 100, 32, [0, 99], dtype=jnp.bfloat16)
    out = tree_attention(*arguments, implementation=implementation, interpret=True)
    assert out.dtype == jnp.bfloat16
    # Inputs are the same rounded numbers; weights and the output are rounded to 8 bits once each.
    np.testing.assert_allclose(np.asarray(out, np.float64), written_out(*arguments), atol=2e-2)


@pytest.mark.parametrize("kernel", [tpu, gpu])
def test_several_blocks_and_splits(kernel):
    """Lengths at, just before and just behind the edge of a block of 128."""
    arguments = make(4, 2, 2, 2, 400, 16, [127, 128, 129, 400])
    run = jax.jit(functools.partial(kernel.tree_attention, scale=0.25, block=128, interpret=True))
    out = run(*arguments)
    np.testing.assert_allclose(np.asarray(out), written_out(*arguments), atol=2e-6)


def test_several_blocks_and_groups_of_rows_on_a_cpu():
    """Lengths at, just before and just behind the edges of blocks of 64 keys; 3 x 25 rows a key head, more than 64."""
    arguments = make(5, 6, 2, 25, 260, 16, [63, 64, 65, 128, 260], tree_heads=6, mask=(5, 1))
    out = tree_attention(*arguments, implementation="cpu")
    np.testing.assert_allclose(np.asarray(out), written_out(*arguments), atol=2e-6)


@pytest.mark.parametrize(("lanes", "dim"), [(4, 20), (8, 24), (16, 24), (16, 4)])
def test_vectors_of_other_processors(lanes, dim, monkeypatch):
    # Wider vectors than the processor's are cut by LLVM; narrower ones are taken where they do not divide the heads.
    monkeypatch.setattr("kernels_pallas.cpu.lanes", lambda: lanes)
    arguments = make(2, 4, 2, 3, 70, dim, [70, 1], mask=(1, 4))
    out = kernels.tree_attention(*map(as_arrays, arguments), implementation="cpu")
    np.testing.assert_allclose(np.asarray(out), written_out(*arguments), atol=2e-6)


def as_arrays(operand):
    return jax.tree.map(jnp.asarray, operand)


def test_weights_far_apart_on_a_cpu():
    """Weights that count: of the largest, 80, the new one, 79, and 0; those of -80 and -200 are below e^-87."""
    scores = np.float32([0.0, -80.0, -200.0, 80.0])
    cached = (
        scores[None, None, :, None] * np.eye(4, dtype=np.float32)[0],
        np.eye(4, dtype=np.float32)[None, None],
    )
    fresh = (np.full((1, 1, 1, 4), 79.0, np.float32), np.zeros((1, 1, 1, 4), np.float32))
    query = np.eye(4, dtype=np.float32)[None, None, :1]
    out = tree_attention(
        query, cached, fresh, np.int32([4]), np.ones((1, 1, 1, 1), bool), scale=1.0, implementation="cpu"
    )
    total = 1 + np.exp(-1.0) + np.exp(-80.0)
    np.testing.assert_allclose(out[0, 0, 0], [np.exp(-80.0) / total, 0, 0, 1 / total], rtol=1e-6)


def test_gradient_on_a_cpu():
    query, cached, fresh, length, tree, mask = map(as_arrays, make(2, 4, 2, 3, 40, 16, [40, 40], mask=(1, 1)))

    def gradients(implementation):
        def loss(query, cached, fresh):
            out = kernels.tree_attention(
                query, cached, fresh, length, tree, mask, implementation=implementation
            )
            return jnp.sum(out**2)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, cached, fresh)

    for ours, theirs in zip(
        *(jax.tree.leaves(gradients(name)) for name in ("cpu", "reference")), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_scores_give_the_mean(implementation):
    """Queries of 0 weigh all visible values alike. Cached 1, 3, (8: not held); fresh 5, 9, node 1 below
    node 0: node 0 sees (1 + 3 + 5) / 3 = 3, node 1 sees (1 + 3 + 5 + 9) / 4 = 4.5."""
    cached = np.broadcast_to(np.float32([1.0, 3.0, 8.0])[:, None], (1, 1, 3, 16))
    fresh = np.broadcast_to(np.float32([5.0, 9.0])[:, None], (1, 1, 2, 16))
    out = tree_attention(
        np.zeros((1, 1, 2, 16), np.float32),
        (cached, cached),
        (fresh, fresh),
        np.asarray([2]),
        np.asarray([[[[True, False], [True, True]]]]),
        implementation=implementation,
        interpret=True,
    )
    np.testing.assert_allclose(np.asarray(out)[0, 0, :, 0], [3.0, 4.5], rtol=1e-6)


LOWERED = {"tpu": ("tpu", "tpu_custom_call"), "gpu": ("cuda", "triton")}


@pytest.mark.parametrize("implementation", LOWERED)
@pytest.mark.parametrize(
    ("count", "slots", "dim", "heads", "kv_heads", "dtype", "masked"),
    [
        (1, 192, 64, 8, 8, "float32", False),
        (16, 1000, 128, 8, 2, "bfloat16", False),
        (64, 4096, 64, 8, 1, "bfloat16", True),
    ],
)
def test_lowers_without_the_device(implementation, count, slots, dim, heads, kv_heads, dtype, masked):
    """To the compiler of the device, whose own errors only the device shows."""
    platform, marker = LOWERED[implementation]

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    arguments = (
        shape(2, heads, count, dim),
        (shape(2, kv_heads, slots, dim),) * 2,
        (shape(2, kv_heads, count, dim),) * 2,
        shape(2, dtype="int32"),
        shape(1, 1, count, count, dtype=bool),
        shape(1, heads, count, slots, dtype=bool) if masked else None,
    )
    function = jax.jit(functools.partial(kernels.tree_attention, implementation=implementation))
    lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
    assert marker in lowered.as_text()


def test_a_backend_without_a_kernel_is_an_error(monkeypatch):
    monkeypatch.setattr("kernels_pallas.common.target_platform", lambda: "rocm")
    message = "no tree attention kernel for the backend 'rocm': there are tpu, gpu and cpu"
    with pytest.raises(Unsupported, match=message):
        kernels.tree_attention(*make(1, 1, 1, 1, 64, 16, [3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dim=24, implementation="gpu"), "head_dim=24: the gpu kernel takes powers of two"),
        (dict(dim=20, implementation="tpu"), "head_dim=20: the tpu kernel takes multiples of 8"),
        (dict(dtype=jnp.float16, implementation="tpu"), "query is float16"),
        (dict(kv_heads=3, implementation="reference"), "4 query heads are not a multiple of 3 key heads"),
        (dict(lengths=[1, 2], implementation="reference"), r"length has shape \(2,\), expected \(1,\)"),
        (dict(tree_heads=2, implementation="reference"), "tree is bool"),
        (dict(implementation="cuda"), "no implementation 'cuda': there are reference, tpu, gpu and cpu"),
        (dict(dim=6, implementation="cpu"), "head_dim=6: the cpu kernel takes multiples of 4"),
        (dict(dtype=jnp.bfloat16, implementation="cpu"), "query is bfloat16: the cpu kernel takes float32"),
    ],
)
def test_what_cannot_be_computed_is_refused(change, message):
    options = dict(batch=1, heads=4, kv_heads=2, count=2, slots=64, dim=16, lengths=[3]) | change
    implementation, lengths = options.pop("implementation"), options.pop("lengths")
    query, cached, fresh, _, tree, mask = make(**options, lengths=[3])
    with pytest.raises(Unsupported, match=message):
        tree_attention(query, cached, fresh, np.asarray(lengths), tree, mask, implementation=implementation)
