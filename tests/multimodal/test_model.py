"""The machine: an empty image is no image, prompts with images decode as they are read, packed rows don't meet."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import generate
from research.config_capture import capture
from research.data.dialogues import Dialogue
from research.data.shapes import TOKENIZER, vocabulary
from research.decoding.generator import Generator
from research.errors import UserError
from research.multimodal.conversations import Conversations
from research.multimodal.media import Media, Square
from research.multimodal.model import Pictures, splice
from research.multimodal.prompts import Prompts, pictures, write
from research.multimodal.task import VisionLanguage, batch_pictures
from research.multimodal.tower import cubic_weights, resized_positions
from research.nn.masks import Steps, step_ends
from research.training.model_directory import save_model
from tests.multimodal.toys import image, vlm
from tests.programs import call, drawn

TEXT = vocabulary()
PROMPTS = (
    ("<image> what is <image> and 7", [image(1), image(2)]),
    ("what", []),
    ("describe the picture <image>", [image(3)]),
)


def louder(params):
    """Larger kernels, so that greedy output is not one token for ever."""
    return jax.tree.map(lambda x: jnp.asarray(np.float32(3.0) * np.asarray(x)) if x.ndim > 1 else x, params)


@pytest.fixture(scope="module")
def toy():
    model = vlm()
    return model, louder(drawn(model, jnp.zeros((1, 2), jnp.int32)))


def reread(model, params, prompts, outputs):
    """Logits of prompts and outputs in one call, at the places that decide the outputs."""
    written = Prompts.of(prompts, model.planner, TEXT).written
    for row, output in zip(written, outputs, strict=True):
        row.say(output)
    length = max(len(row.tokens) for row in written)
    tokens = np.zeros((len(written), length), np.int32)
    segments = np.zeros_like(tokens)
    for i, row in enumerate(written):
        tokens[i, : len(row.tokens)], segments[i, : len(row.tokens)] = row.tokens, 1
    seen = pictures(written, model.planner, 2, length)
    logits = call(model, params, tokens, seen, segments=segments)
    starts = [len(row.tokens) - len(output) for row, output in zip(written, outputs, strict=True)]
    return [
        np.asarray(logits[i, s - 1 : s - 1 + len(o)])
        for i, (s, o) in enumerate(zip(starts, outputs, strict=True))
    ]


def decoded_as_read(model, params, new=12):
    """Greedy output of a batch, cached, is what one uncached call over prompt and output says."""
    asked = Prompts.of(PROMPTS, model.planner, TEXT)
    result = Generator(model, params, ends=()).generate(asked.tokens, beside=asked.beside, max_new_tokens=new)
    outputs = [sample.tokens for sample in result.samples]
    for logits, output in zip(reread(model, params, PROMPTS, outputs), outputs, strict=True):
        np.testing.assert_array_equal(logits.argmax(-1), output)
    return outputs


def test_prompts_with_images_decode_as_they_are_read(toy):
    outputs = decoded_as_read(*toy)
    # The images count: another one gives another output.
    others = [(text, [255 - x for x in images]) for text, images in PROMPTS]
    asked = Prompts.of(others, toy[0].planner, TEXT)
    changed = Generator(*toy, ends=()).generate(asked.tokens, beside=asked.beside, max_new_tokens=12)
    same = [a.tokens == b for a, b in zip(changed.samples, outputs, strict=True)]
    assert same == [False, True, False]


def test_rows_that_share_a_position_decode_as_they_are_read(toy):
    model, params = toy
    model = model.clone(planner=dataclasses.replace(model.planner, share="image"))
    asked = Prompts.of(PROMPTS, model.planner, TEXT)
    # <bos>, an image at 1, "what is" at 2 and 3, an image at 4, "and 7".
    assert asked.written[0].positions == [0, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4, 5, 6]
    decoded_as_read(model, params)
    assert write("<image>", [image()], Square(patch=4, side=8, share="row"), TEXT).positions == [0, 0, 1, 1]


def is_the_decoder_without_media(model, params):
    """Bit for bit, also where it is given media with nothing in it."""
    tokens = np.asarray([[1, 5, 9, 2, 7, 3]])
    plain = call(model.decoder, params["decoder"], tokens)
    np.testing.assert_array_equal(call(model, params, tokens), plain)
    np.testing.assert_array_equal(call(model, params, tokens, model.blank(1, 6)), plain)


def test_without_images_it_is_the_decoder_bit_for_bit(toy):
    is_the_decoder_without_media(*toy)


@dataclasses.dataclass(frozen=True)
class Said:
    """Dialogue i shows image i."""

    tokenizer = str(TOKENIZER)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return Dialogue((image(i),), (("what digit is <image> ?", str(i)), ("and ?", "yes")))


def test_packed_dialogues_do_not_see_each_other(toy):
    model, params = toy
    options = dict(source=Said(), planner=model.planner, shuffle=False)
    packed = Conversations(length=48, images=2, pack=2, **options).take(np.arange(2))
    alone = Conversations(length=24, **options).take(np.arange(4))

    def logits(batch):
        return np.asarray(
            call(model, params, batch["tokens"], batch_pictures(batch), segments=batch["segments"])
        )

    one, two = logits(alone), logits(packed)
    count = int((alone["segments"][0] > 0).sum())
    np.testing.assert_allclose(two[0, :count], one[0, :count], atol=1e-5)
    np.testing.assert_allclose(two[0, count : 2 * count], one[1, :count], atol=1e-5)
    weights = packed["weights"][0]
    assert (
        weights[: count - 1].sum() == 4 == alone["weights"][0].sum()
    )  # two answers of a word, and their ends
    assert weights[count - 1] == 0  # the first dialogue's last token does not predict the second's
    assert (packed["slot"][0].max(), alone["slot"].max()) == (7, 3)
    with pytest.raises(UserError, match="2 images, and images=1"):
        Conversations(length=48, pack=2, **options).take(np.arange(1))
    with pytest.raises(UserError, match="an image behind length=4"):
        Conversations(length=4, **options).take(np.arange(1))


@pytest.mark.parametrize("steps", ["images", "prefix"])
def test_packed_dialogues_that_see_ahead_are_those_of_rows_of_their_own(toy, steps):
    model, params = vlm(rule=Steps()), toy[1]
    options = dict(source=Said(), planner=model.planner, shuffle=False, steps=steps)
    alone = Conversations(length=24, **options).take(np.arange(2))
    packed = Conversations(length=48, images=2, pack=2, **options).take(np.arange(1))
    count = int((alone["segments"][0] > 0).sum())

    def logits(batch, tokens=None):
        tokens = batch["tokens"] if tokens is None else tokens
        masks = dict(segments=batch["segments"], prefix=batch["step_ends"])
        return np.asarray(call(model, params, tokens, batch_pictures(batch), **masks))

    one, two = logits(alone), logits(packed)
    np.testing.assert_allclose(two[0, :count], one[0, :count], atol=1e-5)
    np.testing.assert_allclose(two[0, count : 2 * count], one[1, :count], atol=1e-5)
    # Ahead: another last word of the second question moves all of its prefix (or nothing before it), and the first
    # dialogue in no bit.
    last = count + int(np.flatnonzero(alone["weights"][1])[0])
    tokens = packed["tokens"].copy()
    tokens[0, last] = 9
    moved = np.abs(logits(packed, tokens) - two)[0].max(axis=-1) > 0
    assert not moved[:count].any() and moved[last : 2 * count].all()
    assert moved[count:last].all() if steps == "prefix" else not moved[count:last].any()


@pytest.mark.parametrize("steps", ["images", "prefix"])
def test_prompts_that_see_ahead_decode_as_they_are_read(toy, steps):
    model, params = vlm(rule=Steps(), steps=steps), toy[1]
    asked = Prompts.of(PROMPTS, model.planner, TEXT)
    result = Generator(model, params, ends=()).generate(asked.tokens, beside=asked.beside, max_new_tokens=6)
    outputs = [sample.tokens for sample in result.samples]
    length = max(len(row.tokens) for row in asked.written) + 6
    tokens, segments = np.zeros((3, length), np.int32), np.zeros((3, length), np.int32)
    ends = np.tile(np.arange(1, length + 1, dtype=np.int32), (3, 1))
    for i, (row, output) in enumerate(zip(asked.written, outputs, strict=True)):
        count = len(row.tokens)
        # Two images at 1 to 4 and at 7 to 10, none, one at 4 to 7.
        for start, end in {"prefix": [(0, count)], "images": ([(1, 5), (7, 11)], [], [(4, 8)])[i]}[steps]:
            ends[i, start:end] = end
        row.say(output)
        tokens[i, : count + 6], segments[i, : count + 6] = row.tokens, 1
    seen = pictures(asked.written, model.planner, 2, length)
    logits = np.asarray(call(model, params, tokens, seen, segments=segments, prefix=ends))
    for i, (row, output) in enumerate(zip(asked.written, outputs, strict=True)):
        start = len(row.tokens) - 7
        np.testing.assert_array_equal(logits[i, start : start + 6].argmax(-1), output)


def test_training_and_model_agree_on_what_sees_ahead(toy):
    batch = Conversations(Said(), toy[0].planner, 24, steps="prefix", shuffle=False).take(np.arange(1))
    causal = {name: x for name, x in batch.items() if name != "step_ends"}
    for model, given, message in (
        (toy[0], batch, "VLM.steps, now 'causal', to say the same"),
        (vlm(steps="prefix"), batch, "and the rule Steps in the decoder"),
        (vlm(rule=Steps(), steps="prefix"), causal, "but in Conversations.steps nothing sees ahead"),
    ):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(VisionLanguage(model).evaluate, toy[1], given)


def test_steps_are_the_cumulative_rule():
    opens = np.asarray([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1, 0]], bool)
    ends = jax.jit(step_ends)(opens)
    np.testing.assert_array_equal(ends[0], [2, 2, 3, 6, 6, 6, 7])
    count = np.cumsum(opens, axis=1)
    index = jnp.arange(7)[None]
    np.testing.assert_array_equal(
        Steps().allowed(index, index, ends)[:, 0], count[:, None, :] <= count[:, :, None]
    )
    np.testing.assert_array_equal(Steps().allowed(index, index, None)[0, 0], np.tril(np.ones((7, 7), bool)))


def test_an_images_rows_see_each_other_where_steps_say_so(toy):
    batch = Conversations(Said(), toy[0].planner, 24, steps="images", shuffle=False).take(np.arange(1))
    places = np.flatnonzero(batch["slot"][0] >= 0)
    assert (batch["step_ends"][0][places] == places[-1] + 1).all()
    model = vlm(rule=Steps())
    tokens, seen = batch["tokens"], batch_pictures(batch)
    hidden = np.asarray(
        call(model, toy[1], tokens, seen, segments=batch["segments"], prefix=batch["step_ends"])
    )
    other = jax.tree.map(np.copy, seen)
    other.media.patches[0, 0, 0, -1] += 1.0
    changed = np.asarray(
        call(model, toy[1], tokens, other, segments=batch["segments"], prefix=batch["step_ends"])
    )
    moved = np.abs(hidden - changed).max(axis=-1)[0] > 0
    assert moved[places[0] :][: len(places)].all() and not moved[: places[0]].any()


def test_positions_are_interpolated():
    # A grid of the table's own size: the identity, bit for bit.
    weights = jax.jit(lambda n: cubic_weights(n, 4, 4))
    np.testing.assert_array_equal(weights(jnp.asarray(4)), np.eye(4))
    # Half the size: place 0 lies between samples 0 and 1. Keys' kernel with a = -0.75 at distances 0.5 and 1.5 is
    # (1.25 / 2 - 2.25) / 4 + 1 = 0.59375 and -0.75 (((1.5 - 5) 1.5 + 8) 1.5 - 4) = -0.09375; sample -1 is sample 0.
    half = np.asarray(weights(jnp.asarray(2)))
    np.testing.assert_allclose(half[0], [0.5, 0.59375, -0.09375, 0.0], atol=1e-6)
    np.testing.assert_allclose(half[1], half[0][::-1], atol=1e-6)
    table = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    grids = jnp.asarray([[4, 4], [2, 3], [0, 0]])
    found = np.asarray(jax.jit(resized_positions, static_argnums=2)(table, grids, 16))
    np.testing.assert_array_equal(found[0], table)
    rows, columns = (np.asarray(weights(jnp.asarray(n)))[:n] for n in (2, 3))
    wanted = np.einsum("ir,jc,rcd->ijd", rows, columns, table.reshape(4, 4, 3)).reshape(6, 3)
    np.testing.assert_allclose(found[1, :6], wanted, atol=1e-6)


def test_what_does_not_fit_is_told(toy):
    with pytest.raises(UserError, match="1 <image> in the text, but 2 images are given"):
        Prompts.of([("<image> what", [image(), image()])], toy[0].planner, TEXT)
    with pytest.raises(UserError, match="rows 4 wide, and the decoder's tokens are 8 wide"):
        splice(jnp.zeros((1, 2, 8)), jnp.zeros((1, 3, 4)), jnp.zeros((1, 2), jnp.int32))
    media = Media(jnp.zeros((1, 1, 1, 9, 48)), jnp.zeros((1, 1, 1, 2), int), jnp.zeros((1, 1, 1), int))
    with pytest.raises(UserError, match="4 positions and views have 9 patches"):
        model = vlm(planner=Square(patch=4, side=12))
        jax.eval_shape(
            model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), Pictures(media, None, None)
        )


def test_a_run_begins_with_parts_of_others(toy, tmp_path):
    config = capture(toy[0].decoder)
    save_model(tmp_path / "lm", config, toy[1]["decoder"])
    begun = VisionLanguage(toy[0], parts=(("decoder", str(tmp_path / "lm"), ""),)).start(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, begun["decoder"], toy[1]["decoder"])
    save_model(tmp_path / "vlm", capture(toy[0]), toy[1])
    whole = VisionLanguage(toy[0], parts=(("", str(tmp_path / "vlm"), ""),)).start(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, whole, toy[1])
    layer = VisionLanguage(toy[0], parts=(("tower/layer_0", str(tmp_path / "lm"), "layer_0"),))
    with pytest.raises(UserError, match="does not fit the model: attention/key/bias"):
        layer.start(jax.random.key(0))
    wrong = VisionLanguage(toy[0], parts=(("decoder/layer_9", str(tmp_path / "lm"), "layer_0"),))
    with pytest.raises(UserError, match="the model has no 'decoder/layer_9'"):
        wrong.start(jax.random.key(0))


def test_the_program_shows_images_before_a_prompt_that_has_no_place_for_them(toy, tmp_path):
    Image.fromarray(image(1)).save(tmp_path / "a.png")
    loaded = SimpleNamespace(model=toy[0], tokenizer=TEXT)
    path = str(tmp_path / "a.png")
    tokens, beside = generate.show(["what", "what <image>"], [path], loaded, "runs/a")
    (seen,) = beside(8)
    assert [len(row) for row in tokens] == [6, 6]
    assert seen.slot.tolist() == [[-1, 0, 1, 2, 3, -1, -1, -1], [-1, -1, 0, 1, 2, 3, -1, -1]]
    with pytest.raises(UserError, match="1 <image> in the text, but 2 images"):
        generate.show(["<image>"], [path, path], loaded, "runs/a")
    with pytest.raises(UserError, match="runs/a holds a DecoderLM, which reads no images"):
        generate.show(["what"], [path], SimpleNamespace(model=toy[0].decoder, tokenizer=TEXT), "runs/a")


def test_a_prefix_sees_itself_up_to_the_first_answer(toy):
    batch = Conversations(Said(), toy[0].planner, 24, steps="prefix", shuffle=False).take(np.arange(1))
    first = int(np.flatnonzero(batch["weights"][0])[0]) + 1  # the first token of the answer
    assert batch["step_ends"][0][:first].tolist() == [first] * first
    assert batch["step_ends"][0][first:].tolist() == list(range(first + 1, 25))
