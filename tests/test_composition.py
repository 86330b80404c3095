"""Which system works with what: every cell of docs/composition.md is a function here that runs.

A later system adds its cells with `runs` or `refused` and writes the page again:

    python -c "from tests import test_composition; test_composition.write()"
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import build, of
from research.config_capture import capture
from research.data.text import TokenDataset
from research.decoding.generator import Generator
from research.decoding.prepare import prepare
from research.decoding.proposers import Target
from research.decoding.sampling import Sampling
from research.decoding.speculative.aded import ADED, count_trigrams
from research.decoding.speculative.draft_model import Submodel
from research.decoding.speculative.eagle import ConfidenceTree, Eagle
from research.decoding.speculative.hidden_transfer import HiddenTransfer
from research.decoding.speculative.medusa import Medusa
from research.decoding.speculative.trees import RankTree
from research.elastic.loading import load_submodel
from research.elastic.matformer import MatFormer, extract, parse_widths
from research.elastic.slicing import ElasticSpec
from research.errors import UserError
from research.interop import huggingface
from research.language.decoder import DecoderLM
from research.moe.attention import MixtureOfAttention
from research.moe.layer import MoE
from research.moe.momentum import HeavyBall, MomentumBlock
from research.moe.selective_attention import SMHA
from research.moe.union import UoME
from research.nn.attention import Attention
from research.nn.fuse import fuse_projections
from research.nn.masks import Causal, Full, Window
from research.nn.mlp import MLP, GatedMLP
from research.nn.norm import RMSNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block, scan_params
from research.nn.weights import LowRank, materialize
from research.training.loop import Trainer
from research.training.model_directory import save_model
from research.training.optimizers import adamw, constant, sgd
from research.training.partitioning import batch_sharding, make_mesh, parameter_shardings
from research.training.stages import Stage
from research.training.state import initial_state
from research.training.step import make_step
from research.training.task import LanguageModelling
from research.training.workdir import load_model, open_workdir
from research.vision.vit import ViT

PAGE = Path(__file__).resolve().parent.parent / "docs" / "composition.md"
VOCAB, WIDTH, HIDDEN, LENGTH, ROWS = 32, 8, 16, 6, 8
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the page. `check` is given an empty directory; `because` is part of the error it must raise."""

    system: str
    part: str
    how: str
    because: str | None
    check: Callable[[Path], None]


CELLS: list[Cell] = []


def runs(system: str, part: str, how: str) -> Callable:
    """`system` with `part` works; `how` says what exactly is checked."""

    def add(check: Callable[[Path], None]) -> Callable[[Path], None]:
        CELLS.append(Cell(system, part, how, None, check))
        return check

    return add


def refused(system: str, part: str, because: str) -> Callable:
    """`system` with `part` is a UserError that says `because`."""

    def add(check: Callable[[Path], None]) -> Callable[[Path], None]:
        CELLS.append(Cell(system, part, "", because, check))
        return check

    return add


def page() -> str:
    """docs/composition.md."""
    lines = [
        "# What works with what",
        "",
        "Written from tests/test_composition.py, where every line below is a test.",
        "",
        "| System | With | |",
        "| --- | --- | --- |",
    ]
    for cell in CELLS:
        result = f"runs: {cell.how}" if cell.because is None else f"refused, because {cell.because}"
        lines.append(f"| {cell.system} | {cell.part} | {result} |")
    return "\n".join(lines) + "\n"


def write() -> None:
    """Writes the page; run it after a change of the cells."""
    PAGE.write_text(page(), encoding="utf-8")


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "write it again as the docstring of this file says"


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.system}-{cell.part}".replace(" ", "_"))
def test_cell(cell: Cell, tmp_path: Path):
    if cell.because is None:
        cell.check(tmp_path)
        return
    with pytest.raises(UserError) as error:
        cell.check(tmp_path)
    assert cell.because in str(error.value)


# The pieces that cells share: a decoder of two or three layers, a batch of its tokens, one training step.


