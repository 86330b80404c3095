"""The SSD scan: the kernels against the plain form, with all gradients; a step is one token of the scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import ssd as kernels
from kernels_pallas.ssd import Unsupported
from research.errors import UserError
from research.nn.attention import Context
from research.ssm.mamba2 import Mamba2
from research.ssm.ssd import PallasScan
from tests.programs import call

# One program a shape instead of one an operation.
ssd = jax.jit(kernels.ssd, static_argnames=("chunk", "implementation", "interpret"))
ssd_step = jax.jit(kernels.ssd_step, static_argnames=("implementation", "interpret"))

NAMES = ("loss", "y", "final", "x", "log_decay", "b", "c", "state")
KERNELS = ("tpu", "gpu")


def make(batch=2, length=40, heads=4, channels=64, groups=2, size=16, dtype=jnp.float32):
    """x, log decays, B, C and the state before."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=dtype):
        return rng.normal(size=shape).astype(dtype)

    decay = -rng.uniform(0, 0.5, (batch, length, heads)).astype(np.float32)
    b, c = (normal(batch, length, groups, size) for _ in range(2))
    return (
        normal(batch, length, heads, channels),
        decay,
        b,
        c,
        normal(batch, heads, channels, size, dtype=jnp.float32),
    )


# In the first row a segment ends with the first chunk of 16, in the second one spans two ends of chunks.
SEGMENTS = np.asarray([[1] * 16 + [2] * 6 + [3] * 18, [1] * 33 + [0] * 7])


def results(arguments, segments, **options):
    """The outputs, and the gradients of an asymmetric function of both."""

    def loss(arguments):
        y, final = kernels.ssd(*arguments, segments, chunk=16, **options)
        weights = jnp.arange(y.size).reshape(y.shape) % 7 - 3.0
        return jnp.sum(weights * y) + jnp.sum(jnp.sin(final)), (y, final)

    value, gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments)
    found = map(np.asarray, (value[0], *value[1], *gradients))
    return dict(zip(NAMES, found, strict=True))


@pytest.fixture(scope="module")
def plain():
    return results(make(), SEGMENTS, implementation="reference")


@pytest.mark.parametrize("implementation", KERNELS)
def test_is_the_plain_form_with_its_gradients(implementation, plain):
    """T = 40 is no multiple of the chunk; two groups, segments, a state before; float32 sums of up to 1000 terms."""
    found = results(make(), SEGMENTS, implementation=implementation, interpret=True)
    for name, value in plain.items():
        scale = float(np.max(np.abs(value)))
        np.testing.assert_allclose(found[name], value, atol=2e-6 * scale, err_msg=name)


@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16(implementation):
    arguments = make(batch=1, groups=1, dtype=jnp.bfloat16)
    y, final = ssd(*arguments, chunk=16, implementation=implementation, interpret=True)
    exact = ssd(*(a.astype(np.float32) for a in arguments), chunk=16, implementation="reference")
    assert y.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    # Weights, the state and y are rounded to 8 bits.
    for value, right in zip((y, final), exact, strict=True):
        scale = float(np.max(np.abs(right)))
        np.testing.assert_allclose(np.asarray(value, np.float32), right, atol=1e-2 * scale)


@pytest.mark.parametrize("implementation", ("reference", *KERNELS))
def test_a_step_by_hand(implementation):
    """P = N = 16: decay 1/2, a state of 4 everywhere, x = 3 and B = 2 make 4/2 + 6 = 8; C = 1/16 gives y = 8."""
    ones = np.ones((1, 2, 16), np.float32)
    half = np.full((1, 2), np.log(0.5), np.float32)
    arguments = (np.full((1, 2, 16, 16), 4, np.float32), 3 * ones, half, 2 * ones[:, :1], ones[:, :1] / 16)
    y, state = ssd_step(*arguments, implementation=implementation, interpret=True)
    np.testing.assert_allclose(state, 8.0, rtol=1e-6)
    np.testing.assert_allclose(y, 8.0, rtol=1e-6)


