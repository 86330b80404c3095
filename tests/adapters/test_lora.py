"""Low-rank adapters: what they begin as, what stays frozen, what is saved, and merging back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from research.adapters.corda import CorDA, damped
from research.adapters.lora import LoftQ, LoRA, NormalQuantizer, PiSSA, flat, in_turns, merge
from research.adapters.lq_lora import CANDIDATES, LQLoRA, decompose, plan
from research.adapters.mole import MoLE
from research.adapters.pat import PAT
from research.adapters.tuning import AdapterTuning
from research.compression.chain import Chain
from research.compression.factors import Factors
from research.config import build, of
from research.errors import UserError
from research.nn.lowrank import low_rank
from research.nn.normal_float import BlockNormal, code_book
from research.nn.weights import Sum, Weight, materialize, stored_bits
from research.training.partial import kept, save_adapter
from research.training.partitioning import make_mesh, parameter_shardings
from research.training.paths import named_leaves
from research.training.workdir import load_model

from .conftest import Run, stage, text, trainer

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


def materialized(params):
    return jax.tree.map(materialize, params, is_leaf=lambda node: isinstance(node, Weight))


@pytest.fixture(scope="module")
def logits(base):
    """Logits of kernels multiplied out: one program for all adapters."""
    model = load_model(base).model
    apply = jax.jit(lambda params: model.apply({"params": params}, TOKENS))
    return lambda params: np.asarray(apply(materialized(params)))


BEGINNINGS = {
    "LoRA": of(LoRA, rank=3, alpha=6.0),
    "PiSSA": of(PiSSA, rank=3, alpha=6.0),
    "KPA": of(CorDA, rank=3, alpha=6.0, context=text(), samples=16),
    "IPA": of(CorDA, rank=3, mode="instruction", context=text(), samples=16),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_model_begins_as_it_was(name, base, logits):
    task = AdapterTuning(build(BEGINNINGS[name]), base)
    params = task.start(jax.random.key(1))
    loaded = load_model(base)
    np.testing.assert_allclose(logits(task.unpack(params)), logits(loaded.params), atol=2e-5)
    before, after = flat(loaded.params), flat(params["base"])
    same = [path for path in before if np.array_equal(before[path], after[path])]
    assert (len(same) == len(before)) == (name == "LoRA")
    # All seven projections of both layers, and neither embedding nor norms.
    assert len(flat(params["adapter"])) == 14 and "embedding/table" in same and "final_norm/scale" in same
    merged, told = merge(task.unpack(params))
    assert told == "14 kernels merged"
    for path, kernel in flat(merged).items():
        np.testing.assert_allclose(kernel, before[path], atol=2e-6)


def test_corda_takes_the_components_that_its_mode_says():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(64, 8)) * 2.0 ** -np.arange(8), rng.normal(size=(8, 6))
    weighting, damping = damped(x.T @ x)
    assert damping == 0.01
    gram = x.T @ x
    gram += 0.01 * np.trace(gram) / 8 * np.eye(8)
    values = np.linalg.svd(gram @ w, compute_uv=False)
    for which, chosen in (("top", values[:2]), ("bottom", values[-2:])):
        part = low_rank(w, 2, weighting, which=which).product()
        assert np.linalg.norm(gram @ part) == pytest.approx(np.linalg.norm(chosen), rel=1e-9)
    with pytest.raises(UserError, match="CorDA needs a context"):
        CorDA(rank=2)


def test_lq_loras_code_book_and_storage():
    np.testing.assert_allclose(code_book(2, 0.9677083), [-1, 0, 0.3379, 1], atol=1e-4)
    wanted = [-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1]
    np.testing.assert_allclose(code_book(3, 0.9677083), wanted, atol=1e-4)
    np.testing.assert_allclose(code_book(4, 0.9677083), code_book(4), atol=1e-6)
    assert len(CANDIDATES) == 432
    w = jax.random.normal(jax.random.key(0), (64, 32)) * jnp.arange(1, 33)
    for quantizer in (
        BlockNormal(3, 8, "float32", 16, 16),
        BlockNormal(2, 4, "bfloat16", 32, 16),
        BlockNormal(8, 8, "float16", 16, 16),
    ):
        assert quantizer.fits(w.shape)
        weight = jax.jit(quantizer)(w)
        # b + b0 / B0 + bits(b1) / (B0 B1), and one offset in float32.
        assert stored_bits(weight) == quantizer.bits_per_weight * w.size + 32
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(weight)) * 8 == stored_bits(weight)
        # A scale is the largest magnitude of 16 or 32 neighbouring inputs of an output, in codes above the least one.
        largest = np.abs(np.asarray(w)).reshape(-1, quantizer.group, 32).max(1)
        step = (largest.max() - largest.min()) / (2**quantizer.scale_bits - 1)
        np.testing.assert_allclose(weight.scales(), largest, atol=0.51 * step + 0.01 * largest.max())
        x = jax.random.normal(jax.random.key(1), (3, 64))
        np.testing.assert_allclose(weight.dot(x), x @ weight.materialize(), rtol=1e-4, atol=1e-3)
        np.testing.assert_array_equal(weight.narrow(None, 16).materialize(), weight.materialize()[:, :16])
    gap = np.abs(weight.materialize() - w).max() / np.abs(w).max()
    assert gap < 0.05  # 8 bits
    assert not BlockNormal(4, group=64, block=256).fits((64, 32))


def test_decompositions_keep_their_best_turn():
    rng = np.random.default_rng(1)
    w = rng.normal(size=(32, 32)) * 2.0 ** -np.arange(32)[:, None]
    quantizer = BlockNormal(2, 8, "float32", 16, 16)
    found = decompose(w, 4, quantizer, 20)
    rest = w - np.asarray(found.weight.materialize(), np.float64) - found.fit.product()
    assert np.linalg.norm(rest) == pytest.approx(found.error, rel=1e-9) and found.error == min(found.errors)
    assert found.error < np.linalg.norm(w - np.asarray(quantizer(jnp.asarray(w, jnp.float32)).materialize()))
    # A constant Fisher changes nothing; another one lowers its own error.
    even = decompose(w, 4, quantizer, 20, np.full(w.shape, 4.0))
    np.testing.assert_allclose(even.fit.product(), found.fit.product(), atol=1e-6)
    fisher = rng.random((32, 1)) ** 8 * rng.random(32) ** 8
    own = decompose(w, 4, quantizer, 20, fisher)
    assert own.error < np.linalg.norm(np.sqrt(fisher) * rest)
    # Full rank: nothing is left to round.
    assert decompose(w, 32, quantizer, 1).error < 1e-9 * np.linalg.norm(w)
    # The weight that LoftQ returns is the one of its best turn.
    weight, fit, errors = in_turns(w, 4, quantizer, 3, first="quantized")
    values = np.asarray(weight.materialize(), np.float64)
    assert np.linalg.norm(w - values - fit.product()) == pytest.approx(min(errors), rel=1e-9)


def test_bits_follow_the_budget():
    candidates = (BlockNormal(2), BlockNormal(4), BlockNormal(8))
    shapes = {"a": (64, 256), "b": (64, 256)}
    errors = {"a": [4.0, 1.0, 0.1], "b": [2.0, 0.5, None]}
    picked = plan(shapes, errors, candidates, 4.2)
    assert [picked[path].bits for path in "ab"] == [4, 4]  # 1 + 0.25; 8 and 2 bits cost 5.1
    assert [plan(shapes, errors, candidates, 3.2)[path].bits for path in "ab"] == [4, 2]
    for match, call in {
        "budget=1 bits": lambda: plan(shapes, errors, candidates, 1.0),
        "blocks divide a of": lambda: plan(shapes, {"a": [None] * 3, "b": [None] * 3}, candidates, 4.0),
        "rounds by its candidates": lambda: LQLoRA(quantizer=NormalQuantizer()),
        "leave": lambda: LQLoRA(quantizer=NormalQuantizer()),
    }.items():
        with pytest.raises(UserError, match=match):
            call()


SMALL = (of(BlockNormal, bits=2, group=16, block=16), of(BlockNormal, bits=4, group=16, block=16))


@pytest.fixture(scope="module")
def finished(base, run) -> Run:
    """LQ-LoRA with dropout in two stages, saved every two steps."""
    adapter = of(
        LQLoRA,
        rank=2,
        alpha=4.0,
        dropout=0.1,
        budget=4.0,
        candidates=SMALL,
        steps=3,
        fisher=text(),
        samples=8,
    )
    return run(trainer(of(AdapterTuning, adapter=adapter, base=base), stage(3), checkpoint_every=2, ema=0.9))


def test_only_factors_are_trained_and_only_what_was_made_is_saved(finished: Run, base):
    state, began = finished.state, build(finished.config).task.start(jax.random.key(0))
    for part in ("base", "fixed"):
        jax.tree.map(np.testing.assert_array_equal, state.params[part], began[part])
    # Moments of the 28 factors and nothing else, beside counts.
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * 28 and {leaf.shape[-1] for leaf in moments} <= {2, 16, 32}
    kernels = flat(state.params["fixed"]["kernel"])
    assert {kernel.bits for kernel in kernels.values()} <= {2, 4} and len(kernels) == 14
    assert "layer_0/mlp/up/kernel" not in flat(state.params["base"])
    spent = sum(stored_bits(kernel) - 32 for kernel in kernels.values())
    assert spent <= 4.0 * sum(np.prod(kernel.shape) for kernel in kernels.values())
    manifest = json.loads((finished.workdir / "checkpoints" / "3" / "manifest.json").read_text())
    assert not any("/base/" in name or name.startswith("params/base") for name in str(manifest).split("'"))
    # A run that goes on has the very state, though the bits were found by data.
    resumed, _ = build(finished.config).restore(finished.workdir, devices=jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, resumed, state)


def test_an_adapter_is_loaded_like_any_model(finished: Run, base, logits, tmp_path):
    loaded = load_model(finished.workdir)
    wanted = finished.trainer.task.unpack(finished.state.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, wanted)
    assert isinstance(loaded.params["layer_0"]["mlp"]["up"]["kernel"], Sum)
    save_adapter(tmp_path / "small", finished.config, kept(finished.trainer.task, finished.state.params))
    again = load_model(tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, again.params, wanted)
    model, merged, told = finished.trainer.task.merge(finished.state.params)
    assert "14 of them were frozen in fewer bits" in told
    np.testing.assert_allclose(logits(merged), logits(wanted), atol=1e-5)
    weights = tmp_path / "small" / "adapter.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: its checksum"):
        load_model(tmp_path / "small")


def test_trained_factors_become_8_bits(finished: Run, base):
    """Every weight of a factor the nearest value of the book times the scale of its 16 inputs; the rest untouched."""
    loaded = load_model(finished.workdir)
    (step,) = Chain((Factors(group=16),)).run(loaded.model, loaded.params, ())
    assert step.notes == ["low-rank terms of 14 kernels in 8 bits"]
    before, after = flat(loaded.params), flat(step.params)
    for path, old in before.items():
        rest = (old.terms[0], after[path].terms[0]) if isinstance(old, Sum) else (old, after[path])
        jax.tree.map(np.testing.assert_array_equal, *rest)
    path = "layer_1/mlp/down/kernel"  # 32 inputs, rank 2, 16 outputs
    old, new = before[path].terms[1], after[path].terms[1]
    book = np.array(code_book(8, 0.9677083), np.float32)
    for exact, factor, group in ((old.down, new.down, 16), (old.up, new.up, 2)):
        values = np.repeat(np.asarray(factor.scales()), group, axis=0)[..., None] * book
        place = np.abs(values - np.asarray(exact)[..., None]).argmin(-1)[..., None]
        nearest = np.take_along_axis(values, place, -1)[..., 0]
        # A scale is a product and a sum, which a compiled program may round at once: 1 ulp, and 1 of the product.
        np.testing.assert_allclose(factor.materialize(), nearest, rtol=3e-7)
    # 8 bits a weight; 2 * 2 and 16 scales of 8 bits, one second scale and one offset for each factor.
    assert new.stored_bits() == (64 + 32 + 4 + 16) * 8 + 2 * 64 and new.scale == old.scale
    assert stored_bits(step.params) < stored_bits(loaded.params)
    for params, match in (
        (load_model(base).params, "this model has none"),
        (step.params, "this model has none"),
    ):
        with pytest.raises(UserError, match=match):
            next(Chain((Factors(),)).run(loaded.model, params, ()))


def test_what_does_not_fit_is_told_in_one_line(base, finished: Run):
    loaded = load_model(base)
    changed = jax.tree.map(lambda leaf: leaf, loaded.params)
    changed["layer_1"]["mlp"]["up"]["kernel"] = changed["layer_1"]["mlp"]["up"]["kernel"].at[0, 0].add(1.0)
    saved = kept(finished.trainer.task, finished.state.params)

    def task(params, adapter=None):
        made = AdapterTuning(adapter or LoRA(rank=2), base)
        made.__dict__["loaded"] = type(loaded)(loaded.model, params, None, loaded.config, None, loaded.inputs)
        return made

    narrow = {**loaded.params, "layer_1": {**loaded.params["layer_1"], "mlp": {}}}
    quantized = PiSSA(rank=2), task(load_model(finished.workdir).params, PiSSA(rank=2))
    for match, call in {
        "trained on another base": lambda: task(changed).recall(saved),
        "does not fit the base: it has no layer_1/mlp": lambda: task(narrow).recall(saved),
        "rank=17: layer_0/attention/key/kernel is 16 by 16": lambda: task(loaded.params, LoRA(rank=17)).start(
            jax.random.key(0)
        ),
        "matches none of the": lambda: task(loaded.params, LoRA(targets=("querry",))).start(
            jax.random.key(0)
        ),
        "PiSSA decomposes arrays, and layer_0/.* is Sum": lambda: quantized[1].start(jax.random.key(0)),
        "has 1 to": lambda: task(loaded.params, CorDA(rank=2, context=build(text(size=4)), samples=9)).start(
            jax.random.key(0)
        ),
        "dropout=1": lambda: LoRA(dropout=1.0),
        "alpha=0": lambda: LoRA(alpha=0.0),
    }.items():
        with pytest.raises(UserError, match=match):
            call()


def test_loftq_and_qlora_freeze_rounded_kernels(base):
    quantizer = of(NormalQuantizer, bits=2, group=16, scale_block=None)
    starts = {
        kind: AdapterTuning(build(of(kind, rank=4, quantizer=quantizer)), base).start(jax.random.key(0))
        for kind in (LoRA, LoftQ)
    }
    before = flat(load_model(base).params)
    for path in flat(starts[LoRA]["adapter"]):
        gaps = {}
        for kind, params in starts.items():
            kernel = Sum((flat(params["fixed"]["kernel"])[path], flat(params["adapter"])[path]))
            gaps[kind] = np.linalg.norm(kernel.materialize() - before[path])
        assert gaps[LoftQ] < gaps[LoRA]


def test_the_program_writes_and_merges(finished: Run, base, tmp_path, capsys):
    from experiments import adapter

    def run(*flags):
        return adapter.PROGRAM.call(adapter.main, [f"--{flag}" for flag in flags])

    small, merged = tmp_path / "small", tmp_path / "merged"
    assert run(f"adapter={finished.workdir}", f"output={small}") == 0
    assert run(f"adapter={small}", f"merge={merged}") == 0
    told = capsys.readouterr().out
    assert "14 kernels merged; 14 of them were frozen in fewer bits" in told
    wanted = finished.trainer.task.merge(finished.state.params)[1]
    jax.tree.map(np.testing.assert_array_equal, load_model(merged).params, wanted)
    assert run(f"adapter={merged}", f"output={tmp_path / 'x'}") == 2
    assert run(f"adapter={small}") == 2
    errors = capsys.readouterr().err
    assert "holds a model, not an adapter" in errors and "nothing to do" in errors


@pytest.mark.parametrize(
    "adapter", [LoRA(rank=2), PAT(rank=2, mixing_rank=4), MoLE(rank=2)], ids=lambda a: type(a).__name__
)
def test_every_leaf_has_a_sharding(adapter, base):
    params = AdapterTuning(adapter, base).start(jax.random.key(0))
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    shardings = named_leaves(parameter_shardings(params, mesh, replicate_below=32))
    found = {path: spec.spec for path, spec in shardings.items() if path.startswith("adapter/")}
    if type(adapter) is LoRA:
        # As the kernel is: its inputs, and its outputs; the rank is whole.
        assert found["adapter/layer_0/mlp/up/kernel/down"] == PartitionSpec("fsdp")
        assert found["adapter/layer_0/mlp/up/kernel/up"] == PartitionSpec(None, "tensor")