def decoder(rules=(Causal(),), *, num_layers=2, norm=RMSNorm(), post_norms=False, attention=None, **fields):  # noqa: B008
    layer = dict(num_heads=2, head_dim=4, rotary=Rotary(), **(attention or {}))
    blocks = tuple(Block(Attention(**layer, rule=r), GatedMLP(HIDDEN), norm, post_norms) for r in rules)
    sizes = dict(vocab_size=VOCAB, width=WIDTH, max_length=32, blocks=blocks)
    return DecoderLM(num_layers=num_layers, **sizes | fields)


def make_batch() -> dict[str, jax.Array]:
    text = jax.random.randint(jax.random.key(1), (ROWS, LENGTH + 1), 0, VOCAB)
    return {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "segments": jnp.ones((ROWS, LENGTH), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH)),
        "target_bytes": jnp.ones((ROWS, LENGTH), jnp.int32),
        "weights": jnp.ones((ROWS, LENGTH)).at[0, 3:].set(0.0),
    }


@functools.lru_cache(maxsize=4)
def init(model):
    return jax.jit(model.init)(KEY, jnp.zeros((1, 2), jnp.int32))["params"]


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.apply({"params": params}, make_batch()["tokens"])


def train(task, params, steps=1, *, mesh=None, ema=None, **stage):
    """State after, and metrics of `steps` steps of gradient descent, whose updates are proportional to the gradient,
    so that rounding stays rounding."""
    stage = Stage("main", steps=steps, batch_size=ROWS, optimizer=sgd(constant(0.05)), **stage)
    batch = make_batch()
    if mesh is None:
        mesh = make_mesh({}, jax.devices()[:1])
    else:
        params = jax.device_put(params, parameter_shardings(params, mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
    rule = stage.optimizer.transformation(steps, params, "stage")
    options = dict(first_step=0, clip=1.0, ema=ema)
    step = jax.jit(make_step(task, stage, rule, stage.mask(params), mesh, **options))
    state = initial_state(params, rule.init(params), 0, ema=ema is not None)
    rows = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        rows.append(metrics)
    return state, rows


def mean(metrics):
    return float(metrics["loss"][0] / metrics["loss"][1])


def close(a, b, rtol=1e-5, atol=1e-6):
    """Float32 rounding of sums of at most 50 terms of order 1."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


NESTED = (
    "three joint steps lower the loss; the smallest model gives units beyond it no gradient and, extracted, has "
    "the same logits"
)


def nested(model, params=None, task=LanguageModelling):
    """What `NESTED` says."""
    mat = MatFormer(task(model), divisors=(8, 1))
    params = init(model) if params is None else params
    _, rows = train(mat, params, 3)
    assert mean(rows[2]) < mean(rows[0])
    small = jax.jit(jax.grad(lambda p: mat.task.loss(mat.granularity(p, 0), make_batch(), KEY)["loss"][0]))(
        params
    )
    for name, layer in small.items():
        if name.startswith("layer"):
            for mlp in [layer["mlp"]] if "mlp" in layer else [part["mlp"] for part in layer.values()]:
                mlp = mlp.get("experts", mlp)
                up, down = materialize_up(mlp["up"]["kernel"]), mlp["down"]["kernel"]
                assert (up[..., HIDDEN // 8 :] == 0).all() and (up[..., : HIDDEN // 8] != 0).any()
                assert isinstance(down, LowRank) or (down[..., HIDDEN // 8 :, :] == 0).all()
    cut_model, cut = extract(model, params, parse_widths("1/8", mat))
    np.testing.assert_array_equal(logits(cut_model, cut), logits(model, mat.granularity(params, 0)))
    return cut_model, cut


def materialize_up(kernel):
    """The columns of a gradient with respect to an up kernel: of a low-rank one those of its second factor."""
    return kernel.up if isinstance(kernel, LowRank) else kernel


# MatFormer


@runs("MatFormer", "scanned layers", f"{NESTED}; losses equal those of unrolled layers")
def _(_):
    model = decoder(scan_layers=True)
    nested(model)
    task, other = (MatFormer(LanguageModelling(m), divisors=(8, 1)) for m in (model, decoder()))
    unrolled = init(other.model)
    stacked = jax.jit(task.loss)(scan_params(unrolled, 1), make_batch(), KEY)
    close(stacked["loss"], jax.jit(other.loss)(unrolled, make_batch(), KEY)["loss"])


@refused(
    "MatFormer", "Mix'n'Match of scanned layers", "a scanned model is sliced to one width and all layers"
)
def _(_):
    model = decoder(scan_layers=True)
    extract(model, init(model), ElasticSpec((0, 1), (2, 16)))


@runs("MatFormer", "local and global layers (window pattern)", NESTED)
def _(_):
    nested(decoder((Window(2), Window(2), Causal()), num_layers=3))


@runs("MatFormer", "grouped queries and qk-norm (Qwen 3)", NESTED)
def _(_):
    nested(decoder(attention=dict(num_kv_heads=1, query_norm=RMSNorm(), key_norm=RMSNorm())))


@runs("MatFormer", "soft caps, post-norms, unit-offset norms (Gemma 2)", NESTED)
def _(_):
    options = dict(
        norm=RMSNorm(unit_offset=True), post_norms=True, embedding_multiplier=3.0, logit_softcap=3.0
    )
    nested(decoder((Window(2), Causal()), attention=dict(softcap=5.0), **options))


@runs(
    "MatFormer",
    "low-rank kernels",
    f"{NESTED}; the factors are really smaller; logits are those of their products",
)
def _(_):
    model = decoder()
    rng = np.random.default_rng(0)

    def low(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        return LowRank(
            *(jnp.asarray(0.5 * rng.normal(size=s), "f") for s in ((leaf.shape[0], 3), (3, leaf.shape[1])))
        )

    params = jax.tree_util.tree_map_with_path(low, init(model))
    cut_model, cut = nested(model, params)
    gate, down = (cut["layer_0"]["mlp"][name]["kernel"] for name in ("gate", "down"))
    assert [gate.down.shape, gate.up.shape, down.down.shape, down.up.shape] == [
        (8, 3),
        (3, 2),
        (2, 3),
        (3, 8),
    ]
    plain = jax.tree.map(materialize, cut, is_leaf=lambda x: isinstance(x, LowRank))
    close(logits(cut_model, cut), logits(cut_model, plain), 1e-4, 1e-5)


@refused(
    "MatFormer",
    "a model directory of low-rank kernels",
    "a model directory holds arrays: materialize it first",
)
def _(directory):
    model = decoder()
    params = jax.tree.map(lambda x: x, init(model))
    params["layer_0"]["mlp"]["up"]["kernel"] = LowRank(jnp.ones((WIDTH, 1)), jnp.ones((1, HIDDEN)))
    cut_model, cut = extract(model, params, ElasticSpec((0, 1), (2, 2)))
    save_model(directory / "model", capture(cut_model), cut)


@refused("MatFormer", "projections fused for decoding", "this FFN is fused for decoding (gate_up)")
def _(_):
    model = decoder()
    extract(model, fuse_projections(init(model)), ElasticSpec((0, 1), (2, 2)))


@refused("MatFormer", "an FFN without hidden units", "Attention has no hidden_dim to slice")
def _(_):
    MatFormer(LanguageModelling(decoder().clone(blocks=(Block(Attention(1, 8), Attention(1, 8)),))))


@runs("MatFormer", "bfloat16 compute", f"{NESTED}; masters stay float32; the loss is within 1 % of float32's")
def _(_):
    model = decoder()
    nested(model, task=functools.partial(LanguageModelling, compute_dtype="bfloat16"))
    half, full = (
        train(MatFormer(LanguageModelling(model, compute_dtype=dtype), divisors=(8, 1)), init(model))
        for dtype in ("bfloat16", "float32")
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(half[0].params)} == {jnp.dtype("float32")}
    losses = [mean(rows[0]) for _, rows in (half, full)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)


for _training in ("joint", "sampled"):

    @runs(
        f"MatFormer ({_training})",
        "data, FSDP and tensor parallelism on 8 devices",
        "loss and parameters after a step equal those of one device; matrices lie in quarters",
    )
    def _(_, training=_training):
        mat = MatFormer(LanguageModelling(decoder()), divisors=(4, 1), training=training)
        params = init(mat.model)
        one, rows = train(mat, params)
        mesh = make_mesh(dict(data=2, fsdp=2, tensor=2), jax.devices()[:8])
        spread, spread_rows = train(mat, params, mesh=mesh)
        up = spread.params["layer_0"]["mlp"]["up"]["kernel"]
        assert up.addressable_shards[0].data.size * 4 == up.size
        close(spread.params, one.params)
        close(mean(spread_rows[0]), mean(rows[0]))


@runs(
    "MatFormer (joint)", "gradient accumulation", "a step of 2 microbatches equals a step of the whole batch"
)
def _(_):
    mat = MatFormer(LanguageModelling(decoder()), divisors=(4, 1))
    whole, rows = train(mat, init(mat.model))
    parts, parts_rows = train(mat, init(mat.model), accumulate=2)
    close(parts.params, whole.params)
    close(mean(parts_rows[0]), mean(rows[0]))


@runs("MatFormer (sampled)", "gradient accumulation", "every microbatch draws its own granularity")
def _(_):
    mat = MatFormer(LanguageModelling(decoder()), divisors=(2, 1), training="sampled")
    _, rows = train(mat, init(mat.model), 8, accumulate=4)
    weights = [(float(row["loss_1/2"][1]), float(row["loss_1/1"][1])) for row in rows]
    # 8 rows of 6 tokens but for 3: every token is in one of the two, and not always all in the same.
    assert all(small + full == 45 for small, full in weights)
    assert any(0 < small < 45 for small, _ in weights)


@runs(
    "MatFormer",
    "moving average of the parameters",
    "it follows every unit; a submodel of the average is the average of submodels",
)
def _(_):
    mat = MatFormer(LanguageModelling(decoder()), divisors=(4, 1))
    start = init(mat.model)
    state, _ = train(mat, start, ema=0.9)
    # min(0.9, (1 + 1) / (10 + 1)) = 2 / 11 of the old is kept.
    expected = jax.tree.map(lambda a, p: a + (1 - 2 / 11) * (p - a), start, state.params)
    close(state.ema, expected)
    close(mat.variants(state.ema)["1/4"], mat.granularity(expected, 0))


@runs(
    "MatFormer",
    "decoding",
    "the engine's greedy tokens of S and of a Mix'n'Match model with a skipped layer are those of full forwards",
)
def _(_):
    model = decoder((Window(3), Causal()), num_layers=2, attention=dict(num_kv_heads=1))
    params = jax.tree.map(lambda x: 3.0 * x if x.ndim > 1 else x, init(model))
    mat = MatFormer(LanguageModelling(model))
    for widths in ("S", "-,4"):
        small, cut = extract(model, params, parse_widths(widths, mat))
        (sample,) = Generator(small, cut).generate([[5, 9, 2]], max_new_tokens=8).samples
        tokens = [5, 9, 2]
        forward = jax.jit(lambda row, small=small, cut=cut: small.apply({"params": cut}, row))
        for at in range(2, 10):
            row = jnp.zeros((1, 11), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))
            tokens.append(int(jnp.argmax(forward(row)[0, at])))
        assert sample.tokens == tokens[3:]


@runs(
    "MatFormer",
    "speculative decoding, S drafts and XL verifies",
    "exactly XL's greedy tokens, in fewer calls",
)
def _(_):
    model = decoder()
    params = jax.tree.map(lambda x: 3.0 * x if x.ndim > 1 else x, init(model))
    drafter = Submodel(divisor=8, gamma=3)
    cut = drafter.create(KEY, Target(params, model))
    prompts, count = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6]], 16
    plain = Generator(model, params).generate(prompts, max_new_tokens=count)
    drafted = Generator(model, params, proposer=drafter, proposer_params=cut)
    result = drafted.generate(prompts, max_new_tokens=count)
    assert [sample.tokens for sample in result.samples] == [sample.tokens for sample in plain.samples]
    # Prefill gives 1 of 16 tokens and 4 calls the others if every draft is right: some were, and some were not.
    assert 1 + 4 < result.stats.calls < plain.stats.calls == 16


# Drafters whose ways into the target differ: heads on its output, rows between its layers, a layer with a cache of its
# own, a search in the text. Parameters are as created: exactness does not depend on good guesses.
TREE = RankTree(((0,), (1,), (0, 0), (0, 1)))
DRAFTERS = {
    "Medusa": Medusa(TREE, num_heads=2),
    "Hidden Transfer": HiddenTransfer((1, 1), TREE.paths),
    "EAGLE-2": Eagle(ConfidenceTree(depth=2, width=2, budget=4)),
    "ADED": ADED(iterations=8, paths=2, nodes=4, successors=2),
}


def drafted_as_plain(name: str, model, params, **options) -> None:
    """The drafter's output is that of plain decoding, for prompts of unequal lengths."""
    drafter, target = DRAFTERS[name], Target(*reversed(prepare(model, params)))
    own = jax.jit(lambda: drafter.create(KEY, target))() if name != "ADED" else text_table()
    drafted = Generator(model, params, proposer=drafter, proposer_params=own)
    options = dict(max_new_tokens=20) | options
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6]]
    expected = Generator(model, params).generate(prompts, **options)
    assert drafted.generate(prompts, **options).samples == expected.samples


