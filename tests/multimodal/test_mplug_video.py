"""What mPLUG-video says must hold exactly, on tiny shapes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import build, load_config
from research.config_capture import capture
from research.data.shapes import vocabulary
from research.errors import UserError
from research.multimodal.mplug_video import Abstractor, QueryPool, VideoLanguage, score_names
from research.multimodal.prompts import Prompts, pictures
from research.multimodal.video import Frames
from research.multimodal.video_tower import SpaceTimeBlock, begin_as_images
from research.nn.mlp import ACTIVATIONS
from research.training.model_directory import save_model
from tests.multimodal.test_model import louder
from tests.multimodal.toys import WIDTH, image, media, tower, video_tower, vlm
from tests.programs import call, drawn

TEXT, KEY = vocabulary(), jax.random.key(0)
PLANNER = Frames(patch=4, side=8, frames=4, count=3)
TRAINER = build(load_config("configs/mplug_video.py"))
IMAGES = tower(layers=2, class_token=True)


def clip(frames=4, seed=0):
    return np.stack([image(seed + i, 9, 9) for i in range(frames)])


TOWER, FILM = video_tower(2), media(PLANNER, clip())


@pytest.fixture(scope="module")
def towers():
    """Parameters of an image tower, of the video tower that begins as it, and of one that has learned."""
    images, learned = drawn(IMAGES, FILM), drawn(TOWER, FILM, seed=1)
    begun = jax.jit(lambda: TOWER.init(KEY, FILM)["params"])()
    return images, begin_as_images(begun, images), learned


def frames_of(film, order):
    return jax.tree.map(lambda x: x[:, :, np.asarray(order)], film)


def test_of_one_frame_it_begins_with_what_the_image_tower_sees(towers):
    images, begun, learned = towers
    one = frames_of(FILM, [0])
    jax.tree.map(np.testing.assert_array_equal, call(TOWER, begun, one), call(IMAGES, images, one))
    # The frames that are not there change nothing, also once it has learned.
    nothing = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)], axis=2), one)
    short, padded = (call(TOWER, learned, film) for film in (one, nothing))
    np.testing.assert_allclose(padded.taps[:, :, :, :1], short.taps, atol=1e-6)
    # There is one class token.
    np.testing.assert_allclose(padded.taps[:, :, :, 1, 0], short.taps[:, :, :, 0, 0], atol=1e-6)
    assert padded.mask.sum() == short.mask.sum() == 4


def test_frames_begin_without_an_order_and_learn_one(towers):
    _, begun, learned = towers
    order = [2, 0, 3, 1]
    for params, same in ((begun, True), (learned, False)):
        seen, mixed = (call(TOWER, params, film) for film in (FILM, frames_of(FILM, order)))
        expected = np.asarray(seen.tokens)[:, :, order]
        assert np.allclose(mixed.tokens, expected, atol=1e-5) == same
    assert set(begun["layer_0"]) - set(towers[0]["layer_0"]) == {"time", "time_norm", "time_output"}
    # Without a class token frames meet in the attention over time alone, and begin apart.
    block = video_tower(class_token=False)
    params = drawn(block, FILM)
    apart = params | {"layer_0": params["layer_0"] | {"time_output": begun["layer_0"]["time_output"]}}
    other = FILM.replace(patches=FILM.patches.copy())
    other.patches[0, 0, 0, 1] += 1.0
    for own, frames in ((params, [True] * 4), (apart, [True] + [False] * 3)):
        one, two = (np.asarray(call(block, own, film).tokens)[0, 0] for film in (FILM, other))
        assert np.any(one != two, axis=(1, 2)).tolist() == frames


def test_the_block_is_the_papers(towers):
    """By hand, for one layer without biases of attention: see the head of video_tower.py."""
    *_, params = towers
    seen = call(TOWER, params, FILM)
    p, x = params["layer_0"], np.asarray(seen.taps[0])[0, 0].astype(np.float64)  # [T, 1 + P, d]

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred
            / np.sqrt((x**2).mean(-1, keepdims=True) - x.mean(-1, keepdims=True) ** 2 + 1e-6)
            * p["scale"]
            + p["bias"]
        )

    def linear(x, p):
        return x @ np.asarray(p["kernel"], np.float64) + p["bias"]

    def attend(x, p):  # [..., S, d]
        q, k, v = (linear(x, p[n]).reshape(*x.shape[:-1], 2, 4) for n in ("query", "key", "value"))
        scores = np.einsum("...qhd,...khd->...hqk", q, k) / 2.0
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return linear(np.einsum("...hqk,...khd->...qhd", weights, v).reshape(x.shape), p["output"])

    patches, token = x[:, 1:], x[:1, :1]
    over_time = attend(norm(patches.swapaxes(0, 1), p["time_norm"]), p["time"]).swapaxes(0, 1)
    patches = patches + linear(over_time, p["time_output"])
    whole = np.concatenate([np.repeat(token, 4, axis=0), patches], axis=1)
    y = np.array(attend(norm(whole, p["attention_norm"]), p["attention"]))
    y[:, 0] = y[:, 0].mean(0)
    whole = whole + y
    hidden = np.asarray(ACTIVATIONS["gelu"](linear(norm(whole, p["mlp_norm"]), p["mlp"]["up"])), np.float64)
    np.testing.assert_allclose(seen.taps[1][0, 0], whole + linear(hidden, p["mlp"]["down"]), atol=2e-5)


def test_the_pool_has_no_order_and_normalised_queries():
    pool = QueryPool(3, 2, 16)
    x, mask = jax.random.normal(KEY, (2, 7, 8)), jnp.arange(7) < jnp.asarray([[7], [5]])
    params = drawn(pool, x, mask)
    rows = call(pool, params, x, mask)
    assert rows.shape == (2, 3, 8)
    order = jnp.asarray([4, 0, 6, 2, 1, 5, 3])
    np.testing.assert_allclose(call(pool, params, x[:, order], mask[:, order]), rows, atol=1e-5)
    np.testing.assert_allclose(call(pool, params, x[1:, :5], mask[1:, :5]), rows[1:], atol=1e-5)
    # Of what is not there, every query reads the learned slot alone.
    nothing = call(pool, params, x, jnp.zeros_like(mask))
    read, table = params["read"], np.asarray(params["queries"])
    q = (table - table.mean(-1, keepdims=True)) / np.sqrt(table.var(-1, keepdims=True) + 1e-6)
    q = q * params["query_norm"]["scale"] + params["query_norm"]["bias"]
    q = q + read["value_slot"] @ read["output"]["kernel"] + read["output"]["bias"]
    z = (q - q.mean(-1, keepdims=True)) / np.sqrt(q.var(-1, keepdims=True) + 1e-6)
    z = z * params["mlp_norm"]["scale"] + params["mlp_norm"]["bias"]
    hidden = ACTIVATIONS["gelu"](z @ params["up"]["kernel"] + params["up"]["bias"])
    expected = q + hidden @ params["down"]["kernel"] + params["down"]["bias"]
    np.testing.assert_allclose(nothing[0], expected, atol=1e-5)


@pytest.fixture(scope="module")
def toy():
    model = vlm(planner=PLANNER, tower=video_tower(), connector=Abstractor(3, WIDTH, 2, 16, output_norm=True))
    return model, louder(drawn(model, jnp.zeros((1, 2), jnp.int32)))


def test_rows_are_as_many_for_any_number_of_frames(toy):
    model, params = toy
    for frames in (1, 2, 4, 9):
        film = media(PLANNER, clip(frames))
        assert film.grid[0, 0, :, 0].tolist() == [2] * min(frames, 4) + [0] * max(4 - frames, 0)
        assert call(model, params, film, method="see")[1].shape == (1, 3, WIDTH)
    with pytest.raises(UserError, match="5 frames are given, and frames=4"):
        five = media(Frames(patch=4, side=8, frames=5), clip(5))
        jax.eval_shape(lambda: TOWER.init(KEY, five))


def test_a_class_is_the_one_of_the_least_loss(toy):
    model, params = toy
    prompts = [("<image> what colour is the circle", [clip()]), ("<image> what", [clip(2, seed=9)])]
    names = ["red", "red circle", "a blue square", "7"]
    scores = score_names(model, params, Prompts.of(prompts, PLANNER, TEXT), names, TEXT)
    written, ends = [], []
    for text, clips in prompts:
        for name in names:
            (row,) = Prompts.of([(text, clips)], PLANNER, TEXT).written
            ends.append(len(row.tokens))
            row.say([*TEXT.encode(name), TEXT.eos_id])
            written.append(row)
    tokens, losses = np.zeros((8, 16), np.int32), []
    for row, one in zip(tokens, written, strict=True):
        row[: len(one.tokens)] = one.tokens
    logits = call(model, params, tokens, pictures(written, PLANNER, 1, 16))
    for i, (row, end) in enumerate(zip(written, ends, strict=True)):
        logp = np.asarray(jax.nn.log_softmax(logits[i]))
        losses.append(-sum(logp[t - 1, row.tokens[t]] for t in range(end, len(row.tokens))))
    losses = np.reshape(losses, (2, 4))
    np.testing.assert_allclose(scores, -losses, rtol=1e-5, atol=1e-4)
    assert scores.argmax(1).tolist() == losses.argmin(1).tolist()
    with pytest.raises(UserError, match="at least one name"):
        score_names(model, params, Prompts.of(prompts, PLANNER, TEXT), [], TEXT)


def test_a_run_begins_with_an_image_tower(toy, towers, tmp_path):
    images, begun, learned = towers
    seeing = vlm(tower=IMAGES)
    save_model(tmp_path, capture(seeing), drawn(seeing, jnp.zeros((1, 2), jnp.int32)) | {"tower": images})

    class Begun(VideoLanguage):
        def init(self, key):
            return {"tower": learned, "decoder": jnp.ones(2)}

    found = Begun(toy[0], image_tower=(str(tmp_path), "tower")).start(KEY)["tower"]
    for name in ("layer_0", "layer_1"):
        own = {part: learned[name][part] for part in ("time", "time_norm", "time_output")}
        jax.tree.map(np.testing.assert_array_equal, found[name], images[name] | own)
    rest = images | {name: found[name] for name in ("layer_0", "layer_1")} | {"times": learned["times"]}
    jax.tree.map(np.testing.assert_array_equal, found, rest)
    assert not any(np.any(x) for x in jax.tree.leaves([begun["times"], begun["layer_0"]["time_output"]]))
    assert not hasattr(VideoLanguage(toy[0]), "start")
    deeper = images | {"layer_2": images["layer_1"]}
    with pytest.raises(UserError, match="tower: a video tower has no 'layer_2'"):
        begin_as_images(begun, deeper)
    with pytest.raises(
        UserError, match=r"tower/times: the image tower's is \(3,\), and the video tower's \(4, 8\)"
    ):
        begin_as_images(begun, {"times": np.zeros(3)})


def test_the_tower_computes_in_half_precision_where_that_is_asked():
    batch = jax.tree.map(lambda s: jnp.zeros((2, *s.shape), s.dtype), TRAINER.data.element_spec())
    task = dataclasses.replace(TRAINER.task, compute_dtype="bfloat16")
    found = []

    def loss(params):
        def seen(run, args, kwargs, context):
            if isinstance(context.module, SpaceTimeBlock) and context.method_name == "__call__":
                found.append(args[0].dtype)
            return run(*args, **kwargs)

        with nn.intercept_methods(seen):
            return task.loss(params, batch, KEY)["loss"][0]

    assert jax.eval_shape(loss, jax.eval_shape(task.init, KEY)).dtype == jnp.float32
    assert len(found) >= 2 and set(found) == {jnp.dtype("bfloat16")}


def test_the_decoder_is_frozen_when_videos_come():
    trainer = TRAINER
    words, videos = trainer.stages
    shapes = jax.eval_shape(trainer.task.init, KEY)
    parts = {name: set(jax.tree.leaves(part)) for name, part in videos.mask(shapes).items()}
    assert parts == {"decoder": {False}, "tower": {True}, "connector": {True}}
    assert {name for name, part in words.mask(shapes).items() if any(jax.tree.leaves(part))} == {"decoder"}
    told = words.data.take(np.arange(2))
    assert (told["slot"] == -1).all() and not told["patches"].any()
