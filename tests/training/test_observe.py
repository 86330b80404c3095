"""Gram matrices and Fisher of a decoder's kernels, against its own inputs and against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.moe.layer import MoE
from research.nn.attention import Attention
from research.nn.fuse import fuse_projections
from research.nn.linear import Linear
from research.nn.mlp import GatedMLP
from research.nn.transformer import Block, unscan_layers
from research.nn.weights import LowRank
from research.training.observe import Tapped, _zero_tap, collect_fisher, collect_grams, short

WIDTH, EXPERTS, VOCAB = 8, 3, 16
SEGMENTS = np.array([[1] * 9 + [0] * 3, [1] * 4 + [2] * 8], np.int32)


def attention():
    return Attention(num_heads=2, head_dim=4)


# Slots that are no tokens: with biases, `dense` would give each expert all tokens, and `down` the image of padding.
MOE = MoE(num_experts=EXPERTS, k=2, hidden_dim=6, use_bias=True, dispatch="dense", shared=GatedMLP(6))
MODEL = DecoderLM(
    vocab_size=VOCAB,
    width=WIDTH,
    max_length=12,
    num_layers=2,
    blocks=(Block(attention(), MOE),),
    scan_layers=True,
    tied_head=False,
)


def batches(seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"tokens": rng.integers(0, VOCAB, (2, 12)).astype(np.int32), "segments": SEGMENTS} for _ in range(2)
    ]


def inputs_of(model, params, batch):
    """{path: what each Linear and MoE was called with, [B * T, width]}, and {path: chosen experts [B * T, k]}."""
    seen = {}

    def record(run, args, keywords, context):
        if context.method_name == "__call__" and isinstance(context.module, (Linear, MoE)):
            seen["/".join(context.module.path)] = args[0].reshape(-1, args[0].shape[-1])
        return run(*args, **keywords)

    with nn.intercept_methods(record):
        _, state = model.apply({"params": params}, **batch, mutable=["intermediates"])
    chosen = {
        f"{layer}/mlp": found["mlp"]["routing"][0].index for layer, found in state["intermediates"].items()
    }
    return seen, chosen


def test_grams_are_those_of_every_kernels_own_inputs():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), batches()[0]["tokens"])["params"]
    rng = np.random.default_rng(1)  # biases are drawn too, which otherwise begin as 0
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), shapes)
    told = []
    scanned = collect_grams(MODEL, params, batches(), tell=told.append)
    assert told == [1, 2]
    model, flat = unscan_layers(MODEL, params)
    reference = jax.jit(lambda batch: inputs_of(model, flat, batch))
    real = np.tile(SEGMENTS.reshape(-1) > 0, 2)
    seen, chosen = jax.tree.map(
        lambda *parts: np.concatenate(parts, dtype=np.float64), *map(reference, batches())
    )

    def found(path):
        layer, _, rest = path.partition("/")
        if not layer.startswith("layer_"):
            return scanned[path].total, scanned[path].count, scanned[path].magnitude
        gram, place = scanned[f"layers/layer_0/{rest}"], int(layer[-1])
        return gram.total[place], gram.count[place], gram.magnitude[place]

    linear = [path for path in seen if not path.endswith("/mlp")]
    # Four projections and the shared FFN's three of two layers, and the head.
    assert len(linear) == 2 * (4 + 3) + 1
    for path in linear:
        total, count, magnitude = found(f"{path}/kernel")
        x = seen[path][real]
        # Products of order 10 are summed in float32, over inputs that are themselves computed in another order.
        np.testing.assert_allclose(total, x.T @ x, rtol=2e-5, atol=2e-4, err_msg=path)
        np.testing.assert_allclose(magnitude, np.abs(x).sum(0), rtol=2e-5, atol=2e-4, err_msg=path)
        assert count == real.sum() == 2 * 21
    for layer in ("layer_0", "layer_1"):
        experts = flat[layer]["mlp"]["experts"]
        x = seen[f"{layer}/mlp"][real]
        np.testing.assert_allclose(found(f"{layer}/mlp/router/kernel")[0], x.T @ x, rtol=2e-5, atol=2e-4)
        for e in range(EXPERTS):
            x = seen[f"{layer}/mlp"][real & (chosen[f"{layer}/mlp"] == e).any(1)]
            gate, up = (
                x @ np.asarray(experts[n]["kernel"][e]) + experts[n]["bias"][e] for n in ("gate", "up")
            )
            hidden = gate / (1 + np.exp(-gate)) * up
            for name, rows in (("gate", x), ("up", x), ("down", hidden)):
                total, count, _ = found(f"{layer}/mlp/experts/{name}/kernel")
                np.testing.assert_allclose(total[e], rows.T @ rows, rtol=5e-5, atol=5e-4)
                assert count[e] == len(x)
    # The same inputs have one Gram matrix, others their own.
    query, key, value, output = (
        scanned[f"layers/layer_0/attention/{name}/kernel"] for name in ("query", "key", "value", "output")
    )
    assert query is key is value and output is not query
    gate, up, down = (scanned[f"layers/layer_0/mlp/experts/{name}/kernel"] for name in ("gate", "up", "down"))
    assert gate is up and down is not up
    np.testing.assert_allclose(
        gate.mean()[1, 2], gate.total[1, 2].astype(float) / gate.count[1, 2], rtol=1e-12
    )
    # Unrolled and with fused projections: the same numbers under other names.
    wanted = ("attention/qkv", "attention/output", "mlp/shared/gate_up")
    del flat["layer_1"]
    model, select = model.clone(num_layers=1), lambda path: path[8:-7] in wanted
    fused = collect_grams(model, fuse_projections(flat), batches(), select)
    assert set(fused) == {f"layer_0/{name}/kernel" for name in wanted}
    np.testing.assert_allclose(
        fused["layer_0/attention/qkv/kernel"].total, query.total[0], rtol=2e-5, atol=2e-4
    )


SHALLOW = DecoderLM(
    vocab_size=VOCAB,
    width=WIDTH,
    max_length=12,
    num_layers=0,
    blocks=(Block(attention(), GatedMLP(6)),),
    tied_head=False,
)


@pytest.fixture(scope="module")
def shallow():
    rng = np.random.default_rng(2)
    table, head = rng.normal(size=(VOCAB, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
    tree = {"embedding": {"table": table}, "head": {"kernel": head}, "final_norm": {"scale": np.ones(WIDTH)}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def test_fisher_is_the_sum_of_squares_row_by_row(shallow):
    """Without layers a row's gradient is h^T (softmax(h W) - onehot), over its targets with weight, by their number."""
    rng = np.random.default_rng(3)
    tokens, targets = rng.integers(0, VOCAB, (2, 3, 5)).astype(np.int32)
    weights = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], np.float32)
    batch = dict(tokens=tokens, targets=targets, weights=weights)
    fisher = collect_fisher(SHALLOW, shallow, [batch, batch])
    assert set(fisher) == {"head/kernel"}
    table, head = np.asarray(shallow["embedding"]["table"], np.float64), np.asarray(shallow["head"]["kernel"])
    expected = np.zeros(head.shape)
    for row in range(2):
        x = table[tokens[row]]
        h = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + SHALLOW.final_norm.epsilon)
        p = np.exp(h @ head)
        slope = p / p.sum(-1, keepdims=True) - np.eye(VOCAB)[targets[row]]
        expected += np.square(h.T @ (slope * weights[row][:, None] / weights[row].sum()))
    np.testing.assert_allclose(fisher["head/kernel"], 2 * expected, rtol=1e-4, atol=1e-9)


