"""Ways to decode that change the cache or the calls, with models that read images: exact, or refused in one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.compression.gear import Gear, with_cache
from research.config_capture import capture
from research.data.shapes import vocabulary
from research.decoding.generator import Generator
from research.decoding.prepare import prepare
from research.decoding.proposers import Target
from research.decoding.speculative.draft_model import Submodel
from research.decoding.speculative.eagle import Eagle
from research.decoding.speculative.hidden_transfer import HiddenTransfer
from research.decoding.speculative.ppd import PPD
from research.decoding.speculative.prompt_lookup import PromptLookup
from research.decoding.speculative.training import DrafterTraining
from research.errors import UserError
from research.moe.scmoe import self_contrast
from research.multimodal.ep_alm import EPALM, LateToken, SoftPrompt
from research.multimodal.media import Square
from research.multimodal.prompts import Prompts
from research.nn.masks import Window
from research.nn.transformer import stack_of
from research.sparse.gathered import gathered
from research.sparse.maps import attention_maps
from research.sparse.moa.plan import Plan, Shape, apply_plan
from research.sparse.moa.rules import Grid, Rule
from research.sparse.selectors import Newest
from research.training.model_directory import fingerprint, save_model
from tests.multimodal.test_model import PROMPTS, decoded_as_read, louder
from tests.multimodal.toys import WIDTH, tower, vlm
from tests.programs import drawn

SHARED = Square(patch=4, side=8, share="image")
TOKENS = jnp.zeros((1, 2), jnp.int32)


@pytest.fixture(scope="module")
def toy():
    model = vlm()
    return model, louder(drawn(model, TOKENS))


def decoded(model, params, new=10, planner=None, **options):
    asked = Prompts.of(PROMPTS, planner or model.planner, vocabulary())
    generator = Generator(model, params, ends=(), **options)
    return generator.generate(asked.tokens, beside=asked.beside, max_new_tokens=new).samples


@pytest.fixture(scope="module")
def plain(toy):
    return decoded(*toy)


def test_a_compressed_cache_that_loses_nothing(toy):
    model, params = toy
    model = model.clone(planner=SHARED)  # which puts positions behind lengths
    plain = decoded(model, params)
    # Chunks of 8 tokens, of which a prompt with its images fills one.
    changed, same = with_cache(model, params, Gear(16, rank=0, outliers=0.0, buffer=8, group=8))
    assert type(changed) is type(model) and same["tower"] is params["tower"]
    assert decoded(changed, same) == plain


def test_a_row_more_in_the_upper_layers_may_be_compressed_and_share_positions():
    hook = LateToken(start=1, stop=2, levels=1, num_layers=2)
    planner = dataclasses.replace(SHARED, count=2)
    parts = dict(tower=tower(class_token=True, norm_all=True), connector=SoftPrompt(2, WIDTH), hooks=(hook,))
    model = vlm(EPALM, planner, **parts)
    params = louder(drawn(model, TOKENS))
    changed, same = with_cache(model, params, Gear(16, rank=0, outliers=0.0, buffer=8, group=8))
    outputs = decoded_as_read(changed, same)
    assert [sample.tokens for sample in decoded(changed, same, 12)] == outputs
    with pytest.raises(UserError, match="no token can join between layers"):
        decoded(*gathered(model, params, Newest(64, sinks=1, dense=0)), 2)


def test_enough_chosen_tokens_are_all_of_them(toy, plain):
    model, params = toy
    assert decoded(*gathered(model, params, Newest(64, sinks=1, dense=0))) == plain
    assert decoded(*gathered(model, params, Newest(2, sinks=1, dense=0))) != plain


def test_a_plan_of_the_decoder_is_one_of_the_model(toy):
    model, params = toy
    decoder, own = stack_of(model, params)
    rules = ((Rule(0, 0.5), Rule(4, 0.0)), (Rule(4, 0.0), Rule(0, 0.5)))
    plan = Plan(rules, Grid(2, 2), Shape.of(decoder), fingerprint(own), (32,), 0.5)
    plan.check(model, params)
    planned, moved = apply_plan(model, params, plan, 32)
    assert isinstance(planned.decoder.blocks[0].attention.rule, Window) and planned.max_length == 32
    decoded_as_read(planned, moved)
    with pytest.raises(UserError, match="with other parameters"):
        plan.check(model, params | {"decoder": louder(own)})
    with pytest.raises(UserError, match="shared positions and windows"):
        apply_plan(model.clone(planner=SHARED), params, plan, 32)[0].init_cache(1, 16)


@pytest.mark.parametrize("name", ["prompt lookup", "submodel"])
def test_drafts_of_text_alone_change_nothing(toy, plain, name):
    model, params = toy
    target = Target(params, model)
    drafter, own = {
        "prompt lookup": lambda: (PromptLookup(), ()),
        "submodel": lambda: (Submodel(2, 2), Submodel(2, 2).create(jax.random.key(0), target)),
    }[name]()
    assert decoded(model, params, proposer=drafter, proposer_params=own) == plain


@pytest.mark.parametrize("drafter", [HiddenTransfer((1, 1)), PPD()])
def test_rows_that_join_between_layers_are_refused(toy, drafter):
    model, params = toy
    own = drafter.create(jax.random.key(0), Target(*reversed(prepare(model, params))))
    with pytest.raises(UserError, match="VLM: rows that join between layers are not known to its decoding"):
        decoded(model, params, proposer=drafter, proposer_params=own)


def test_what_is_of_decoders_of_text_is_refused(toy, tmp_path):
    model, params = toy
    with pytest.raises(UserError, match="a VLM is no stack of layers"):
        jax.eval_shape(lambda: Eagle().create(jax.random.key(0), Target(params, model)))
    with pytest.raises(UserError, match="VLM has no MoE layer"):
        self_contrast(model, params)
    save_model(tmp_path / "vlm", capture(model), params)
    with pytest.raises(UserError, match="holds a VLM, whose batches have images; drafters are trained for"):
        DrafterTraining(PromptLookup(), str(tmp_path / "vlm")).target_model  # noqa: B018


def test_a_cache_shorter_than_a_chunk(toy):
    """The buffer holds everything, and the chunk stays empty."""
    model, params = with_cache(*toy, Gear(bits=4, group=8, rank=0, outliers=0.0, buffer=64))
    cache = jax.eval_shape(lambda: model.init_cache(1, 16))
    assert cache.layers[0].key.tokens == 64


def test_maps_are_of_the_decoder(toy):
    model, params = toy
    asked = Prompts.of(PROMPTS[:1], model.planner, vocabulary())
    tokens = jnp.asarray(asked.tokens)
    found = attention_maps(model, params, tokens, *asked.beside(tokens.shape[1]))
    text = attention_maps(model.decoder, params["decoder"], tokens)
    # <bos> stands in front of the image and sees itself; what follows sees the image's rows, not the tokens there.
    assert list(found) == [0, 1] and found[0].shape == text[0].shape
    for layer in found:
        np.testing.assert_allclose(found[layer].sum(-1), 1.0, rtol=1e-5)
        np.testing.assert_array_equal(np.triu(found[layer], 1), 0.0)
    assert not np.allclose(found[0][0, :, -1], text[0][0, :, -1], atol=1e-3)
