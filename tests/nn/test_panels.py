"""Kernels in panels: the same products, for the parts of a tree that gain from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.skinny_matmul import panel_columns
from research.nn import weights
from research.nn.linear import Embedding
from research.nn.panels import Panels, to_panels
from research.nn.quantized import quantize


def whole(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def tree() -> dict:
    return {
        "up": {"kernel": jnp.asarray(whole(128, 200)), "bias": jnp.zeros(200)},
        "conv": {"kernel": jnp.asarray(whole(128, 200))},
        "router": {"kernel": jnp.asarray(whole(128, 8))},
        "experts": {"up": {"kernel": jnp.asarray(whole(4, 128, 200))}},
        "half": {"kernel": jnp.asarray(whole(128, 200), jnp.bfloat16)},
        "embedding": {"table": jnp.asarray(whole(300, 64))},
    }


def test_large_kernels_and_a_tied_head_are_laid_out():
    found, plain = to_panels(tree()), tree()
    assert isinstance(found["up"]["kernel"], Panels)
    assert np.array_equal(found["up"]["kernel"].materialize(), plain["up"]["kernel"])
    assert np.array_equal(found["embedding"]["head"].materialize(), plain["embedding"]["table"].T)
    for name in ("conv", "router", "half"):  # taps, a small kernel, another dtype
        assert isinstance(found[name]["kernel"], jax.Array)
    assert isinstance(found["experts"]["up"]["kernel"], jax.Array)
    assert "head" not in to_panels(tree() | {"head": {"kernel": jnp.asarray(whole(64, 300))}})["embedding"]


def test_structured_kernels_stay():
    quantized = quantize(jnp.asarray(whole(128, 200)), bits=4, group=32)
    assert to_panels({"up": {"kernel": quantized}})["up"]["kernel"] is quantized


def test_a_weight_like_others():
    kernel, x = whole(128, 200), whole(3, 5, 128, seed=1)
    panels = to_panels({"kernel": jnp.asarray(kernel)})["kernel"]
    assert panels.shape == (128, 200) and panels.dtype == jnp.float32
    assert np.array_equal(weights.dot(x, panels), x @ kernel)
    cut = weights.narrow(panels, inputs=50, outputs=panel_columns() + 1)
    assert cut.shape == (50, panel_columns() + 1)
    assert np.array_equal(weights.dot(x[..., :50], cut), x[..., :50] @ kernel[:50, : panel_columns() + 1])
    # Rows of bfloat16 are multiplied as float32 and rounded once: these whole numbers need more than its 8 bits.
    half = weights.dot(jnp.asarray(x, jnp.bfloat16), panels)
    assert half.dtype == jnp.bfloat16 and np.array_equal(half, jnp.asarray(x @ kernel, jnp.bfloat16))


def test_memory_is_shared_and_lines_are_whole():
    found = to_panels({name: {"kernel": jnp.asarray(whole(130, 200))} for name in "abc"})
    starts = sorted(part["kernel"].panels.unsafe_buffer_pointer() for part in found.values())
    size = 4 * found["a"]["kernel"].panels.size
    assert all(start % 64 == 0 for start in starts)
    assert all(0 <= second - first - size < 64 for first, second in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tied_head_reads_its_panels(dtype: jnp.dtype):
    table, x = whole(300, 64), jnp.asarray(whole(7, 64, seed=1), dtype)
    plain = {"embedding": {"table": jnp.asarray(table)}}
    model = Embedding(300, 64)
    wanted = model.apply({"params": plain["embedding"]}, x, method="attend")
    found = model.apply({"params": to_panels(plain)["embedding"]}, x, method="attend")
    assert found.dtype == wanted.dtype == jnp.float32 and np.array_equal(found, wanted)
