"""Kernels in panels: the same products, for the parts of a tree that gain from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.skinny_matmul import panel_columns
from research.errors import UserError
from research.nn import weights
from research.nn.fuse import fuse_projections
from research.nn.linear import Embedding
from research.nn.panels import CodePanels, Panels, to_panels
from research.nn.quantized import PallasProduct, quantize


def whole(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def tree() -> dict:
    return {
        "up": {"kernel": jnp.asarray(whole(128, 200)), "bias": jnp.zeros(200)},
        "conv": {"kernel": jnp.asarray(whole(128, 200))},
        "router": {"kernel": jnp.asarray(whole(128, 8))},
        "layers": {"up": {"kernel": jnp.asarray(whole(4, 128, 200))}},
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
    assert isinstance(found["layers"]["up"]["kernel"], jax.Array)  # scanned
    assert "head" not in to_panels(tree() | {"head": {"kernel": jnp.asarray(whole(64, 300))}})["embedding"]


@pytest.mark.parametrize(
    "shape, change",
    [
        ((128, 200), dict(bits=2)),
        ((128, 200), dict(bits=3)),
        ((3, 128, 200), dict(bits=4)),
        ((128, 8), dict(bits=4)),
        ((130, 200), dict(bits=4, group=5)),  # a group divides a byte
    ],
)
def test_other_structured_kernels_stay(shape: tuple[int, ...], change: dict):
    quantized = quantize(jnp.asarray(whole(*shape)), **change)
    assert to_panels({"up": {"kernel": quantized}})["up"]["kernel"] is quantized


def test_a_kernel_with_its_own_product_stays():
    quantized = quantize(jnp.asarray(whole(128, 200)), 4).replace(kernel=PallasProduct(interpret=True))
    assert to_panels({"kernel": quantized})["kernel"] is quantized


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "bits, group, scales", [(8, 32, "float32"), (4, 32, "float32"), (8, 5, "bfloat16"), (4, None, "float16")]
)
def test_codes_in_panels(bits: int, group: int | None, scales: str, symmetric: bool):
    kernel = np.random.default_rng(0).normal(size=(160, 200)).astype(np.float32)
    quantized = quantize(jnp.asarray(kernel), bits, group, symmetric, scale_dtype=scales)
    found = to_panels({"kernel": quantized})["kernel"]
    assert isinstance(found, CodePanels) and isinstance(found, weights.Weight)
    assert found.shape == (160, 200) and found.dtype == quantized.dtype == jnp.float32
    assert np.array_equal(found.materialize(), quantized.materialize())
    same = to_panels({"kernel": quantized.materialize()})["kernel"]
    for rows in (1, 3, 9):  # the bits of the product with the kernel as floats
        x = jnp.asarray(np.random.default_rng(rows).normal(size=(rows, 160)), jnp.float32)
        assert np.array_equal(weights.dot(x, found), weights.dot(x, same))
    half = weights.dot(x.astype(jnp.bfloat16), found)
    assert half.dtype == jnp.bfloat16 and np.array_equal(half, weights.dot(x.astype(jnp.bfloat16), same))


def test_codes_are_cut_in_groups():
    found = to_panels({"kernel": quantize(jnp.asarray(whole(160, 200)), 4, 32)})["kernel"]
    outputs = panel_columns() + 1
    cut = weights.narrow(found, inputs=64, outputs=outputs)
    assert cut.shape == (64, outputs)
    assert np.array_equal(cut.materialize(), found.materialize()[:64, :outputs])
    x = whole(2, 64, seed=1)
    same = to_panels({"kernel": found.materialize()})["kernel"]
    assert np.array_equal(weights.dot(x, cut), weights.dot(x, weights.narrow(same, 64, outputs)))
    assert weights.narrow(found).shape == (160, 200)
    with pytest.raises(UserError, match="cuts a group of 32"):
        weights.narrow(found, inputs=40)
    one_group = to_panels({"kernel": quantize(jnp.asarray(whole(160, 200)), 4)})["kernel"]
    assert np.array_equal(weights.narrow(one_group, inputs=6).materialize(), one_group.materialize()[:6])
    with pytest.raises(UserError, match="cuts a byte of 4 bits"):
        weights.narrow(one_group, inputs=5)


def test_fused_codes_in_panels():
    parts = {
        name: {"kernel": quantize(jnp.asarray(whole(64, size, seed=size)), 4, 16)}
        for name, size in (("query", 200), ("key", 48), ("value", 56))
    }
    found = to_panels(fuse_projections(parts))["qkv"]["kernel"]
    assert isinstance(found, CodePanels)
    each = [part["kernel"].materialize() for part in parts.values()]
    assert np.array_equal(found.materialize(), np.concatenate(each, axis=1))


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