def text_table():
    text = np.arange(64, dtype=np.int32)[None] * 5 % VOCAB
    return count_trigrams([{"tokens": text, "segments": np.ones_like(text)}], VOCAB, successors=2)


def louder(params):
    """Larger kernels, so that greedy output is not one token for ever."""
    return jax.tree.map(lambda x: 3.0 * x if x.ndim > 1 else x, params)


for _name in DRAFTERS:

    @runs(
        _name,
        "window cache, soft caps and post-norms (Gemma)",
        "behind a ring that has wrapped, the tokens of plain decoding",
    )
    def _(_, name=_name):
        attention = dict(softcap=20.0, num_kv_heads=1)
        model = decoder(
            (Window(4), Causal()),
            attention=attention,
            post_norms=True,
            norm=RMSNorm(unit_offset=True),
            logit_softcap=30.0,
        )
        drafted_as_plain(name, model, louder(init(model)))

    @runs(_name, "low-rank target", "kernels of rank 2 in attention and FFN: the tokens of plain decoding")
    def _(_, name=_name):
        model = decoder()
        params = jax.tree.map(np.asarray, louder(init(model)))
        for layer in ("layer_0", "layer_1"):
            for part, names in (("attention", ("query", "output")), ("mlp", ("up", "down"))):
                for kernel in names:
                    left, values, right = np.linalg.svd(
                        params[layer][part][kernel]["kernel"], full_matrices=False
                    )
                    low = LowRank(jnp.asarray(left[:, :2] * values[:2]), jnp.asarray(right[:2]))
                    params[layer][part][kernel] = {"kernel": low}
        drafted_as_plain(name, model, params)


