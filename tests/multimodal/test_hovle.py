"""HoVLE: one causal sequence through module and decoder, two caches, a decoder that its first stages leave alone."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import hovle as config
from research.config import build, of
from research.config_capture import capture
from research.data.shapes import Scenes, vocabulary
from research.errors import UserError
from research.multimodal.connectors import ShuffledProjection, pixel_unshuffle, shuffle_square
from research.multimodal.hovle import (
    HolisticEmbedding,
    HolisticTraining,
    HoVLE,
    LongCache,
    PatchEmbedding,
    Tiles,
    Unpaired,
    mean_cosine,
)
from research.multimodal.prompts import pictures, write
from research.nn.cache import Cache
from research.nn.masks import Steps, Window
from research.training.loop import Trainer
from research.training.model_directory import save_model
from tests.multimodal.test_model import decoded_as_read, louder
from tests.multimodal.toys import WIDTH, decoder, image, tower
from tests.programs import call, drawn, drawn_like

TEXT = vocabulary()
TOKENS = jnp.zeros((1, 2), jnp.int32)
PLANNER = Tiles(
    patch=2, side=8, most=2
)  # 4 x 4 patches a tile, of which 2 x 2 rows are made; at most three views


@functools.cache
def toy(shuffle):
    small = decoder(layers=1)
    model = HoVLE(
        decoder=small,
        planner=PLANNER,
        tower=PatchEmbedding(WIDTH, 4),
        connector=ShuffledProjection(WIDTH),
        holistic=HolisticEmbedding(blocks=small.blocks, num_layers=2),
        shuffle=shuffle,
    )
    return model, louder(drawn(model, TOKENS))


def asked(text="what <image> is red", pixels=None):
    written = write(text, [image(0, 9, 20) if pixels is None else pixels], PLANNER, TEXT)
    return np.asarray([written.tokens]), pictures([written], PLANNER, 1, len(written.tokens))


def test_tiles_are_those_nearest_to_the_aspect():
    # By hand: of 1 to 12 tiles; 1.5 is 3 : 2, with 6 tiles; 2 : 1 is 2, then 4 x 2 = 8 where there are pixels enough.
    planner = Tiles(patch=14, side=448)
    for size, grid in {
        (448, 448): (1, 1),
        (1000, 1000): (
            3,
            3,
        ),  # 1, 4 and 9 tiles have its aspect; 9 have 1.8 million pixels, less than twice its own
        (900, 900): (2, 2),  # 9 tiles would have more than twice as many
        (600, 400): (3, 2),
        (900, 450): (2, 1),
        (2000, 1000): (4, 2),
        (100, 5000): (1, 12),
    }.items():
        assert planner.tiles(*size) == grid
        crops = planner.plan(*size)
        tiles = grid[0] * grid[1]
        assert len(crops) == tiles + (tiles > 1) and {planner.grid(crop) for crop in crops} == {(32, 32)}
        assert planner.spell(crops) == [0, *range(2, 2 + 256 * len(crops)), 1]
    assert [crop.box[:2] for crop in planner.plan(600, 400)[:4]] == [(0, 0), (448, 0), (896, 0), (0, 448)]
    assert (planner.views, planner.rows) == (13, 2 + 13 * 256) and Tiles(
        patch=14, side=448, most=1
    ).views == 1
    with pytest.raises(UserError, match="whole squares of factor x factor patches"):
        Tiles(patch=4, side=12)


def test_a_fourth_of_the_patches_is_left_and_nothing_is_lost():
    x = jnp.arange(2 * 16 * 3.0).reshape(2, 16, 3)
    rows = shuffle_square(x, 2)
    assert rows.shape == (2, 4, 12)
    np.testing.assert_array_equal(rows[0, 1], x[0, jnp.asarray([2, 3, 6, 7])].reshape(-1))
    np.testing.assert_array_equal(pixel_unshuffle(rows.reshape(2, 2, 2, 12), 2).reshape(x.shape), x)


@pytest.mark.parametrize("shuffle", ["pre", "post"])
def test_decoding_is_the_whole_sequence_through_both_levels(shuffle):
    model, params = toy(shuffle)
    decoded_as_read(model, params, new=6)
    # Two layers of the module and one of the decoder; where patches are read one by one they need more room.
    assert [layer.read(jnp.zeros(1, int))[0].shape[2] for layer in model.init_cache(1, 16).layers] == (
        [16, 16, 16] if shuffle == "pre" else [64, 64, 16]
    )


@pytest.mark.parametrize("shuffle", ["pre", "post"])
def test_patches_and_words_are_causal(shuffle):
    """A change is seen by nothing before it: hidden states keep their bits there, and change from there on."""
    model, params = toy(shuffle)
    tokens, seen = asked()
    # "what", <img>, two tiles and the thumbnail of four rows each, </img>, "is red".
    assert seen.slot[0].tolist() == [-1, 0, *range(2, 14), 1, -1, -1]
    hidden = lambda tokens, seen: np.asarray(call(model, params, tokens, seen, method="features")[0][0])  # noqa: E731
    before = hidden(tokens, seen)
    assert before.shape == (17, WIDTH)  # the decoder's sequence is as long in both

    def first_change(tokens, seen):
        moved = np.abs(hidden(tokens, seen) - before).max(-1) > 0
        assert moved[moved.argmax() :].all()
        return int(moved.argmax())

    late = tokens.copy()
    late[0, 15] = 7
    assert first_change(late, seen) == 15
    # Patch (3, 1) of tile 1 is of its row (1, 0), at place 2 + 4 + 2. In "post" it is read behind (2, *) and (3, 0),
    # which belong to the rows (1, *).
    other = jax.tree.map(np.copy, seen)
    other.media.patches[0, 0, 1, 13] += 1.0
    assert first_change(tokens, other) == 8
    # Patch (2, 2) is of row (1, 1). In "post" patches (3, 0) and (3, 1) are read behind it, and so row (1, 0) changes,
    # too: there it is pairs of rows of patches that are causal.
    other = jax.tree.map(np.copy, seen)
    other.media.patches[0, 0, 1, 10] += 1.0
    assert first_change(tokens, other) == (9 if shuffle == "pre" else 8)


def test_behind_the_module_patches_are_read_in_the_order_of_their_tile():
    model, _ = toy("post")
    _, seen = asked()
    long = model.lengthened(jax.tree.map(jnp.asarray, seen), None)
    assert long.extra.tolist() == [36] and long.token.shape == (1, 17 + 3 * 12)
    assert long.patch[0].tolist() == [-1, -1, *range(48), -1, -1, -1]
    assert long.token[0, :7].tolist() == [0, 1, 2, 2, 2, 2, 3] and long.start[0, [2, 3, 14]].tolist() == [
        2,
        6,
        50,
    ]
    assert long.positions[0, -1] == 16  # as in the decoder


TASK = HolisticTraining(model=toy("pre")[0], teacher=tower(side=4))


@functools.cache
def trained():
    return drawn_like(lambda: TASK.init(jax.random.key(0)))


def test_the_first_stage_compares_directions_place_by_place():
    data = Unpaired(Scenes(), PLANNER, 40, shuffle=False)
    batch = data.take(np.arange(3))
    assert batch.keys() == data.element_spec().keys() and "targets" not in batch
    source = Scenes()
    question, answer = source[1 << 15].turns[0]  # half the source further on
    said = TEXT.encode(question.replace("<image> ", "") + "  " + answer)
    count = int((batch["segments"][0] > 0).sum())
    words = batch["tokens"][0][:count][batch["slot"][0][:count] < 0]
    assert words.tolist() == [TEXT.bos_id, *said, TEXT.eos_id]

    params = trained()
    evaluate = jax.jit(TASK.evaluate)
    metrics = evaluate(params, batch)
    model, own = TASK.model, TASK.unpack(params)
    assert set(own) == {"decoder", "tower", "connector", "holistic"}
    _, seen = asked()
    media = seen.media.replace(patches=batch["patches"], grid=batch["grid"], marks=batch["marks"])
    seen = seen.replace(media=media, slot=batch["slot"], positions=batch["positions"])
    y = np.asarray(call(model, own, batch["tokens"], seen, batch["segments"], method="embedded")[0])
    z = np.asarray(shuffle_square(call(TASK.teacher, params["teacher"], media).tokens, 2))[:, 0]
    table = np.asarray(own["decoder"]["embedding"]["table"])
    image_terms, text_terms = [], []
    cosine = lambda a, b: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))  # noqa: E731
    for b, t in np.argwhere(batch["segments"] > 0):
        slot = batch["slot"][b, t]
        if slot < 0:
            text_terms.append(cosine(y[b, t], table[batch["tokens"][b, t]]))
        elif slot >= 2:
            image_terms.append(
                cosine(y[b, t] @ params["head"]["kernel"], z[b, (slot - 2) // 4, (slot - 2) % 4])
            )
    for name, terms in (("image_cosine", image_terms), ("text_cosine", text_terms)):
        total, weight = metrics[name]
        assert weight == len(terms)
        np.testing.assert_allclose(total / weight, np.mean(terms), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"][0], -np.mean(image_terms) - np.mean(text_terms), atol=1e-5)


def test_a_longer_cache_is_asked_of_its_own_rows_whether_it_goes_back():
    asked_for = []
    inner = types.SimpleNamespace(check_rollback=asked_for.append)
    Cache((LongCache(inner, np.int32([3, 0])),), np.int32([5, 6])).rollback(np.int32([4, 2]))
    np.testing.assert_array_equal(asked_for, [[7, 2]])


def test_the_first_stage_sees_ahead_and_drops_as_the_others_do():
    batch = Unpaired(Scenes(), PLANNER, 40, shuffle=False, steps="images").take(np.arange(2))
    with pytest.raises(UserError, match="HoVLE.steps, now 'causal', to say the same"):
        jax.eval_shape(TASK.evaluate, trained(), batch)
    model = TASK.model
    (block,) = model.decoder.blocks
    blocks = (block.clone(attention=block.attention.clone(rule=Steps()), dropout=0.5),)
    parts = {name: stack.clone(blocks=blocks) for name, stack in model.stacks.items()}
    ahead = dataclasses.replace(TASK, model=model.clone(**parts, steps="images"))
    with pytest.raises(UserError, match="HoVLE.steps='images' needs the rule Steps in `holistic`, too"):
        model.clone(decoder=parts["decoder"], steps="images").check_steps(True)

    @jax.jit
    def run(params, batch, keys):
        return ahead.evaluate(params, batch), [ahead.loss(params, batch, key) for key in keys]

    seeing, noisy = run(trained(), batch, list(jax.random.split(jax.random.key(0))))
    causal = jax.jit(TASK.evaluate)(trained(), {n: x for n, x in batch.items() if n != "step_ends"})
    for name in ("image_cosine", "text_cosine"):
        assert seeing[name][0] != causal[name][0] and seeing[name][1] == causal[name][1]
    assert len({float(metrics["loss"][0]) for metrics in (seeing, *noisy)}) == 3


def test_a_run_of_it_begins_with_a_saved_model(tmp_path):
    class Drawn(HolisticTraining):
        def init(self, key):
            return trained()

    saved = jax.tree.map(lambda x: x + 1.0, TASK.unpack(trained()))
    save_model(tmp_path / "hovle", capture(TASK.model), saved)
    task = Drawn(model=TASK.model, teacher=TASK.teacher, start_from=str(tmp_path / "hovle"))
    begun = task.start(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, TASK.unpack(begun), saved)
    for part in ("teacher", "head"):
        jax.tree.map(np.testing.assert_array_equal, begun[part], trained()[part])


def test_a_cosine_is_of_directions_alone():
    x = jnp.asarray([[[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])
    z = jnp.asarray([[[1.0, 0.0], [0.0, -5.0], [9.0, 0.0]]])
    where = jnp.asarray([[True, True, False]])
    assert [float(value) for value in mean_cosine(x, z, where)] == [0.0, 2.0]  # 1 and -1
    assert float(mean_cosine(x, z, where.at[0, 1].set(False))[0]) == 1.0
    y = jax.random.normal(jax.random.key(1), (2, 5, 7))
    one, other = (mean_cosine(scale * y, y[::-1], jnp.ones((2, 5), bool)) for scale in (1.0, 2.0**9))
    assert one == other and abs(float(one[0])) <= 10.0


def test_the_first_two_stages_leave_the_decoder_alone():
    """To the bit; the module learns in both, through the decoder in the second. Only the third trains all."""
    source = of(Scenes)
    made = config.experiment(capture(TASK.model), capture(TASK.teacher), source, (2, 2, 2))
    for stage in made.stages:
        stage.batch_size = 2
    *_, last = made.stages
    assert last.trainable == config.ALL
    trainer = build(of(Trainer, task=made.task, data=made.data, stages=made.stages[:2]))
    state, metrics = trainer.train(progress=False, devices=jax.devices()[:1], params=trained())
    assert np.isfinite(metrics["train/loss"])
    before = trained()
    for part in ("decoder", "teacher"):
        jax.tree.map(np.testing.assert_array_equal, state.params[part], before[part])
    for part in ("holistic", "tower", "connector", "head"):
        changed = jax.tree.map(lambda x, y: bool(np.any(x != y)), state.params[part], before[part])
        assert all(jax.tree.leaves(changed)), part


def test_what_does_not_fit_is_told():
    model, params = toy("post")
    tokens, seen = asked()
    with pytest.raises(UserError, match="behind the module"):
        model.apply({"params": params}, tokens, seen, prefix=np.zeros_like(tokens))
    (block,) = model.holistic.blocks
    block = block.clone(attention=block.attention.clone(rule=Window(4, sinks=1)))
    with pytest.raises(UserError, match="no sinks"):
        model.clone(holistic=model.holistic.clone(blocks=(block,))).init_cache(1, 16)
    with pytest.raises(UserError, match="the connector makes 5 rows of an image, and Tiles spells 14"):
        drawn(model.clone(connector=ShuffledProjection(WIDTH, factor=4)), TOKENS)
    with pytest.raises(UserError, match="set scan_layers=False"):
        drawn(model.clone(holistic=model.holistic.clone(scan_layers=True)), TOKENS)
