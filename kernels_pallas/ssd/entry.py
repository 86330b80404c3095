"""The SSD scan, step and mixer in the catalogue: sizes of Mamba-2's published models, and small ones for a CPU."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.ssd.api import mixer, ssd, ssd_step


def make(
    key: jax.Array,
    *,
    batch: int,
    length: int,
    heads: int,
    channels: int,
    groups: int,
    state: int,
    dtype: str,
) -> tuple:
    """x, log decays, B, C and a state."""
    keys = jax.random.split(key, 5)
    x = jax.random.normal(keys[0], (batch, length, heads, channels), dtype)
    decay = -jax.random.uniform(keys[1], (batch, length, heads))
    b, c = (jax.random.normal(k, (batch, length, groups, state), dtype) for k in keys[2:4])
    return x, decay, b, c, jax.random.normal(keys[4], (batch, heads, channels, state))


def make_step(key: jax.Array, **sizes) -> tuple:
    x, decay, b, c, state = make(key, length=1, **sizes)
    return state, x[:, 0], decay[:, 0], b[:, 0], c[:, 0]


def make_mixer(
    key: jax.Array,
    *,
    batch: int,
    length: int,
    heads: int,
    channels: int,
    groups: int,
    state: int,
    taps: int,
    dtype: str,
) -> tuple:
    """The projections' rows and a layer's parameters, steps of about 0.05."""
    keys = jax.random.split(key, 7)
    inner, mixed = heads * channels, heads * channels + 2 * groups * state
    projected = jax.random.normal(keys[0], (batch, length, inner + mixed + heads), dtype)
    kernel = jax.random.normal(keys[1], (taps, mixed), dtype) / taps**0.5
    bias = jax.random.normal(keys[2], (mixed,), dtype) / 10
    a_log = jnp.log(jax.random.uniform(keys[3], (heads,), dtype, 1, 16))
    skip, steps = (jax.random.normal(k, (heads,), dtype) for k in keys[4:6])
    scale = 1 + jax.random.normal(keys[6], (inner,), dtype) / 10
    return projected, kernel, bias, a_log, skip, steps - 3, scale


def mixer_cost(case: Case) -> Cost:
    """Products of matrices as of the scan, of which a chunk of 64 tokens needs half of those with its own."""
    s = case.sizes
    tokens = s["batch"] * s["length"]
    inside = 64 * tokens * (s["groups"] * s["state"] + s["heads"] * s["channels"])
    across = 4 * tokens * s["heads"] * s["channels"] * s["state"]
    inner, shared = s["heads"] * s["channels"], 2 * s["groups"] * s["state"]
    moved = tokens * (3 * inner + shared + s["heads"]) + s["batch"] * inner * s["state"]
    return Cost(inside + across, 4 * moved)


def cost(case: Case, chunk: int = 128) -> Cost:
    """Products of matrices alone. Forward: C B^T of a group, and W X, C S^T and X^T B of every head. Backward: C B^T
    again and two of its size for the gradients of B and C (heads added up before); d_y X^T and W^T d_y, and five with
    the states or their gradients, of every head."""
    s = case.sizes
    size = jnp.dtype(s["dtype"]).itemsize
    tokens = s["batch"] * s["length"]
    shared = 2 * tokens * s["groups"] * chunk * s["state"]
    inside = 2 * tokens * s["heads"] * chunk * s["channels"]
    across = 2 * tokens * s["heads"] * s["channels"] * s["state"]
    x, bc = (tokens * n * size for n in (s["heads"] * s["channels"], 2 * s["groups"] * s["state"]))
    decays = 4 * tokens * s["heads"]
    states = 4 * s["batch"] * s["heads"] * s["channels"] * s["state"]
    forward = Cost(shared + inside + 2 * across, 2 * x + bc + decays + 2 * states)
    if not case.gradient:
        return forward
    # x, d_y and dx; B, C and their gradients; decays and theirs; the gradients of both ends' states.
    moved = 3 * x + 2 * bc + 2 * decays + 2 * states
    return Cost(forward.flops + 3 * shared + 2 * inside + 5 * across, forward.bytes + moved)


def step_cost(case: Case) -> Cost:
    """The state is read and written; the rest is small."""
    s = case.sizes
    size = jnp.dtype(s["dtype"]).itemsize
    state = s["batch"] * s["heads"] * s["channels"] * s["state"]
    rows = s["batch"] * (2 * s["heads"] * s["channels"] + 2 * s["groups"] * s["state"]) * size
    return Cost(5 * state, 8 * state + rows)


def _sizes(
    batch: int, heads: int, groups: int, state: int, dtype: str = "bfloat16", channels: int = 64
) -> dict:
    return dict(batch=batch, heads=heads, channels=channels, groups=groups, state=state, dtype=dtype)


SCAN = Kernel(
    "ssd",
    ssd,
    partial(ssd, implementation="reference"),
    make,
    cost,
    cases=(
        Case("Mamba-2 2.7B, a prompt", "prefill", _sizes(1, 80, 1, 128) | dict(length=8192)),
        Case("Mamba-2 130M", "training", _sizes(8, 24, 1, 128) | dict(length=2048), gradient=True),
        Case("Mamba-2 2.7B, 8 groups", "training", _sizes(2, 80, 8, 128) | dict(length=2048), gradient=True),
    ),
    small=Case("8 heads", "small", _sizes(2, 8, 1, 32, "float32") | dict(length=512)),
)
STEP = Kernel(
    "ssd_step",
    ssd_step,
    partial(ssd_step, implementation="reference"),
    make_step,
    step_cost,
    cases=(
        Case("Mamba-2 2.7B, 1 sequence", "decode", _sizes(1, 80, 1, 128)),
        Case("Mamba-2 2.7B, 64 sequences", "decode", _sizes(64, 80, 1, 128)),
    ),
    small=Case("8 heads", "small", _sizes(8, 8, 1, 64, "float32")),
)


def _mixer(length: int, heads: int, channels: int, state: int) -> Case:
    sizes = _sizes(1, heads, 1, state, "float32", channels) | dict(length=length, taps=4)
    options = dict(head_dim=channels, state_dim=state)
    return Case(f"{heads} heads of {channels}, {length} tokens", "prefill", sizes, options)


MIXER = Kernel(
    "ssd_mixer",
    mixer,
    partial(mixer, implementation="reference"),
    make_mixer,
    mixer_cost,
    cases=(*(_mixer(length, 4, 64, 64) for length in (256, 1024, 4096)), _mixer(1024, 24, 64, 128)),
    small=_mixer(100, 2, 16, 8),
    implementations=("cpu",),
)
KERNEL = (SCAN, STEP, MIXER)