@runs("Medusa", "scanned target", "unrolled when it is decoded: the tokens of plain decoding")
def _(_):
    model = decoder()
    params = scan_params(louder(init(model)), 1)
    drafted_as_plain("Medusa", model.clone(scan_layers=True), params)


@runs("ADED", "sampling with a repetition penalty", "the tokens of plain sampling with the same seed")
def _(_):
    model = decoder()
    options = dict(sampling=Sampling(0.9, top_p=0.9, repetition_penalty=1.3), seed=2)
    drafted_as_plain("ADED", model, louder(init(model)), **options)


@runs(
    "MatFormer",
    "checkpoint, extraction, model directory, transformers",
    "trained in a workdir, cut from its checkpoint, saved, read back, exported with equal and with padded widths: "
    "the same logits throughout",
)
def _(directory):
    (directory / "corpus.txt").write_text("\n\n".join(f"line {i} of a small corpus" for i in range(200)))
    model = decoder(vocab_size=4096)
    data = of(TokenDataset, sources=str(directory / "corpus.txt"), length=LENGTH)
    optimizer = of(adamw, schedule=of(constant, peak=1e-2))
    config = of(
        Trainer,
        task=of(MatFormer, task=of(LanguageModelling, model=capture(model))),
        data=data,
        stages=(of(Stage, name="train", steps=2, batch_size=4, optimizer=optimizer),),
    )
    with open_workdir(directory / "run", config) as workdir:
        state, _ = build(config).train(workdir, progress=False, devices=jax.devices()[:1])
    trained = jax.tree.map(np.asarray, state.params)
    for widths, padded_to in (("M", None), ("S,XL", HIDDEN)):
        loaded, spec = load_submodel(directory / "run", widths)
        expected = logits(*extract(model, trained, spec))
        np.testing.assert_array_equal(logits(loaded.model, loaded.params), expected)
        saved = directory / f"model_{widths}"
        save_model(saved, loaded.config, loaded.params)
        again = load_model(saved)
        assert again.model == loaded.model
        np.testing.assert_array_equal(logits(again.model, again.params), expected)
        report = huggingface.save(again.model, {"params": again.params}, directory / f"export_{widths}")
        assert report.padded_to == padded_to
        exported, variables, _ = huggingface.load(directory / f"export_{widths}")
        # Padding adds zeros to sums of 16 terms.
        close(logits(exported, variables["params"]), expected)