@pytest.mark.parametrize("implementation", KERNELS)
def test_steps_are_the_scan(implementation, plain):
    """The first two tokens, before any change of segment."""
    x, decay, b, c, state = make()
    for t in range(2):
        y, state = ssd_step(
            state, x[:, t], decay[:, t], b[:, t], c[:, t], implementation=implementation, interpret=True
        )
        np.testing.assert_allclose(y, plain["y"][:, t], atol=1e-5)


def test_in_the_simulator(simulator):
    """Two chunks, two blocks of heads: states pass from chunk to chunk, and gradients of B and C gather heads."""
    arguments = make(batch=1, length=32, groups=1, heads=4, channels=64)
    found = results(arguments, None, implementation="tpu", interpret=simulator)
    right = results(arguments, None, implementation="reference")
    for name, value in right.items():
        scale = float(np.max(np.abs(value)))
        np.testing.assert_allclose(found[name], value, atol=2e-6 * scale, err_msg=name)


def test_a_step_in_the_simulator(simulator):
    x, decay, b, c, state = make(batch=1, length=1, channels=16, groups=2)
    arguments = (state, x[:, 0], decay[:, 0], b[:, 0], c[:, 0])
    found = ssd_step(*arguments, implementation="tpu", interpret=simulator)
    for value, right in zip(found, ssd_step(*arguments, implementation="reference"), strict=True):
        np.testing.assert_allclose(value, right, atol=1e-5)


@pytest.mark.parametrize("implementation", KERNELS)
def test_lowers_without_the_device(implementation, lower):
    """Mamba-2 of 130M in training, with segments, forward and backward, and a step of it."""
    shapes = jax.eval_shape(lambda: make(4, 2048, 24, 64, 1, 128, jnp.bfloat16))
    segments = jax.ShapeDtypeStruct((4, 2048), jnp.int32)

    def gradients(segments, *arguments):
        def loss(*arguments):
            return sum(
                jnp.sum(out.astype(jnp.float32))
                for out in kernels.ssd(*arguments, segments, implementation=implementation)
            )

        return jax.grad(loss, range(5))(*arguments)

    marker = {"tpu": "tpu_custom_call", "gpu": "triton"}[implementation]
    assert lower(gradients, (segments, *shapes), implementation).count(marker) >= 2

    def step(x, decay, b, c, state):
        token = (x[:, 0], decay[:, 0], b[:, 0], c[:, 0])
        return kernels.ssd_step(state, *token, implementation=implementation)

    assert marker in lower(step, shapes, implementation)


def test_the_mixer_with_the_kernel():
    """A Mamba-2 layer computes the same with either; where the kernel cannot run, the layer says so."""
    layer = Mamba2(2, 16, 16, chunk=16)
    context = Context(np.arange(20)[None])

    @jax.jit
    def draw():
        u = jax.random.normal(jax.random.key(0), (1, 20, 8))
        return u, layer.init(jax.random.key(1), u, context)["params"]

    u, params = draw()
    kernel = layer.clone(scan=PallasScan("tpu", interpret=True))
    np.testing.assert_allclose(
        call(kernel, params, u, context)[0], call(layer, params, u, context)[0], atol=1e-6
    )
    if jax.default_backend() == "cpu":
        with pytest.raises(UserError, match="no SSD kernel for the backend 'cpu'.*PlainScan runs everywhere"):
            call(layer.clone(scan=PallasScan()), params, u, context)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (dict(heads=3), dict(implementation="reference"), "3 heads are not a multiple of 2 groups"),
        (dict(), dict(chunk=0, implementation="gpu"), "chunk=0: a chunk has at least one token"),
        (dict(), dict(chunk=40, implementation="tpu"), "chunk=40: the tpu kernel takes multiples of 16"),
        (dict(), dict(chunk=48, implementation="gpu"), "chunk=48: the gpu kernel takes powers of two"),
        (dict(size=24), dict(implementation="gpu"), "state_dim=24: the gpu kernel takes powers of two"),
        (dict(channels=16), dict(implementation="tpu"), "groups of 2 heads of 16 channels"),
        (dict(dtype=jnp.float16), dict(implementation="tpu"), "x is float16"),
        (dict(), dict(implementation="cuda"), "no implementation 'cuda'"),
    ],
)
def test_what_cannot_be_computed_is_refused(sizes, options, message):
    with pytest.raises(Unsupported, match=message):
        ssd(*make(**sizes), **options)
