"""Arcana: which low-rank term a token gets, and what the ladder of queries reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.shapes import vocabulary
from research.errors import UserError
from research.multimodal.arcana import (
    Arcana,
    ArcanaTuning,
    LadderProjection,
    MMLoRA,
    ModalityLoRA,
    QLadder,
    Rung,
    copy_rungs,
    route,
)
from research.multimodal.connectors import PatchProjection
from research.multimodal.media import Square
from research.multimodal.prompts import pictures, write
from research.nn.mlp import MLP
from research.nn.weights import LowRank, Sum, dot
from research.training.partitioning import make_mesh, parameter_shardings
from research.training.structures import describe, rebuild
from tests.multimodal.test_model import decoded_as_read, louder
from tests.multimodal.toys import WIDTH, image, media, tower, vlm
from tests.programs import call, drawn

TEXT = vocabulary()
KEY = jax.random.key(0)
QUERIES = 3
PLANNER = Square(patch=4, side=8, count=4 + QUERIES)
ADAPTER = MMLoRA(vision_rank=2, language_rank=3)


@pytest.fixture(scope="module")
def toy():
    """An Arcana without an adapter, and with one whose B are not 0."""
    ladder = QLadder(Rung(2, MLP(16)), rungs=2, queries=QUERIES, class_token=True)
    parts = dict(tower=tower(layers=2, class_token=True), connector=LadderProjection(ladder, WIDTH))
    model = vlm(Arcana, PLANNER, **parts)
    params = louder(drawn(model, jnp.zeros((1, 2), jnp.int32)))
    installed = ADAPTER.install(params["decoder"], KEY)
    filled = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape) * (leaf == 0).all(), installed
    )
    return model, params, params | {"decoder": filled}


def asked(text="what <image> is red"):
    written = write(text, [image()] * text.count("<image>"), PLANNER, TEXT)
    return np.asarray([written.tokens]), pictures([written], PLANNER, 1, len(written.tokens))


def with_terms(params, which, change):
    """The parameters with the terms of a modality changed."""

    def changed(node):
        if not isinstance(node, ModalityLoRA):
            return node
        return node.replace(**{which: jax.tree.map(change, getattr(node, which))})

    decoder = jax.tree.map(changed, params["decoder"], is_leaf=lambda node: isinstance(node, ModalityLoRA))
    return params | {"decoder": decoder}


def features(model, params, tokens, seen):
    return call(model, params, tokens, seen, method="features")


def test_it_begins_as_the_frozen_model(toy):
    model, params, _ = toy
    tokens, seen = asked()
    begun = params | {"decoder": ADAPTER.install(params["decoder"], KEY)}
    np.testing.assert_array_equal(call(model, begun, tokens, seen), call(model, params, tokens, seen))
    np.testing.assert_array_equal(call(model, begun, tokens), call(model, params, tokens))


def test_each_term_acts_on_tokens_of_its_kind_alone(toy):
    model, _, params = toy
    tokens, seen = asked()
    shows = np.asarray(seen.slot[0]) >= 0
    assert shows.tolist() == [False] + [True] * 7 + [False] * 2
    (hidden, fresh), (_, seeing), (_, reading) = (
        features(model, p, tokens, seen)
        for p in (
            params,
            with_terms(params, "vision", lambda x: -x + 0.1),
            with_terms(params, "language", lambda x: -x + 0.1),
        )
    )
    first = lambda fresh: np.asarray(fresh[0][0][0]).swapaxes(0, 1)  # keys of the first layer [T, H, d]  # noqa: E731
    np.testing.assert_array_equal(first(seeing)[~shows], first(fresh)[~shows])
    np.testing.assert_array_equal(first(reading)[shows], first(fresh)[shows])
    assert (first(seeing)[shows] != first(fresh)[shows]).any(axis=(1, 2)).all()
    assert (first(reading)[~shows] != first(fresh)[~shows]).any(axis=(1, 2)).all()
    # Text alone does not know of the vision term, with a place for an image and without.
    plain = np.asarray([[5, 9, 2, 7]])
    other = with_terms(params, "vision", lambda x: -x + 0.1)
    for pictures_ in ((), (model.blank(1, 4),)):
        np.testing.assert_array_equal(
            call(model, params, plain, *pictures_), call(model, other, plain, *pictures_)
        )
    # An adapted decoder by itself reads as text.
    np.testing.assert_allclose(
        call(model.decoder, params["decoder"], plain), call(model, params, plain), rtol=1e-6, atol=1e-6
    )


def test_the_choice_is_per_token_and_of_tied_terms_it_is_lora():
    x = jax.random.normal(KEY, (2, 5, 6))
    draw = lambda *shape: jax.random.normal(jax.random.key(sum(shape)), shape)  # noqa: E731
    vision = LowRank(draw(6, 2), draw(2, 4), 2.0)
    weight = ModalityLoRA(draw(6, 4), vision, LowRank(draw(6, 3), draw(3, 4), 2.0))
    image_ = np.asarray([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1]], bool)
    run = jax.jit(lambda weight, x, image: dot(x, route(weight, image)))
    out = run(weight, x, image_)
    np.testing.assert_allclose(
        out[0, 1], x[0, 1] @ (weight.base + 2.0 * vision.down @ vision.up), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(out[0, 0], x[0, 0] @ weight.materialize(), rtol=1e-4, atol=1e-4)
    order = np.asarray([3, 0, 4, 2, 1])
    np.testing.assert_array_equal(run(weight, x[:, order], image_[:, order]), out[:, order])
    # Flat tokens, as a decoder on CPU has them.
    np.testing.assert_allclose(run(weight, x.reshape(10, 6), image_).reshape(out.shape), out, rtol=1e-5)
    tied = weight.replace(language=vision)
    lora = jax.jit(lambda kernel, x: dot(x, kernel))(Sum((weight.base, vision)), x)
    np.testing.assert_array_equal(run(tied, x, image_), lora)
    # A stack, as of a scanned decoder, is routed as its parts are.
    stacked = route(jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), weight), jnp.asarray(image_))
    second = jax.tree.map(lambda leaf: leaf[1], stacked)
    np.testing.assert_array_equal(
        second.dot(x), route(jax.tree.map(jnp.negative, weight), jnp.asarray(image_)).dot(x)
    )
    # Dropout is on the terms' inputs alone, and drawn anew with every key.
    zero = weight.replace(vision=vision.replace(up=vision.up * 0), language=vision.replace(up=vision.up * 0))
    noisy = jax.jit(lambda weight, key: dot(x, route(weight, image_, key, 0.5)))
    np.testing.assert_array_equal(noisy(zero, KEY), run(zero, x, image_))
    assert (noisy(weight, KEY) != noisy(weight, jax.random.key(1))).any()


def test_prompts_decode_as_they_are_read(toy):
    """What is generated is text, behind prompts of unequal lengths with none, one and two images."""
    model, _, params = toy
    outputs = decoded_as_read(model, params, new=8)
    assert outputs != decoded_as_read(model, with_terms(params, "vision", lambda x: 3.0 * x), new=8)


def test_the_ladder_reads_every_layer_and_leaves_the_patches_alone(toy):
    model, params, _ = toy
    seen = media(PLANNER, image())
    connector, own = model.connector, params["connector"]
    taps = call(model.tower, params["tower"], seen)
    rows = np.asarray(call(connector, own, taps, seen))
    plain = call(PatchProjection(WIDTH), {"projection": own["projection"]}, taps, seen)
    np.testing.assert_allclose(rows[:, :, :4], plain, rtol=1e-6, atol=1e-6)
    # Queries that change places.
    order = np.asarray([2, 0, 1])
    moved = own | {"ladder": own["ladder"] | {"queries": own["ladder"]["queries"][order]}}
    other = np.asarray(call(connector, moved, taps, seen))
    np.testing.assert_allclose(other[:, :, 4:], rows[:, :, 4:][:, :, order], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(other[:, :, :4], rows[:, :, :4])
    # Two rungs read X_0 and X_1, class token and patches; X_2 is that of the patches.
    for tap, place, reads in ((0, 0, True), (0, 4, True), (1, 2, True), (2, 3, False)):
        changed = taps.replace(taps=taps.taps.at[tap, 0, 0, 0, place].add(jnp.arange(8.0)))
        assert (call(connector, own, changed, seen)[0, 0, 4:] != rows[0, 0, 4:]).any() == reads


def test_rungs_begin_as_the_towers_blocks(toy):
    model, params, _ = toy
    begun = copy_rungs(params)
    for i in range(2):
        rung, block = begun["connector"]["ladder"][f"layer_{i}"], params["tower"][f"layer_{i}"]
        assert rung["attention"] is block["attention"] and rung["mlp"] is block["mlp"]
        assert rung["query_norm"] is rung["key_norm"] is block["attention_norm"]
    with pytest.raises(UserError, match="which has none"):
        copy_rungs(params | {"tower": {"layer_0": params["tower"]["layer_0"]}})
    task = ArcanaTuning(model, adapter=ADAPTER)
    made = jax.eval_shape(task.init, KEY)
    kernel = made["decoder"]["layer_1"]["mlp"]["down"]["kernel"]
    assert kernel.vision.down.shape == (16, 2) and kernel.language.up.shape == (3, WIDTH)
    assert not hasattr(task, "start")
    with pytest.raises(UserError, match="rank=9"):
        MMLoRA(9, 1).install(params["decoder"], KEY)
    # Saved as its parts, and divided as the kernel.
    again = rebuild(describe(kernel))
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, kernel)
    with pytest.raises(UserError, match="on a kernel of"):
        rebuild(describe(kernel.replace(base=kernel.base.update(shape=(8, 8)))))
    parameter_shardings(made, make_mesh({"data": 1}, jax.devices()[:1]))
