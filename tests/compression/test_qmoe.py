"""QMoE: coded kernels as structured weights, and the method on a mixture of one layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.qmoe_decode.dictionary import BITS, fingerprint
from research.compression.blocks import plain
from research.compression.chain import Subject
from research.compression.qmoe import QMoE
from research.compression.rounding import Ternary, feed_back, fit, round_to_nearest
from research.config_capture import capture
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.moe.layer import MoE
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.ternary import PallasDecode, TernaryCode, dictionary_bits
from research.nn.transformer import Block
from research.nn.weights import stored_bits
from research.training.model_directory import load_model_directory, save_model
from research.training.structures import describe, rebuild
from tests.programs import drawn

EXPERTS, WIDTH, HIDDEN, VOCAB = 4, 16, 24, 32


rounding = jax.jit(feed_back, static_argnames=("grid", "damp"))
to_nearest = jax.jit(round_to_nearest, static_argnums=1)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def kernels():
    return normal(0, EXPERTS, WIDTH, HIDDEN)


@functools.cache
def coded():
    rounded = jax.tree.map(np.asarray, to_nearest(kernels(), Ternary()))
    ends = np.stack([rounded.fitted.low[:, 0], rounded.fitted.high[:, 0]], -1).astype(jnp.bfloat16)
    return TernaryCode.from_symbols(rounded.codes, jnp.asarray(ends)), rounded


def model(mlp=None, layers=2):
    experts = MoE(EXPERTS, 1, HIDDEN, gated=False, activation="gelu", norm="softmax_topk")
    block = Block(Attention(num_heads=2, head_dim=8), experts if mlp is None else mlp)
    return DecoderLM(vocab_size=VOCAB, width=WIDTH, max_length=64, num_layers=layers, blocks=(block,))


@functools.cache
def params():
    return drawn(model(), jnp.zeros((1, 2), jnp.int32))


def batch(seed=1, rows=4, length=64):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (rows, length)).astype(np.int32)
    return {"tokens": tokens, "segments": np.ones_like(tokens)}


@functools.cache
def compressed():
    return QMoE(together=2).compress(Subject(model(), params(), params(), [batch()]))


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens):
    return model.apply({"params": params}, tokens)


def experts(tree, layer=0, name="up"):
    return tree[f"layer_{layer}"]["mlp"]["experts"][name]["kernel"]


def test_a_coded_kernel_is_the_rounded_one_and_stores_what_it_says():
    kernel, rounded = coded()
    low, high = np.moveaxis(np.asarray(kernel.ends, np.float32)[:, None], -1, 0)
    exact = np.where(rounded.codes == 0, 0, np.where(rounded.codes == 2, high, low))
    np.testing.assert_array_equal(jax.jit(lambda k: k.materialize())(kernel), exact)
    x = normal(1, EXPERTS, 5, WIDTH)
    product = jax.jit(jax.vmap(lambda x, k: k.dot(x)))
    np.testing.assert_allclose(product(x, kernel), x @ exact, atol=1e-4)
    one = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[1]), kernel)
    fused = one.replace(kernel=PallasDecode("gpu", interpret=True))
    np.testing.assert_allclose(jax.jit(lambda k, x: k.dot(x))(fused, x[1]), x[1] @ exact[1], atol=1e-4)
    # 16 bits a word of the longest expert; 32 a row's beginning and one more; 2 x 16 its ends.
    longest = int(np.asarray(kernel.offsets)[:, -1].max())
    assert kernel.stored_bits() == EXPERTS * (16 * longest + 32 * (HIDDEN + 1) + 32 * HIDDEN)
    assert kernel.stored_bits() == 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(kernel))
    assert (
        dictionary_bits({"a": kernel, "b": kernel}) == BITS == 8 * 512 * 1024
        and dictionary_bits({"a": exact}) == 0
    )
    assert kernel.narrow(WIDTH, None) is kernel
    assert rebuild(describe(kernel)).shape == kernel.shape == (EXPERTS, WIDTH, HIDDEN)


def test_batched_rounding_is_that_of_each_expert_and_of_the_nearest_without_correlation():
    w, x = kernels(), normal(2, EXPERTS, 40, WIDTH)
    gram = np.einsum("eni,enj->eij", x, x)
    together = np.asarray(rounding(w, gram, grid=Ternary(), damp=0.1).codes)
    for e in range(EXPERTS):
        np.testing.assert_array_equal(together[e], rounding(w[e], gram[e], grid=Ternary(), damp=0.1).codes)
    nearest = np.asarray(to_nearest(w, Ternary()).codes)
    eye = np.broadcast_to(np.eye(WIDTH, dtype=np.float32), gram.shape)
    np.testing.assert_array_equal(rounding(w, eye, grid=Ternary(), damp=0.1).codes, nearest)
    # A Gram matrix that is not positive: that expert alone is rounded to nearest.
    gram[1] = -100 * np.eye(WIDTH)
    broken = rounding(w, gram, grid=Ternary(), damp=0.1)
    assert broken.nearest.tolist() == [False, True, False, False]
    np.testing.assert_array_equal(np.asarray(broken.codes)[1], nearest[1])
    zero = jax.jit(fit, static_argnums=1)(np.zeros((4, 2)), Ternary())
    assert zero.low.tolist() == [[-1, -1]] and zero.high.tolist() == [[1, 1]]


def test_experts_alone_are_compressed_and_decode_as_they_are_multiplied_out():
    found, notes = compressed()
    kinds = {
        type(leaf) for leaf in jax.tree.leaves(found["layer_1"]["mlp"], is_leaf=lambda x: hasattr(x, "ends"))
    }
    assert TernaryCode in kinds
    for layer in ("layer_0", "layer_1"):
        for part in ("attention", "mlp_norm"):
            jax.tree.map(np.testing.assert_array_equal, found[layer][part], params()[layer][part])
        jax.tree.map(
            np.testing.assert_array_equal, found[layer]["mlp"]["router"], params()[layer]["mlp"]["router"]
        )
    assert sum("bits a weight" in note for note in notes) == 4
    tokens = batch(5)["tokens"]
    multiplied = jax.jit(plain)(found)
    np.testing.assert_allclose(logits(model(), found, tokens), logits(model(), multiplied, tokens), atol=1e-4)
    # The second block is calibrated behind the compressed first one: its experts are not those of the other order.
    nearest, _ = QMoE(feedback=False).compress(Subject(model(), params(), params()))
    materialize = jax.jit(lambda kernel: kernel.materialize())
    before, after = (np.asarray(materialize(experts(tree))) for tree in (found, nearest))
    assert not np.array_equal(before, after)
    values = np.sort(np.unique(before[0, :, 0]))
    assert set(values) <= {0.0, *np.asarray(experts(found).ends, np.float32)[0, 0].tolist()}


def test_excluded_tokens_change_nothing_and_others_do():
    def rounded(tokens, exclude):
        one = batch() | {"tokens": tokens}
        method = QMoE(exclude=exclude, together=2)
        found, _ = method.compress(Subject(bag, own, own, [one]))
        return np.asarray(experts(found).codes), np.asarray(experts(found).offsets)

    # Without attention to them, a token reaches the experts' Gram matrices by itself alone.
    bag = model(layers=1)
    own = {name: value for name, value in params().items() if name != "layer_1"}
    silent = jax.tree.map(
        lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), own["layer_0"]["attention"]["output"]
    )
    own = own | {"layer_0": own["layer_0"] | {"attention": own["layer_0"]["attention"] | {"output": silent}}}
    tokens = batch()["tokens"] % (VOCAB - 2)
    one, other = (np.where(tokens < 4, mark, tokens) for mark in (VOCAB - 1, VOCAB - 2))
    marks = (VOCAB - 1, VOCAB - 2)
    jax.tree.map(np.testing.assert_array_equal, rounded(one, marks), rounded(other, marks))
    assert any(not np.array_equal(a, b) for a, b in zip(rounded(one, ()), rounded(other, ()), strict=True))


def test_saved_and_read(tmp_path):
    found, _ = compressed()
    save_model(tmp_path / "m", capture(model()), found)
    loaded = load_model_directory(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, found)
    assert stored_bits(loaded.params) == stored_bits(found)
    assert experts(loaded.params).dictionary == fingerprint()


def dense():
    return model(GatedMLP(HIDDEN), layers=1)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: coded()[0].narrow(8, None), "words lie across the cut; slice first"),
        (lambda: coded()[0].replace(dictionary="0" * 16).check(), "coded by another dictionary, 0000"),
        (
            lambda: coded()[0].replace(kernel=PallasDecode("tpu")).dot(jnp.ones(WIDTH)),
            "multiplies a single matrix",
        ),
        (
            lambda: QMoE().compress(Subject(dense(), {}, jax.eval_shape(init_dense), [batch()])),
            "qmoe compresses experts, and this model has none",
        ),
        (
            lambda: QMoE().compress(Subject(model(), params(), compressed()[0], [batch()])),
            "is TernaryCode already",
        ),
    ],
)
def test_mistakes_are_told(act, message):
    with pytest.raises(UserError, match=message):
        act()


def init_dense():
    return dense().init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
