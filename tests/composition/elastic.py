"""MatFormer with the other parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import build, of
from research.config_capture import capture
from research.data.text import TokenDataset
from research.decoding.generator import Generator
from research.decoding.proposers import Target
from research.decoding.speculative.draft_model import Submodel
from research.elastic.loading import load_submodel
from research.elastic.matformer import MatFormer, extract, parse_widths
from research.elastic.slicing import ElasticSpec
from research.interop import huggingface
from research.nn.attention import Attention
from research.nn.fuse import fuse_projections
from research.nn.masks import Causal, Full, Window
from research.nn.mlp import MLP
from research.nn.norm import RMSNorm
from research.nn.transformer import Block, scan_params
from research.nn.weights import LowRank, materialize
from research.training.loop import Trainer
from research.training.model_directory import save_model
from research.training.optimizers import adamw, constant
from research.training.partitioning import make_mesh
from research.training.stages import Stage
from research.training.task import LanguageModelling
from research.training.workdir import load_model, open_workdir
from research.vision.vit import ViT
from tests.programs import drawn

from .cells import (
    HIDDEN,
    KEY,
    LENGTH,
    NESTED,
    WIDTH,
    close,
    decoder,
    init,
    logits,
    louder,
    make_batch,
    mean,
    nested,
    refused,
    runs,
    train,
)


@runs("MatFormer", "scanned layers", f"{NESTED}; losses equal those of unrolled layers")
def _(_):
    model = decoder(num_layers=2, scan_layers=True)
    nested(model)
    task, other = (MatFormer(LanguageModelling(m), divisors=(8, 1)) for m in (model, decoder(num_layers=2)))
    unrolled = init(other.model)
    stacked = jax.jit(task.loss)(scan_params(unrolled, 1), make_batch(), KEY)
    close(stacked["loss"], jax.jit(other.loss)(unrolled, make_batch(), KEY)["loss"])


@refused(
    "MatFormer", "Mix'n'Match of scanned layers", "a scanned model is sliced to one width and all layers"
)
def _(_):
    model = decoder(num_layers=2, scan_layers=True)
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


@runs(
    "MatFormer",
    "a model directory of low-rank kernels",
    "a slice is saved and read with its factors, exactly",
)
def _(directory):
    model = decoder(num_layers=2)
    params = jax.tree.map(lambda x: x, init(model))
    params["layer_0"]["mlp"]["up"]["kernel"] = LowRank(jnp.ones((WIDTH, 1)), jnp.ones((1, HIDDEN)))
    cut_model, cut = extract(model, params, ElasticSpec((0, 1), (2, 2)))
    save_model(directory / "model", capture(cut_model), cut)
    found = load_model(directory / "model").params
    assert isinstance(found["layer_0"]["mlp"]["up"]["kernel"], LowRank)
    jax.tree.map(np.testing.assert_array_equal, found, cut)


@refused("MatFormer", "projections fused for decoding", "this FFN is fused for decoding (gate_up)")
def _(_):
    model = decoder(num_layers=2)
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
    params = louder(init(model))
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
    params = louder(init(model))
    drafter = Submodel(divisor=8, gamma=3)
    cut = drafter.create(KEY, Target(params, model))
    prompts, count = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6]], 16
    plain = Generator(model, params).generate(prompts, max_new_tokens=count)
    drafted = Generator(model, params, proposer=drafter, proposer_params=cut)
    result = drafted.generate(prompts, max_new_tokens=count)
    assert [sample.tokens for sample in result.samples] == [sample.tokens for sample in plain.samples]
    # Prefill gives 1 of 16 tokens and 4 calls the others if every draft is right: some were, and some were not.
    assert 1 + 4 < result.stats.calls < plain.stats.calls == 16


@runs(
    "MatFormer",
    "checkpoint, extraction, model directory, transformers",
    "trained in a workdir, cut from its checkpoint, saved, read back, exported with equal and with padded widths: "
    "the same logits throughout",
)
def _(directory):
    (directory / "corpus.txt").write_text("\n\n".join(f"line {i} of a small corpus" for i in range(200)))
    model = decoder(num_layers=2, vocab_size=4096)
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
    model = decoder(num_layers=2)
    small, cut = extract(model, init(model), ElasticSpec((0, 1), (2, 16)))
    huggingface.save(small, {"params": cut}, directory / "export", unequal="refuse")


@refused("MatFormer", "export of a ViT", "it is a ViT, not a plain DecoderLM")
def _(directory):
    block = Block(Attention(num_heads=2, head_dim=4, rule=Full()), MLP(HIDDEN))
    model = ViT(blocks=(block,), num_layers=2, num_classes=3, width=WIDTH, patch=2)
    params = drawn(model, jnp.zeros((1, 4, 4, 1)))
    small, cut = extract(model, params, ElasticSpec((0, 1), (2, 2)))
    huggingface.save(small, {"params": cut}, directory / "export")
