"""The stack of blocks: scanned and unrolled, rematerialised, flat and batched, all the same function."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention, Context
from research.nn.masks import Window
from research.nn.mlp import MLP, GatedMLP
from research.nn.norm import LayerNorm, RMSNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block, LayerStack, scan_params, unscan_layers, unscan_params
from research.nn.weights import LowRank
from tests.programs import call, drawn

WIDTH, LENGTH = 8, 6
X = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))


class Stack(LayerStack):
    def setup(self):
        self.make_layers()

    def __call__(self, x):
        return self.run_layers(x, Context(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])))


def make(num_layers=4, blocks=2, **fields):
    attention = Attention(num_heads=2, head_dim=4, rotary=Rotary())
    pattern = (Block(attention, GatedMLP(12)), Block(attention.clone(rule=Window(2)), MLP(10), LayerNorm()))
    return Stack(pattern[:blocks], num_layers, **fields)


def init(model):
    return drawn(model, X, seed=1)


def gradient(model, params, **apply):
    def loss(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, X, **apply)[0]))

    return jax.jit(jax.grad(loss))(params)


def assert_close(a, b):
    # Sums of entries up to 10 after four layers of at most 16 terms: some 100 roundings of 10 * 2 ** -24.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=5e-5), a, b)


def test_a_block_adds_two_branches():
    """With an attention and an FFN of one number each, x + 2 norm(x), then y + 3 norm(y)."""
    block = Block(Attention(num_heads=1, head_dim=1), MLP(1, "relu", use_bias=False), RMSNorm(0.0))
    one = {"kernel": jnp.ones((1, 1))}
    params = {
        "attention": {"query": one, "key": one, "value": one, "output": {"kernel": jnp.full((1, 1), 2.0)}},
        "mlp": {"up": one, "down": {"kernel": jnp.full((1, 1), 3.0)}},
        "attention_norm": {"scale": jnp.ones(1)},
        "mlp_norm": {"scale": jnp.ones(1)},
    }
    x, at = jnp.asarray([[[5.0]]]), Context(jnp.zeros((1, 1), jnp.int32))
    # norm(5) = 1: 5 + 2 * 1 = 7; norm(7) = 1: 7 + 3 * 1.
    np.testing.assert_allclose(block.apply({"params": params}, x, at)[0], [[[10.0]]], rtol=1e-6)
    post = {
        **params,
        "attention_post_norm": {"scale": jnp.full(1, 0.5)},
        "mlp_post_norm": {"scale": jnp.full(1, 4.0)},
    }
    # norm(2) * 0.5 = 0.5 and norm(3) * 4 = 4.
    y = block.clone(post_norms=True).apply({"params": post}, x, at)[0]
    np.testing.assert_allclose(y, [[[9.5]]], rtol=1e-6)


def test_the_pattern_repeats():
    params = init(make(num_layers=3))
    assert sorted(params) == ["layer_0", "layer_1", "layer_2"]
    assert ["gate" in params[f"layer_{i}"]["mlp"] for i in range(3)] == [True, False, True]


def test_scanned_equals_unrolled_and_parameters_convert_exactly():
    unrolled, scanned = make(), make(scan_layers=True)
    params = init(unrolled)
    stacked = scan_params(params, 2)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, init(scanned))
    # layer_1 of the period holds layers 1 and 3.
    np.testing.assert_array_equal(
        stacked["layers"]["layer_1"]["mlp"]["up"]["kernel"][1], params["layer_3"]["mlp"]["up"]["kernel"]
    )
    back = unscan_params(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    model, same = unscan_layers(scanned, stacked)
    assert model == unrolled and unscan_layers(unrolled, params)[1] is params
    run = jax.jit(lambda model, params: model.apply({"params": params}, X), static_argnums=0)
    assert_close(run(scanned, stacked), run(model, same))  # hidden states and the fresh rows of every layer
    # The loop and the unrolled program order sums differently, so not bit for bit.
    assert_close(unscan_params(gradient(scanned, stacked)), gradient(unrolled, params))


def test_scanned_layers_start_different_from_each_other():
    kernel = init(make(scan_layers=True))["layers"]["layer_0"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (2, WIDTH, 12) and not (kernel[0] == kernel[1]).any()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient_but_does_recompute(scan, remat):
    plain, saving = make(2, scan_layers=scan), make(2, scan_layers=scan, remat=remat)
    params = init(plain)
    assert jax.tree.structure(init(saving)) == jax.tree.structure(params)
    assert_close(gradient(saving, params), gradient(plain, params))

    def products(model):
        def loss(p):
            return jnp.sum(model.apply({"params": p}, X)[0])

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    # "full" repeats all matrix products, "dots" those with batch dimensions: the scores and their use.
    assert products(saving) > products(plain)


@pytest.mark.parametrize("scan", [False, True])
def test_remat_of_all_but_products_keeps_those_of_the_kernel_for_a_cpu(scan):
    block = Block(Attention(num_heads=2, head_dim=32), GatedMLP(192))
    x = jnp.zeros((2, 128, 64))  # 256 rows: the kernel takes them

    def products(remat):
        model = Stack((block,), 2, scan_layers=scan, remat=remat)
        params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        grad = jax.grad(lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, x)[0])))
        return jax.jit(grad).lower(params).as_text().count("@lathe_matmul")

    layers = 1 if scan else 2
    assert products("none") == products("dots") == layers * 3 * 7  # seven kernels and their two gradients
    assert products("full") == layers * (3 * 7 + 6)  # what follows the last product is not computed again


def test_flat_and_batched_layouts_are_the_same():
    flat, batched = make(token_layout="flat"), make(token_layout="batched")
    params = init(flat)
    run = jax.jit(lambda model, params: model.apply({"params": params}, X), static_argnums=0)
    assert_close(run(flat, params), run(batched, params))
    assert_close(gradient(flat, params), gradient(batched, params))
    assert run(flat, params)[0].shape == X.shape


def test_dropout_needs_a_key_and_differs_between_layers():
    block = Block(Attention(num_heads=2, head_dim=4), MLP(8), dropout=0.5)
    for scan in (False, True):
        model = Stack((block,), 2, scan_layers=scan)
        params = init(model)
        run = jax.jit(
            lambda key, model=model, params=params: model.apply({"params": params}, X, rngs={"dropout": key})
        )
        quiet = call(model, params, X)[0]
        plain = call(model.clone(blocks=(block.clone(dropout=0.0),)), params, X)[0]
        np.testing.assert_array_equal(quiet, plain)
        first, again, other = (run(jax.random.key(k))[0] for k in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert not np.allclose(first, other) and not np.allclose(first, quiet)


@pytest.mark.parametrize(
    "model, fields, message",
    [
        (Stack, dict(blocks=()), "Stack.blocks is empty; the pattern needs at least one block"),
        (DecoderLM, dict(width=-3), "DecoderLM.width is -3; it must be at least 1"),
        (DecoderLM, dict(vocab_size=0), "DecoderLM.vocab_size is 0; it must be at least 1"),
        (DecoderLM, dict(max_length=0), "DecoderLM.max_length is 0; it must be at least 1"),
        (DecoderLM, dict(logit_softcap=0.0), "DecoderLM.logit_softcap is 0.0; it must be more than 0, or None"),
        (Attention, dict(num_heads=0), "Attention.num_heads is 0; it must be at least 1"),
        (Attention, dict(num_kv_heads=0), "Attention.num_kv_heads is 0; it must be at least 1"),
        (Attention, dict(softcap=-1.0), "Attention.softcap is -1.0; it must be more than 0, or None for no cap"),
        (MLP, dict(hidden_dim=0), "MLP.hidden_dim is 0; it must be at least 1"),
        (GatedMLP, dict(hidden_dim=-1), "GatedMLP.hidden_dim is -1; it must be at least 1"),
    ],
)  # fmt: skip
def test_sizes_out_of_range_are_told(model, fields, message):
    whole = {
        Stack: dict(num_layers=1),
        DecoderLM: dict(
            blocks=(Block(Attention(1, 4), None),), num_layers=1, vocab_size=4, width=4, max_length=4
        ),
        Attention: dict(num_heads=2, head_dim=4),
    }
    with pytest.raises(UserError, match=re.escape(message)):
        model(**(whole.get(model, {}) | fields))


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match=r"num_layers \(3\) to be a multiple of the pattern \(2\)"):
        init(make(num_layers=3, scan_layers=True))
    params = init(make(num_layers=3))
    with pytest.raises(UserError, match="3 layers are not a multiple of the pattern of 2"):
        scan_params(params, 2)
    with pytest.raises(UserError, match=r"layers \[0, 1, 2\] differ in shape and can't be scanned"):
        scan_params({**params, "layer_1": {"mlp": {"up": {"kernel": jnp.ones((1, 1))}}}}, 1)


def test_structured_kernels_are_scanned():
    model = make(blocks=1, scan_layers=True)
    params = init(model)
    up = params["layers"]["layer_0"]["mlp"]["up"]["kernel"]
    low = LowRank(
        jnp.ones((4, WIDTH, 1)) * jnp.arange(4.0)[:, None, None], jnp.full((4, 1, up.shape[-1]), 0.1)
    )
    params["layers"]["layer_0"]["mlp"]["up"]["kernel"] = low
    run = jax.jit(lambda model, params: model.apply({"params": params}, X)[0], static_argnums=0)
    scanned = run(model, params)
    unrolled, flat = unscan_layers(model, params)
    assert flat["layer_3"]["mlp"]["up"]["kernel"].down.tolist() == [[3.0]] * WIDTH
    assert_close(scanned, run(unrolled, flat))
    params["layers"]["layer_0"]["mlp"]["up"]["kernel"] = jnp.einsum("lir,lro->lio", low.down, low.up)
    assert_close(scanned, run(model, params))