@refused("MatFormer", "export of unequal widths without padding", "FFN widths 2, 16 differ between layers")
def _(directory):
    model = decoder()
    small, cut = extract(model, init(model), ElasticSpec((0, 1), (2, 16)))
    huggingface.save(small, {"params": cut}, directory / "export", unequal="refuse")


@refused("MatFormer", "export of a ViT", "it is a ViT, not a plain DecoderLM")
def _(directory):
    block = Block(Attention(num_heads=2, head_dim=4, rule=Full()), MLP(HIDDEN))
    model = ViT(blocks=(block,), num_layers=2, num_classes=3, width=WIDTH, patch=2)
    params = jax.jit(model.init)(KEY, jnp.zeros((1, 4, 4, 1)))["params"]
    small, cut = extract(model, params, ElasticSpec((0, 1), (2, 2)))
    huggingface.save(small, {"params": cut}, directory / "export")


# Union of Experts: heads that keep only their own tokens, with positions among these, and slices of an FFN.


def union(slices=UoME(2, 1, HIDDEN // 2, "silu", gated=True, use_bias=False), **fields):  # noqa: B008
    heads = SMHA(2, 4, 1, rotary=Rotary(), rope_positions="compact", capacity_factor=1.0)
    return decoder(blocks=(Block(heads, slices),), **fields)


@runs(
    "Union of Experts", "tree decoding", "drafted by Medusa, heads with slots: the tokens of plain decoding"
)
def _(_):
    drafted_as_plain("Medusa", union(), louder(init(union())))


@refused("Union of Experts", "decoding of ranked slices", "selection='ranked' looks at the whole sequence")
def _(_):
    model = union(UoME(2, 1, HIDDEN // 2, selection="ranked", capacity_factor=1.0))
    token = jnp.zeros((1, 1), jnp.int32)
    jax.eval_shape(lambda: model.init(KEY, token, model.init_cache(1, 4), method="extend"))


@runs(
    "Union of Experts",
    "MatFormer",
    "every slice is cut to its first units; extracted, it has the same logits",
)
def _(_):
    mat = MatFormer(LanguageModelling(union()), divisors=(4, 1))
    params = init(mat.model)
    cut_model, cut = extract(mat.model, params, parse_widths("1/4", mat))
    down = cut["layer_1"]["mlp"]["experts"]["down"]["kernel"]
    np.testing.assert_array_equal(down, params["layer_1"]["mlp"]["experts"]["down"]["kernel"][:, :2])
    np.testing.assert_array_equal(logits(cut_model, cut), logits(mat.model, mat.granularity(params, 0)))


@runs(
    "Union of Experts",
    "data, FSDP and tensor parallelism on 8 devices; scanned layers, rematerialised",
    "loss and parameters after a step equal those of one device; losses equal those of unrolled layers",
)
def _(_):
    task, params = LanguageModelling(union()), init(union())
    one, rows = train(task, params)
    spread, spread_rows = train(
        task, params, mesh=make_mesh(dict(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    )
    close(spread.params, one.params)
    close(mean(spread_rows[0]), mean(rows[0]))
    scanned = LanguageModelling(union(scan_layers=True, remat="dots"))
    metrics = jax.jit(scanned.loss)(scan_params(params, 1), make_batch(), KEY)
    close(mean(metrics), mean(rows[0]))


@refused("Union of Experts", "export", "the FFN is UoME, not GatedMLP or MoE")
def _(directory):
    huggingface.save(union(), {"params": init(union())}, directory / "export")


# Momentum from MoE layer to MoE layer, in layers that alternate with dense ones (GLaM).


def momentum(**fields):
    attention = Attention(num_heads=2, head_dim=4, rotary=Rotary())
    experts = MoE(num_experts=4, k=2, hidden_dim=HIDDEN, dispatch="dense")
    sparse = MomentumBlock(attention, experts, momentum=HeavyBall(0.7))
    return decoder(blocks=(sparse, Block(attention, GatedMLP(HIDDEN))), num_layers=3, **fields)


@runs("MomentumSMoE", "MatFormer", f"every expert is cut to the width of the dense layers: {NESTED}")
def _(_):
    nested(momentum())


@runs(
    "MomentumSMoE",
    "tree decoding with virtual rows (Hidden Transfer)",
    "every node and joining row has a momentum of its own: the tokens of plain decoding",
)
def _(_):
    drafted_as_plain("Hidden Transfer", momentum(), louder(init(momentum())))


@refused("MomentumSMoE", "export", "the block is MomentumBlock, not Block")
def _(directory):
    huggingface.save(momentum(), {"params": init(momentum())}, directory / "export")


# JetMoE: experts in attention and FFN.


def jetmoe(num_layers=1):
    attention = MixtureOfAttention(4, 2, 2, 4, rotary=Rotary())
    blocks = (Block(attention, MoE(4, 2, HIDDEN, output_bias=True)),)
    return decoder(blocks=blocks, num_layers=num_layers)


@runs(
    "JetMoE",
    "tree decoding",
    "drafted by Medusa, keys and values shared: the tokens of plain decoding",
)
def _(_):
    drafted_as_plain("Medusa", jetmoe(), louder(init(jetmoe())))


@runs("JetMoE", "MatFormer", f"every FFN expert is cut, attention experts are not: {NESTED}")
def _(_):
    nested(jetmoe())


@runs(
    "JetMoE",
    "data, expert and tensor parallelism on 8 devices",
    "loss and parameters after a step equal those of one device; experts of attention and FFN lie in quarters",
)
def _(_):
    task = LanguageModelling(jetmoe())
    params = init(task.model)
    one, rows = train(task, params)
    spread, spread_rows = train(
        task, params, mesh=make_mesh(dict(data=2, expert=2, tensor=2), jax.devices()[:8])
    )
    for layer in (spread.params["layer_0"]["attention"], spread.params["layer_0"]["mlp"]):
        for projection in layer["experts"].values():
            kernel = projection["kernel"]
            assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    close(spread.params, one.params)
    close(mean(spread_rows[0]), mean(rows[0]))


@runs(
    "JetMoE",
    "extraction, transformers",
    "a submodel with narrower experts, exported and read back: the same logits",
)
def _(directory):
    model = jetmoe(2)
    small, cut = extract(model, init(model), ElasticSpec((0, 1), (2, 16)))
    assert huggingface.save(small, {"params": cut}, directory / "export").family == "jetmoe"
    again, variables, _ = huggingface.load(directory / "export")
    close(logits(again, variables["params"]), logits(small, cut))