def test_bad_calibration_is_told(shallow):
    tokens = np.arange(6, dtype=np.int32)[None]
    batch = {"tokens": tokens, "segments": np.ones_like(tokens)}
    few = collect_grams(SHALLOW, shallow, [batch], accept_short=True)
    assert short(few) == {"head/kernel": 6}
    # A kernel of 8 inputs and 6 tokens: at least two directions were never seen.
    assert np.linalg.matrix_rank(few["head/kernel"].total) == 6
    ghost = shallow | {"ghost": {"kernel": jnp.ones((2, 2))}}
    low = shallow | {"head": {"kernel": LowRank(jnp.ones((WIDTH, 1)), jnp.ones((1, VOCAB)))}}
    weighted = batch | {"targets": tokens, "weights": np.zeros(tokens.shape, np.float32)}
    tapped = Tapped(jnp.ones((2, 3)), _zero_tap((2, 3)), jnp.ones((1, 4), bool), "layer_0/up/kernel")
    for match, call in {
        "short: head/kernel has 8 inputs and saw 6 .* 2 directions": lambda: collect_grams(
            SHALLOW, shallow, [batch]
        ),
        "it has no batch": lambda: collect_grams(SHALLOW, shallow, []),
        "all its tokens are padding": lambda: collect_grams(
            SHALLOW, shallow, [batch | {"segments": 0 * tokens}]
        ),
        "ghost/kernel: no inputs": lambda: collect_grams(SHALLOW, ghost, [batch], accept_short=True),
        "no kernel is selected": lambda: collect_grams(SHALLOW, shallow, [batch], lambda path: "up" in path),
        "no target with weight": lambda: collect_fisher(SHALLOW, shallow, [weighted]),
        "head/kernel is LowRank": lambda: collect_fisher(SHALLOW, low, [weighted]),
        "multiplies 3 rows of 4 tokens": lambda: tapped.dot(jnp.ones((3, 2))),
        "not multiplied through": tapped.materialize,
    }.items():
        with pytest.raises(UserError, match=match):
            call()
    part = tapped.narrow(1, 2)
    assert part.shape == (1, 2) and part.tap.gram.shape == (1, 1)
    # Structured kernels are observed alike: the inputs are the same.
    other = collect_grams(SHALLOW, low, [batch], accept_short=True)
    np.testing.assert_array_equal(other["head/kernel"].total, few["head/kernel"].total)
