"""Running a plan: the cache form is the mask form, heads may move, and a plan fits one model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.recall import Recall
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.cache import DenseCache, HeadGroups
from research.nn.masks import Causal, Window
from research.nn.mlp import GatedMLP
from research.nn.previous import PreviousToken
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.nn.weights import LowRank
from research.sparse.moa.calibration import draw_rows, own_answers
from research.sparse.moa.plan import Plan, Shape, apply_plan, permute_heads
from research.sparse.moa.planner import Planner
from research.sparse.moa.rules import DENSE, Grid, Rule
from research.training.model_directory import fingerprint
from research.training.paths import named_leaves
from tests.programs import drawn, scaled

GRID = Grid(sinks=2, block=2)
LENGTH = 24
DATA = Recall(16, pairs=4, queries=2, keys=8, values=4, fillers=4, split="test", size=16)


def make_model():
    attention = Attention(num_heads=6, head_dim=2, num_kv_heads=3, rotary=Rotary())
    blocks = (Block(PreviousToken(8), None), Block(attention, GatedMLP(8)), Block(attention, GatedMLP(8)))
    return DecoderLM(
        blocks=blocks, num_layers=3, vocab_size=16, width=8, max_length=64, embedding_multiplier=50.0
    )


MODEL = make_model()


@pytest.fixture(scope="module")
def params():
    made = drawn(MODEL, jnp.zeros((1, 2), jnp.int32))
    return scaled(made, 2.0)  # attention that is not uniform


def plan_of(rules, params):
    return Plan(rules, GRID, Shape.of(MODEL), fingerprint(params), (16, LENGTH), 0.5)


# Spans of 24 tokens: 12, 6 and 12, then 8, 24 and 8: the second and the first layer's heads are not in order.
RULES = ((Rule(0, 0.5), Rule(6, 0.0), Rule(0, 0.5)), (Rule(-4, 0.5), DENSE, Rule(-4, 0.5)))


def test_rings_give_what_masks_give(params):
    """A prompt of unequal rows, then token by token and two at a time, with roll-backs, against whole rows."""
    plan = plan_of(RULES, params)
    assert plan.spans(LENGTH).tolist() == [[12, 6, 12], [8, 24, 8]]
    model, moved = apply_plan(MODEL, params, plan, LENGTH)
    variables = {"params": moved}
    cache = model.init_cache(2, LENGTH + 4, margin=2)
    # Groups of equal spans, in order; a ring has its head's span and the margin.
    first, second = cache.layers[1:]
    assert isinstance(first, HeadGroups) and first.heads == (1, 2) and second.heads == (2, 1)
    shapes = [part.key.shape[1:3] for layer in (first, second) for part in layer.parts]
    assert shapes == [(1, 6 + 2), (2, 12 + 2), (2, 8 + 2), (1, 24 + 2)]
    assert sum(heads * slots for heads, slots in shapes) == plan.spans(LENGTH).sum() + 6 * 2

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, LENGTH)), jnp.int32)
    prefill = jax.jit(lambda t, n: model.apply(variables, t, n, method="prefill"))
    _, whole, fresh = prefill(tokens, jnp.asarray([LENGTH, LENGTH]))
    cache = cache.commit(jax.tree.map(lambda rows: rows[:, :, :9], fresh), None, jnp.asarray([9, 4]))

    @jax.jit
    def extend(cache, count):
        rows = cache.length[:, None] + jnp.arange(2)
        given = jnp.take_along_axis(tokens, jnp.minimum(rows, LENGTH - 1), axis=1)
        _, hidden, fresh = model.apply(variables, given, cache, method="extend")
        expected = jnp.take_along_axis(whole, jnp.minimum(rows, LENGTH - 1)[..., None], axis=1)
        return jnp.where((rows < LENGTH)[..., None], hidden - expected, 0), cache.commit(fresh, None, count)

    for step in range(13):
        difference, cache = extend(cache, jnp.asarray([1 + step % 2, 2 - step % 2]))
        # Hidden states of order 1 behind three layers of sums of at most 24 terms.
        np.testing.assert_allclose(difference, 0, atol=2e-5)
        if step % 3 == 2:
            cache = cache.rollback(cache.length - jnp.asarray([1, 2]))
    assert cache.length.tolist() == [24, 16]


def test_spans_are_seen_by_the_model_and_full_spans_are_the_dense_model(params):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (1, LENGTH)), jnp.int32)
    run = jax.jit(lambda model, params, tokens: model.apply({"params": params}, tokens), static_argnums=0)
    dense = run(MODEL, params, tokens)
    every = plan_of(((DENSE,) * 3,) * 2, params)
    np.testing.assert_array_equal(run(*apply_plan(MODEL, params, every, LENGTH), tokens), dense)
    short = run(*apply_plan(MODEL, params, plan_of(RULES, params), LENGTH), tokens)
    # Behind position 6 the narrowest head sees less than all.
    np.testing.assert_allclose(short[:, :6], dense[:, :6], atol=2e-4)
    assert np.abs(short[:, 8:] - dense[:, 8:]).max() > 0.01
    # Moved heads change nothing: the same spans, where the heads stay in their places.
    windows = (10, 10, 4, 4, 10, 10), (6, 6, 22, 22, 6, 6)
    still = [
        block.clone(attention=block.attention.clone(rule=Window(size, sinks=2)))
        for block, size in zip(MODEL.blocks[1:], windows, strict=True)
    ]
    in_place = MODEL.clone(blocks=(MODEL.blocks[0], *still))
    np.testing.assert_allclose(short, run(in_place, params, tokens), atol=2e-4)
    layer = params["layer_1"]["attention"]
    back = permute_heads(permute_heads(layer, (2, 0, 1), 2), (1, 2, 0), 2)
    jax.tree.map(np.testing.assert_array_equal, back, layer)


def test_structured_weights_keep_their_heads_in_place(params):
    kernel = params["layer_1"]["attention"]["query"]["kernel"]
    low = LowRank(jnp.eye(8), kernel)
    structured = {**params, "layer_1": {**params["layer_1"]}}
    structured["layer_1"]["attention"] = {**params["layer_1"]["attention"], "query": {"kernel": low}}
    model, moved = apply_plan(MODEL, structured, plan_of(RULES, params), LENGTH)
    assert moved["layer_1"] == structured["layer_1"]
    assert model.blocks[1].attention.rule == Window((10, 10, 4, 4, 10, 10), sinks=2)
    cache = model.init_cache(1, LENGTH + 4, margin=2).layers[1]
    assert cache.heads == (1, 1, 1) and [part.key.shape[2] for part in cache.parts] == [14, 8, 14]


def test_a_plan_as_a_file_fits_one_model(params, tmp_path):
    plan = plan_of(RULES, params)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    plan.check(MODEL, params)
    other = {**params, "final_norm": {"scale": 1.5 * params["final_norm"]["scale"]}}
    with pytest.raises(UserError, match="with other parameters"):
        plan.check(MODEL, other)
    small = MODEL.clone(blocks=MODEL.blocks[:2], num_layers=2)
    for refused in (lambda: plan.check(small, params), lambda: apply_plan(small, params, plan, 16)):
        with pytest.raises(UserError, match="for another model: .* this one has .*layers=\\(1,\\)"):
            refused()
    with pytest.raises(
        UserError, match="25 tokens of prompt and output are beyond the plan's lengths, at most 24"
    ):
        apply_plan(MODEL, params, plan, LENGTH + 1)
    texts = {"no MoA plan": "{}", "no JSON": "{", "malformed": '{"moa_plan": 1, "shape": {}}'}
    for message, text in texts.items():
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(UserError, match=message):
            Plan.load(tmp_path / "wrong.json")
    with pytest.raises(UserError, match="can't be read"):
        Plan.load(tmp_path / "missing.json")


def test_calibration_and_planning(params):
    """The answers are the model's own, and the pipeline's plan keeps to its density and to its rules a layer."""
    rows = draw_rows(DATA, 6)
    answered = own_answers(MODEL, params, rows, batch_size=4)
    given = rows["weights"] == 0
    logits = jax.jit(lambda t: MODEL.apply({"params": params}, t))(answered["tokens"])
    best = np.argmax(logits, axis=-1)
    np.testing.assert_array_equal(answered["targets"][~given], best[~given])
    # A token is the data's, unless it follows a target that the model chose.
    own = np.pad(~given, ((0, 0), (1, 0)))[:, :-1]
    np.testing.assert_array_equal(answered["tokens"][~own], rows["tokens"][~own])
    np.testing.assert_array_equal(
        answered["tokens"][:, 1:][own[:, 1:]], answered["targets"][:, :-1][own[:, 1:]]
    )

    planner = Planner(
        calibration=(DATA,),
        validation=dataclasses.replace(DATA, seed=1),  # of the same length, for which programs are there
        constrained=(LENGTH,),
        density=0.6,
        lower=0.5,
        grid=GRID,
        step=4,
        samples=6,
        batch_size=4,
    )
    lines = []
    profiles = planner.profiles(MODEL, params, lines.append)
    front = planner.search(MODEL, params, profiles, lines.append)
    assert [p.influence.shape for p in profiles] == [(2, 3, 8, 8)] * 2
    assert all(np.triu(p.influence, 1).max() == 0 < p.influence.min(axis=(0, 1)).trace() for p in profiles)
    assert front.plan.lengths == (16, 24) and front.validation.argmin() == front.chosen
    for length in (16, 24):
        assert 0.3 <= front.plan.spans(length).mean() / length <= 0.6
    assert all(len(set(layer)) <= 2 for layer in front.plan.rules)
    assert "calibration at 16 tokens: 6 rows" in lines[0]
    front.plan.check(MODEL, params)


def test_what_cannot_be_planned_is_refused(params):
    block = MODEL.blocks[1]
    local = block.clone(attention=block.attention.clone(rule=Window(4)))
    with pytest.raises(UserError, match="no layer of this model is causal Attention"):
        Shape.of(MODEL.clone(blocks=(local,)))
    with pytest.raises(UserError, match="20 rows of one document each are needed, the data has 16"):
        draw_rows(DATA, 20)
    with pytest.raises(UserError, match="length 22 is not a multiple of block=4"):
        Planner(calibration=(dataclasses.replace(DATA, length=22),), validation=DATA, grid=Grid(4, 4))
    # A model that is certain of its answers: the head's rows for the answers' tokens are far apart.
    loud = {**params, "final_norm": {"scale": 1e6 * params["final_norm"]["scale"]}}
    planner = Planner(calibration=(DATA,), validation=DATA, grid=GRID, samples=6, batch_size=4)
    with pytest.raises(UserError, match="would be noise"):
        planner.profile(MODEL, loud, DATA)
    assert isinstance(MODEL.init_cache(1, 8).layers[1], DenseCache) and Causal() == block.attention.rule
    assert set(named_leaves(params)) >= {"layer_0/attention/output/kernel"}
