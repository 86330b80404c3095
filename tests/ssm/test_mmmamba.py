"""mmMamba: what is inherited is the teacher's to the bit, the mixer is the paper's formula, stages touch their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.mmmamba import stages
from research.config import build, of
from research.config_capture import capture
from research.data.recall import Recall
from research.decoding.generator import Generator
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention, Context
from research.nn.fuse import fuse_projections
from research.nn.masks import Full
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block, scan_params
from research.ssm.distillation import MambaDistillation, mimicry, watch
from research.ssm.mmmamba import MMMamba, converted, graft, kept_layers, seed_mixers, student_model
from research.ssm.recurrent import Convolution
from research.training.loop import Trainer
from research.training.model_directory import save_model
from research.training.paths import named_leaves
from research.training.workdir import load_model, open_workdir
from tests.programs import drawn

VOCAB, WIDTH, LENGTH = 13, 12, 8
NEW = {"A_log", "dt_bias", "dt/kernel", "conv/kernel", "conv/bias", "gate/kernel", "norm/scale"}


def decoder(layers=2, vocab=VOCAB, **attention) -> DecoderLM:
    """Four query heads over two key heads."""
    fields = dict(num_heads=4, head_dim=6, num_kv_heads=2, rotary=Rotary()) | attention
    block = Block(Attention(**fields), GatedMLP(8))
    return DecoderLM(blocks=(block,), num_layers=layers, vocab_size=vocab, width=WIDTH, max_length=64)


@functools.cache
def teacher():
    model = decoder(use_bias=True, output_bias=True, query_norm=RMSNorm(), key_norm=RMSNorm())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, jnp.float32), shapes)


@functools.cache
def seeds():
    """From plain, fused and scanned parameters, and the two ablations: one program."""
    model, params = teacher()
    student = student_model(model)

    @jax.jit
    def run(params, key):
        return {
            "plain": seed_mixers(student, model, params, key),
            "fused": seed_mixers(student, model, fuse_projections(params), key),
            "scanned": seed_mixers(student, model.clone(scan_layers=True), scan_params(params, 1), key),
            "scratch": seed_mixers(student, model, params, key, "scratch"),
            "inherit": seed_mixers(student, model, params, key, "inherit"),
        }

    return jax.tree.map(np.asarray, run(params, jax.random.key(1)))


def mixers():
    return seeds()["plain"]


def test_what_is_inherited_is_the_teachers_to_the_bit():
    """From plain, fused and scanned parameters alike; the rest starts as remembering everything."""
    _, params = teacher()
    for form in ("plain", "fused", "scanned"):
        for layer, mixer in seeds()[form].items():
            for name, leaf in named_leaves(params[layer]["attention"]).items():
                np.testing.assert_array_equal(named_leaves(mixer["attention"])[name], leaf)
    new = {n: x for n, x in named_leaves(mixers()["layer_1"]["attention"]).items() if n in NEW}
    assert set(new) == NEW
    decay = np.exp(-np.e * np.log1p(np.exp(new["dt_bias"])))  # exp(dt A) where W_dt = 0
    assert not new["dt/kernel"].any() and np.all((decay > 0.7619) & (decay < 0.9973))
    assert np.all(new["A_log"] == 1) and np.all(new["norm/scale"] == 1)
    limit = np.sqrt(2.0**-5 * 6 / (WIDTH + 24))  # Xavier of 12 inputs and 4 x 6 outputs, gain 2^-2.5
    assert 0.9 * limit < np.abs(new["gate/kernel"]).max() <= limit
    x = np.random.default_rng(1).normal(size=(1, 3, 48)).astype(np.float32)
    context, conv = Context(np.zeros((1, 3), np.int32)), mixers()["layer_1"]["attention"]["conv"]
    passed = jax.jit(lambda conv: Convolution(2, True).apply({"params": conv}, x, context, None))(conv)
    np.testing.assert_array_equal(passed, x)
    scratch, inherit = (seeds()[name]["layer_0"]["attention"] for name in ("scratch", "inherit"))
    assert (scratch["query"]["kernel"] != np.asarray(params["layer_0"]["attention"]["query"]["kernel"])).all()
    assert (inherit["A_log"] != 1).all() and (
        inherit["query"]["kernel"] == mixers()["layer_0"]["attention"]["query"]["kernel"]
    ).all()


def silu(x):
    return x / (1 + np.exp(-x))


def test_the_mixer_is_the_formula():
    """Four heads over two in numpy, token by token: dt times v, no rotary embedding, no scale, a norm a head."""
    rng = np.random.default_rng(3)
    mixer, d = MMMamba(4, 6, num_kv_heads=2, chunk=3), 6
    u = rng.normal(size=(5, WIDTH)).astype(np.float32)
    context = Context(np.arange(5)[None])
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), u[None], context)["params"]
    p = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 2, shapes)
    got, _ = jax.jit(lambda p: mixer.apply({"params": p}, u[None], context))(p)

    q, k, v = (u @ p[name]["kernel"] for name in ("query", "key", "value"))
    inputs = np.concatenate([v, k, q], axis=1)
    before = np.concatenate([np.zeros_like(inputs[:1]), inputs[:-1]])
    mixed = silu(before * p["conv"]["kernel"][0] + inputs * p["conv"]["kernel"][1] + p["conv"]["bias"])
    dt = np.log1p(np.exp(u @ p["dt"]["kernel"] + p["dt_bias"]))
    out = np.zeros((5, 4, d))
    for head in range(4):
        group, state = head // 2, np.zeros((d, d))
        for t in range(5):
            value, key = mixed[t, d * group :][:d], mixed[t, 2 * d + d * group :][:d]
            query = mixed[t, 4 * d + d * head :][:d]
            state = np.exp(-np.exp(p["A_log"][head]) * dt[t, head]) * state + dt[t, head] * np.outer(
                value, key
            )
            y = state @ query
            out[t, head] = y / np.sqrt(np.mean(y**2) + 1e-5) * p["norm"]["scale"]
    expected = (out.reshape(5, -1) * silu(u @ p["gate"]["kernel"])) @ p["output"]["kernel"]
    np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=1e-5)  # float32 against float64, sums of 24


def test_decoding_is_the_whole_sequence_in_constant_memory():
    model, params = teacher()
    student = student_model(model)
    tree = graft(params, mixers())
    generated = Generator(student, tree).generate([[1, 5, 3], [7]], max_new_tokens=9).samples
    whole = jax.jit(lambda tokens: jnp.argmax(student.apply({"params": tree}, tokens), -1))
    for prompt, sample in zip(([1, 5, 3], [7]), generated, strict=True):
        row = np.zeros((1, 16), np.int32)
        text = [*prompt, *sample.tokens]
        row[0, : len(text)] = text
        assert np.asarray(whole(row))[0, len(prompt) - 1 : len(text) - 1].tolist() == sample.tokens

    def held(model, length):
        cache = jax.eval_shape(lambda: model.init_cache(1, length))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))

    layer = 4 * (4 * 6 * 6 + 48)  # S of four heads, and one input of the convolution
    assert held(student, 100) == held(student, 100_000) == 2 * layer
    hybrid = student_model(model, "tail", 2)
    assert held(hybrid, 1000) == layer + 4 * 2 * 2 * 6 * 1000


def test_which_layers_stay_attention():
    assert [kept_layers(8, name, 4) for name in ("head", "tail", "head_stacked", "tail_stacked", None)] == [
        (0, 4),
        (3, 7),
        (0, 1),
        (6, 7),
        (),
    ]
    model, params = teacher()
    hybrid = student_model(model, "tail", 2)
    assert [type(block.attention) for block in hybrid.blocks] == [MMMamba, Attention]
    assert hybrid.blocks[1] == model.blocks[0]
    seed = jax.jit(functools.partial(seed_mixers, hybrid, model))
    made = graft(params, seed(params, jax.random.key(0)))
    assert made["layer_1"] is params["layer_1"]  # with its rotary embedding: the very block
    assert made["layer_0"]["mlp"] is params["layer_0"]["mlp"]


def test_every_layer_learns_from_the_teachers_states_alone():
    """The mimicry of layer 1 does not know what layer 0 has become; padding has no part in it."""
    model, params = teacher()
    student = student_model(model)
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8) % VOCAB
    positions, segments = np.broadcast_to(np.arange(8), (2, 8)), np.ones((2, 8), np.int32)
    segments[1, 5:] = 0
    _, seen = jax.jit(functools.partial(watch, model))(params, tokens, positions, segments)
    assert {layer: (u.shape, y.shape) for layer, (u, _, y) in seen.items()} == dict.fromkeys(
        ("layer_0", "layer_1"), ((16, WIDTH), (16, 24))
    )
    beyond = np.where(np.arange(16) >= 13, np.float32(100.0), 0)[:, None]
    padded = {layer: (u, where, np.asarray(y) + beyond) for layer, (u, where, y) in seen.items()}
    gradient = jax.jit(jax.value_and_grad(lambda m, seen: mimicry(student, m, seen)[0]))
    value, one = gradient(mixers(), seen)
    other = mixers() | {"layer_0": jax.tree.map(lambda x: x + 0.1, mixers()["layer_0"])}
    changed, two = gradient(other, padded)
    assert changed != value
    jax.tree.map(np.testing.assert_array_equal, one["layer_1"], two["layer_1"])
    assert all(np.any(leaf) for leaf in jax.tree.leaves(one["layer_1"]["attention"]["query"]))
    assert not np.any(one["layer_1"]["attention"]["output"]["kernel"])  # it is matched before W_O


def test_stages_touch_their_own_and_the_run_is_the_student(tmp_path):
    """Three stages of one step; what each changed, by name. The run loads as the student, hybrid, and decodes."""
    data = Recall(LENGTH, keys=4, values=4, fillers=5, size=32)
    model = decoder()
    params = drawn(model, jnp.zeros((1, 2), jnp.int32), seed=2)
    save_model(tmp_path / "teacher", capture(model), params)
    task = of(MambaDistillation, teacher=str(tmp_path / "teacher"), hybrid="head", period=2, chunk=4)
    short = stages((1, 1, 1), (1e-2, 1e-2, 1e-2), (4, 4, 4))
    config = of(Trainer, task=task, data=capture(data), stages=short, checkpoint_every=1, keep_last=4)
    trainer = build(config)
    assert [layer for layer, _ in converted(trainer.task.model)] == ["layer_1"]
    with open_workdir(tmp_path / "run", config) as place:
        state, metrics = trainer.train(place, progress=False, devices=jax.devices()[:1])
    assert {"train/loss", "train/mimicry", "train/cross_entropy"} <= set(metrics)
    jax.tree.map(np.testing.assert_array_equal, state.params["teacher"], params)  # to the bit
    start = trainer.task.start(jax.random.key(0))
    began = named_leaves(start["student"]["layer_1"]["attention"])
    loaded = [load_model(tmp_path / "run", step) for step in (1, 2, 3)]
    found = [jax.tree.map(np.asarray, named_leaves(run.params["layer_1"]["attention"])) for run in loaded]
    changed = [
        {name for name in then if np.any(then[name] != now[name])}
        for then, now in zip(found, found[1:], strict=False)
    ]
    projections = {f"{name}/kernel" for name in ("query", "key", "value")}
    fixed = {f"{name}/kernel" for name in ("query", "key", "value", "output")}
    for name in fixed:
        np.testing.assert_array_equal(found[0][name], began[name])
    assert changed == [NEW | projections] * 2
    assert loaded[2].model == trainer.task.model and build(loaded[2].config) == loaded[2].model
    jax.tree.map(np.testing.assert_array_equal, loaded[2].params["layer_0"], params["layer_0"])
    assert (
        len(Generator(loaded[2].model, loaded[2].params).generate([[1]], max_new_tokens=3).samples[0].tokens)
        == 3
    )


def test_mistakes_are_told():
    for call, message in (
        (lambda: kept_layers(8, "first", 4), "hybrid 'first': .* head, tail, head_stacked, tail_stacked"),
        (lambda: kept_layers(8, "head", 9), "period=9: one in 2 to 8 layers"),
        (lambda: student_model(decoder(rule=Full())), "layer_0 attends by Full; a recurrence is causal"),
        (lambda: student_model(student_model(decoder())), "the teacher's layers have MMMamba alone"),
        (lambda: seed_mixers(decoder(), decoder(), {}, jax.random.key(0), "half"), "seeding 'half'"),
        (lambda: MMMamba(4, 6, num_kv_heads=3), "num_heads=4 is not a multiple of num_kv_heads=3"),
        (lambda: MMMamba(4, 6, conv_width=1), "conv_width=1"),
        (lambda: MambaDistillation("x", compute_dtype="float16"), "compute_dtype"),
    ):
        with pytest.raises(UserError, match=message):
            call()
