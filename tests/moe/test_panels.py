"""Experts' kernels in panels: the same layer, faster; what a token becomes does not depend on its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.skinny_matmul import panel_columns
from research.decoding.generator import Generator
from research.decoding.prepare import prepare
from research.language.decoder import DecoderLM
from research.moe.dispatch import DenseDispatch, SortedDispatch, make_dispatch
from research.moe.experts import feed_forward
from research.moe.grouped import Groups, grouped_dot
from research.moe.grouped_ffn import grouped_feed_forward, in_panels, panels_feed_forward
from research.moe.layer import MoE
from research.moe.routing import route
from research.nn import weights
from research.nn.attention import Attention, Context
from research.nn.panels import StackedPanels, holds_stacked_panels, to_panels
from research.nn.quantized import quantize
from research.nn.transformer import Block

E, D, F = 4, 40, 100


def whole(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def stacked(kernel: np.ndarray) -> StackedPanels:
    return to_panels({"experts": {"kernel": jnp.asarray(kernel)}})["experts"]["kernel"]


def test_kernels_of_experts_are_laid_out_and_others_stay():
    quantized = quantize(jnp.asarray(whole(E, 64, 96)), bits=4, group=32)
    tree = {
        "router": {"kernel": jnp.asarray(whole(D, E))},
        "layers": {"kernel": jnp.asarray(whole(3, D, F))},
        "experts": {
            "up": {"kernel": jnp.asarray(whole(E, D, F)), "bias": jnp.asarray(whole(E, F))},
            "gate": {"kernel": jnp.asarray(whole(E, D, F), jnp.bfloat16)},
            "down": {"kernel": quantized},
        },
    }
    found = to_panels(tree)
    up = found["experts"]["up"]["kernel"]
    assert isinstance(up, StackedPanels) and up.shape == (E, D, F) and up.dtype == jnp.float32
    assert np.array_equal(up.materialize(), tree["experts"]["up"]["kernel"])
    for path in (("router", "kernel"), ("layers", "kernel"), ("experts", "up", "bias")):
        a, b = found, tree
        for name in path:
            a, b = a[name], b[name]
        assert a is b
    assert found["experts"]["gate"]["kernel"].dtype == jnp.bfloat16
    assert found["experts"]["down"]["kernel"] is quantized


def test_a_weight_like_others():
    kernel, x = whole(E, D, F), whole(E, 6, D, seed=1)
    panels = stacked(kernel)
    assert np.array_equal(jax.vmap(weights.dot)(x, panels), x @ kernel)
    cut = weights.narrow(panels, inputs=30, outputs=panel_columns() + 1)
    assert cut.shape == (E, 30, panel_columns() + 1)
    assert np.array_equal(cut.materialize(), kernel[:, :30, : panel_columns() + 1])
    one = jax.tree.map(lambda leaf: leaf[1], panels)
    assert one.shape == (D, F) and np.array_equal(one.materialize(), kernel[1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("make", [SortedDispatch.make, SortedDispatch.make_blocks, DenseDispatch.make])
def test_every_dispatch_multiplies_by_panels(make, dtype: jnp.dtype):
    logits = np.random.default_rng(0).normal(size=(80, E)).astype(np.float32) + [1.0, 0.0, -9.0, 0.0]
    routing = route(jnp.asarray(logits), 2, mask=np.arange(80) % 5 > 0)
    kernel, x = whole(E, D, F), jnp.asarray(whole(80, D, seed=1), dtype)

    def through(kernel: weights.Kernel) -> jax.Array:
        dispatch = make(routing)
        return dispatch.gather_slots(dispatch.dot(dispatch.scatter(x), kernel))

    found, wanted = jax.jit(through)(stacked(kernel)), jax.jit(through)(jnp.asarray(kernel))
    assert found.dtype == wanted.dtype == dtype and np.array_equal(found, wanted)


def test_rows_of_no_expert_are_0():
    kernel, rows = whole(E, D, F), whole(10, D, seed=1)
    found = grouped_dot(jnp.asarray(rows), stacked(kernel), Groups.sorted(jnp.asarray([3, 0, 4, 0])))
    wanted = np.concatenate([rows[:3] @ kernel[0], rows[3:7] @ kernel[2], np.zeros((3, F))])
    assert np.array_equal(found, wanted)


def drawn_experts() -> dict:
    """{"experts": {gate, up, down}/kernel}."""
    draw = np.random.default_rng(3).normal
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    kernels = {
        name: jnp.asarray(draw(size=(E, *shape)) / shape[0] ** 0.5, jnp.float32)
        for name, shape in shapes.items()
    }
    return {"experts": {name: {"kernel": kernel} for name, kernel in kernels.items()}}


@pytest.mark.parametrize("ffn", ["one", "two products"])
def test_a_token_has_the_same_bits_alone_and_among_others(ffn: str):
    # 400 tokens go in blocks of an expert's rows, few of them sorted.
    params = to_panels(drawn_experts())["experts"]
    draw = np.random.default_rng(0).normal
    logits, x = draw(size=(400, E)).astype(np.float32), draw(size=(400, D)).astype(np.float32)

    @jax.jit
    def layer(logits: jax.Array, x: jax.Array) -> jax.Array:
        dispatch = make_dispatch(route(logits, 2))
        rows = dispatch.scatter(x)
        if ffn == "one":
            return dispatch.gather_slots(panels_feed_forward(rows, params, dispatch.groups))
        return dispatch.gather_slots(feed_forward(dispatch, rows, params, "relu"))

    together = np.asarray(layer(logits, x))
    for chosen in (slice(7, 8), slice(7, 9), slice(100, 130), slice(390, 400)):
        assert np.array_equal(layer(logits[chosen], x[chosen]), together[chosen])


def test_the_whole_ffn_in_panels():
    params = drawn_experts()["experts"]
    panels = to_panels({"experts": params})["experts"]
    groups = Groups.sorted(jnp.asarray([5, 0, 1, 30]))
    rows = np.random.default_rng(0).normal(size=(40, D)).astype(np.float32)
    rows[36:] = 0
    found = panels_feed_forward(jnp.asarray(rows), panels, groups)
    wanted = grouped_feed_forward(jnp.asarray(rows), params, groups, 4, "silu")
    # Sums of at most 100 products in another order, of values near 1: 100 * 2**-24 = 6e-6.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_whose_ffn_is_in_panels():
    plain = drawn_experts()["experts"]
    panels = to_panels({"experts": plain})["experts"]
    assert in_panels(panels, "silu")
    assert not in_panels(panels, "relu")
    assert not in_panels(plain, "silu")
    assert not in_panels(panels | {"up": plain["up"]}, "silu")
    assert not in_panels(panels | {"up": panels["up"] | {"bias": jnp.zeros((E, F))}}, "silu")
    assert not in_panels({"up": panels["up"], "down": panels["down"]}, "silu")


@pytest.mark.parametrize("tokens, bias", [(1, True), (5, False), (300, False)])
def test_the_layer_computes_the_same(tokens: int, bias: bool):
    layer, context = MoE(E, 2, F, use_bias=bias), Context(jnp.arange(tokens)[None])
    x = jax.random.normal(jax.random.key(0), (1, tokens, D))
    params = layer.init(jax.random.key(1), x, context)["params"]
    wanted, found = (layer.apply({"params": p}, x, context) for p in (params, to_panels(params)))
    # Sums of at most 100 products in another order, of values near 1: 100 * 2**-24 = 6e-6.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_rows_of_panels_are_sorted_and_not_in_blocks(monkeypatch):
    # Where training has kernels, rows are never in blocks: as on a processor without them.
    monkeypatch.setattr("research.moe.dispatch.use_cpu_kernels", lambda: False)
    plain = drawn_experts()
    assert (
        holds_stacked_panels(to_panels(plain))
        and not holds_stacked_panels(plain)
        and not holds_stacked_panels(None)
    )
    routing = route(np.random.default_rng(0).normal(size=(400, E)).astype(np.float32), 2)
    assert make_dispatch(routing).groups.block > 0 and make_dispatch(routing, blocks=False).groups.block == 0
    # So does the layer: the programs of a model with and without panels sort into buffers of different sizes.
    layer, context, x = MoE(E, 2, F), Context(jnp.arange(400)[None]), jnp.zeros((1, 400, D))
    params = layer.init(jax.random.key(1), x, context)["params"]
    sorted_rows = f"{make_dispatch(routing, blocks=False).pair_of_slot.shape[0]}x{D}xf32"
    shown = [
        jax.jit(layer.apply).lower({"params": p}, x, context).as_text() for p in (params, to_panels(params))
    ]
    assert [sorted_rows in text for text in shown] == [False, True]


def decoder() -> DecoderLM:
    block = Block(Attention(num_heads=2, head_dim=16), MoE(E, 2, F))
    return DecoderLM(vocab_size=50, width=D, max_length=32, num_layers=2, blocks=(block,))


def test_decoding_gives_the_same_tokens_with_and_without(monkeypatch):
    model = decoder()
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    prompts, found = [[1, 2, 3, 4, 5], [7, 8]], {}
    for choice in ("on", "off"):
        monkeypatch.setenv("LATHE_CPU_KERNELS", choice)
        laid_out = jax.tree.leaves(
            prepare(model, params)[1], is_leaf=lambda leaf: isinstance(leaf, StackedPanels)
        )
        assert sum(isinstance(leaf, StackedPanels) for leaf in laid_out) == (6 if choice == "on" else 0)
        rows = Generator(model, params).generate(prompts, max_new_tokens=12).samples
        found[choice] = [row.tokens for row in rows]
    assert found["on"] == found["off"] and [len(tokens) for tokens in found["on"]] == [12, 12]
