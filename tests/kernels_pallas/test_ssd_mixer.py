"""The mixer of Mamba-2 on a CPU: by hand, against the plain form, and bits that nothing beside a row changes."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import ssd
from kernels_pallas.ssd import Unsupported, cpu
from kernels_pallas.ssd.entry import make_mixer
from kernels_pallas.ssd.reference import convolve

SIZES = dict(heads=4, channels=8, groups=2, state=8, taps=4)
LENGTHS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 130)


@functools.cache
def make(batch=2, length=130, **sizes) -> tuple[np.ndarray, ...]:
    sizes = SIZES | sizes
    made = make_mixer(jax.random.key(0), batch=batch, length=length, dtype="float32", **sizes)
    return tuple(map(np.asarray, made))


@functools.partial(jax.jit, static_argnames=("head_dim", "state_dim", "implementation"))
def run(*arguments, head_dim=8, state_dim=8, implementation="cpu"):
    options = dict(head_dim=head_dim, state_dim=state_dim, implementation=implementation)
    return ssd.mixer(*arguments, **options, chunk=16)


def close(found, expected):
    """To 1e-5 of the largest: sums of some hundred terms, each right to some units in the last place, which cancel to a
    twentieth of them in some token before the norm enlarges what is left."""
    for value, right in zip(found, expected, strict=True):
        scale = float(np.max(np.abs(right)))
        np.testing.assert_allclose(value, right, atol=1e-5 * scale)


def same(found, expected):
    for value, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(value), np.asarray(right))


def test_two_tokens_by_hand():
    """silu(v) is v for v >= 20 and softplus(0) is log 2, so a state is halved; the taps are 2 on the token itself and 1
    on the one before. x = 2 * (20, 40, 60, 80), then 2 * (40, ...) + (20, ...); B and C = 40, then 60.

    S = log 2 x B, then half of it plus the same of the second token; y = (S C + 3 x) z, z = 20, normalised.
    """
    x, one = np.array([20.0, 40, 60, 80]), np.ones(4)
    tokens = [np.concatenate([20 * one, scale * x, 20 * one, 20 * one, [0]]) for scale in (1, 2)]
    kernel = np.stack([np.ones(12), 2 * np.ones(12)])
    rest = (np.zeros(12), [0.0], [3.0], [0.0], 2 * one)  # bias, log A, skip, dt's bias, scale
    arguments = [np.asarray(a, np.float32) for a in ([tokens], kernel, *rest)]
    y, state = run(*arguments, head_dim=4, state_dim=4)
    state_1 = np.log(2) * np.outer(2 * x, 40 * one)
    state_2 = state_1 / 2 + np.log(2) * np.outer(5 * x, 60 * one)
    raw = np.stack([state_1 @ (40 * one) + 3 * 2 * x, state_2 @ (60 * one) + 3 * 5 * x])
    right = 2 * raw / np.sqrt(np.mean(raw**2, axis=-1, keepdims=True))
    np.testing.assert_allclose(state[0, 0], state_2, rtol=1e-6)
    np.testing.assert_allclose(y[0], right, rtol=1e-6)


def test_the_convolution_sees_earlier_tokens_of_the_segment():
    inputs, kernel = jnp.array([[[1.0], [2], [3], [4]]]), jnp.array([[100.0], [10], [1]])
    found = [convolve(inputs, kernel, segments) for segments in (None, jnp.array([[5, 5, 0, 0]]))]
    np.testing.assert_array_equal(np.ravel(found), [1, 12, 123, 234, 1, 12, 3, 34])


def test_the_norm_has_epsilon_and_the_scale():
    """One token with skip alone: x = 40 and z = 20 make 800, whose square is as large as epsilon."""
    token = np.concatenate([20 * np.ones(4), 40 * np.ones(4), np.zeros(8), [0]])
    kernel = np.zeros((2, 12)), np.zeros(12)
    kernel[0][1] = 1
    vectors = ([0.0], [1.0], [0.0], [1.0, 2, 3, 4])
    arguments = [np.asarray(a, np.float32) for a in ([[token]], *kernel, *vectors)]
    y, _ = ssd.mixer(*arguments, head_dim=4, state_dim=4, epsilon=640_000.0)
    np.testing.assert_allclose(y[0, 0], np.array([1, 2, 3, 4]) / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(length=300, heads=4, channels=64, groups=1, state=64),
        dict(length=70, heads=3, channels=16, groups=1, state=128),
        dict(length=90, heads=6, channels=4, groups=3, state=12, taps=2),
        dict(length=65, heads=2, channels=48, groups=2, state=16, taps=3),
        dict(length=5, heads=1, channels=20, groups=1, state=4, taps=7),
    ],
    ids=str,
)
def test_is_the_plain_form(sizes):
    arguments = make(**sizes)
    dims = dict(head_dim=(SIZES | sizes)["channels"], state_dim=(SIZES | sizes)["state"])
    close(run(*arguments, **dims), run(*arguments, **dims, implementation="reference"))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_any_length(lanes: int):
    # Wider vectors than the processor's are cut by LLVM: the code of every processor runs here.
    arguments = make(channels=16, state=16)
    sizes = dataclasses.replace(cpu.sizes(16, 16, 4), lanes=lanes, rows=4 if lanes == 8 else 8)
    found = cpu.mixer(*map(jnp.asarray, arguments), None, jnp.full(2, 130, jnp.int32), 1e-5, sizes)
    close(found, run(*arguments, head_dim=16, state_dim=16, implementation="reference"))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_beginning_has_the_bits_that_it_has_in_the_whole(length: int):
    """Also its state, which the whole computes behind a given number of tokens."""
    projected, *layer = make()
    y, _ = run(projected, *layer)
    _, state = run(projected, *layer, None, np.full(2, length, np.int32))
    same(ssd.mixer(projected[:, :length], *layer, head_dim=8, state_dim=8), (y[:, :length], state))


def test_a_state_behind_no_token_is_zero():
    _, state = run(*make(), None, np.array([0, 130], np.int32))
    assert not np.any(state[0]) and np.any(state[1])


def documents(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(1, len(sizes) + 1), sizes).astype(np.int32)


# In chunks of 64: changes at and around the ends of chunks, documents shorter than the convolution, padding.
SEGMENTS = (
    np.stack([documents(64, 66), documents(63, 1, 1, 65)]),
    np.stack([documents(65, 63, 2), documents(1, 2, 1, 3, 60, 4, 59)]),
    np.stack([np.r_[documents(100), np.zeros(30, np.int32)], np.r_[documents(128), np.zeros(2, np.int32)]]),
)


@pytest.mark.parametrize("segments", SEGMENTS, ids=("ends of chunks", "short ones", "padding"))
def test_segments(segments: np.ndarray):
    """As in the plain form; and as each document alone."""
    projected, *layer = make()
    for count in (np.array([130, 64]), np.array([65, 63]), np.array([100, 128])):
        operands = (projected, *layer, segments, count.astype(np.int32))
        close(run(*operands), run(*operands, implementation="reference"))
    y, state = run(projected, *layer, segments)
    for row in range(2):
        starts = np.flatnonzero(np.diff(segments[row], prepend=-1))
        for start, stop in zip(starts, [*starts[1:], 130], strict=True):
            alone = run(projected[row : row + 1, start:stop], *layer)
            close((y[row, start:stop],), (alone[0][0],))
        close((state[row],), (alone[1][0],))


def test_decays_of_any_size():
    """A head that forgets at once, one that forgets nothing, and one whose step is 0: exp never overflows."""
    projected, kernel, bias, a_log, skip, dt_bias, scale = make()
    operands = (
        projected,
        kernel,
        bias,
        np.float32([5, -20, 5, 1]),
        skip,
        np.float32([9, 0, -200, 60]),
        scale,
    )
    found = run(*operands)
    assert all(np.all(np.isfinite(value)) for value in found)
    close(found, run(*operands, implementation="reference"))


def test_gates_and_inputs_of_any_size():
    projected, *layer = make()
    factors = np.where(np.arange(130) % 3 == 0, 300, 1)[:, None] * (np.arange(projected.shape[2]) < 96)
    large = np.where(factors > 1, 300 * projected, projected)  # but for the steps
    found = run(large, *layer)
    assert all(np.all(np.isfinite(value)) for value in found)
    close(found, run(large, *layer, implementation="reference"))


def test_the_same_bits_alone_and_in_a_batch_and_among_other_calls():
    """Heads of 64: enough work for threads. Calls that find them taken compute alone."""
    projected, *layer = make(batch=3, length=200, channels=64, state=64)
    call = functools.partial(run, head_dim=64, state_dim=64)
    together = jax.tree.map(np.asarray, call(projected, *layer))
    for row in range(3):
        same(call(projected[row : row + 1], *layer), [value[row : row + 1] for value in together])
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: jax.tree.map(np.asarray, call(projected, *layer)), range(12)):
            same(found, together)


def test_inside_a_loop_under_jit_and_vmap():
    projected, *layer = make(batch=2, length=70)
    twice = jnp.stack([projected, 2 * projected])
    right = [run(one, *layer) for one in twice]
    same(jax.vmap(lambda one: run(one, *layer))(twice), jax.tree.map(lambda *y: jnp.stack(y), *right))
    same(jax.lax.map(lambda one: run(one, *layer), twice), jax.tree.map(lambda *y: jnp.stack(y), *right))


@pytest.mark.parametrize("parts", [(1, 0), (0, 1), (1, 1)], ids=("y", "state", "both"))
@pytest.mark.parametrize("segments", [None, SEGMENTS[1]], ids=("one", "many"))
def test_gradients(parts: tuple[int, int], segments: np.ndarray | None):
    """Those of the plain form, of either result and of both."""
    count = np.array([130, 66], np.int32)

    def loss(arguments, implementation):
        y, state = run(*arguments, segments, count, implementation=implementation)
        return parts[0] * jnp.sum(jnp.sin(3 * y)) + parts[1] * jnp.sum(jnp.sin(state))

    gradients = jax.jit(jax.grad(loss), static_argnums=1)
    found, right = (gradients(make(), implementation) for implementation in ("cpu", "reference"))
    # A head's gradients are sums of some thousand terms of either sign.
    for value, expected in zip(found, right, strict=True):
        np.testing.assert_allclose(value, expected, atol=2e-5 * float(np.max(np.abs(expected))) + 1e-9)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (dict(heads=3), dict(), "36 channels are not|3 heads"),
        (
            dict(channels=6),
            dict(head_dim=6),
            "heads of 6 and states of 8: the cpu kernel takes multiples of 4",
        ),
        (dict(state=512), dict(state_dim=512), "too large for the cpu kernel"),
        (dict(), dict(state_dim=7), "channels are not 4 heads of 8 and groups of 7"),
        (dict(), dict(implementation="gpu"), "no implementation 'gpu': there are reference and cpu"),
    ],
)
def test_what_cannot_be_computed_is_refused(change, options, message):
    arguments = jax.eval_shape(
        lambda: make_mixer(jax.random.key(0), batch=1, length=3, dtype="float32", **SIZES | change)
    )
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(functools.partial(ssd.mixer, **dict(head_dim=8, state_dim=8) | options), *arguments)


def test_what_it_takes_can_be_asked():
    assert ssd.takes_on_cpu(8, 8, 4) and ssd.takes_on_cpu(64, 128, 4)
    assert not ssd.takes_on_cpu(6, 8, 4)  # no vectors
    assert not ssd.takes_on_cpu(8, 512, 4) and not ssd.takes_on_cpu(8, 8, 1000)  # too large


def test_operands_of_other_shapes_and_dtypes_are_refused():
    projected, *layer = make()
    options = dict(head_dim=8, state_dim=8)
    with pytest.raises(Unsupported, match="projected has shape .*, expected"):
        ssd.mixer(projected[..., 1:], *layer, **options)
    with pytest.raises(Unsupported, match="segments has shape .*, expected"):
        ssd.mixer(projected, *layer, np.zeros((2, 7), np.int32), **options)
    with pytest.raises(Unsupported, match="the kernel takes float32"):
        ssd.mixer(projected.astype(jnp.bfloat16), *layer, **options)
