"""EMMA: it begins as LLaVA, its mixing is over tokens, and the question reaches it wherever images are read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import emma as config
from research.config import build
from research.data.dialogues import Dialogue
from research.data.shapes import TOKENIZER, vocabulary
from research.errors import UserError
from research.multimodal.connectors import PatchProjection
from research.multimodal.contrastive import SeenWithText, TextTower, TowerPair, WithText, info_nce
from research.multimodal.conversations import Conversations
from research.multimodal.emma import EarlyFusion, TokenMixing
from research.multimodal.media import Square
from research.multimodal.prompts import Prompts, pictures, write
from research.multimodal.task import batch_pictures
from research.multimodal.tower import Seen
from research.nn.attention import Attention
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.transformer import Block
from tests.multimodal.test_model import decoded_as_read, louder
from tests.multimodal.toys import WIDTH, image, tower, vlm
from tests.programs import call, drawn

TEXT = vocabulary()
KEY = jax.random.key(0)
CONTEXT = 7
PLANNER = WithText(patch=4, side=8, context=CONTEXT)


def ids(text, context=CONTEXT):
    made = TEXT.encode(text, bos=True, eos=True)
    return [*made, *[0] * (context - len(made))]


def text_tower():
    block = Block(Attention(2, 3, use_bias=True, output_bias=True), MLP(8), LayerNorm())
    size = dict(vocab_size=TEXT.vocab_size, width=6, context=CONTEXT, end=TEXT.eos_id)
    return TextTower(blocks=(block,), num_layers=1, **size)


@pytest.fixture(scope="module")
def toy():
    """An EMMA as it begins."""
    model = vlm(planner=PLANNER, tower=TowerPair(tower(), text_tower()), connector=EarlyFusion(WIDTH))
    params = louder(drawn(model, jnp.zeros((1, 2), jnp.int32)))
    begun = {"kernel": jnp.eye(4 + CONTEXT, 4), "bias": jnp.zeros(4)}
    return model, params | {"connector": params["connector"] | {"mix": begun}}


def mixed(params, kernel):
    mix = params["connector"]["mix"]
    return params | {"connector": params["connector"] | {"mix": mix | {"kernel": mix["kernel"] + kernel}}}


def asked(text="what <image> is red"):
    written = write(text, [image()], PLANNER, TEXT)
    return np.asarray([written.tokens]), pictures([written], PLANNER, 1, len(written.tokens))


def test_it_begins_as_llava(toy):
    model, params = toy
    tokens, seen = asked()
    llava = vlm(planner=Square(patch=4, side=8), tower=tower(), connector=PatchProjection(WIDTH))
    own = {
        "decoder": params["decoder"],
        "tower": params["tower"]["image"],
        "connector": {"projection": params["connector"]["projection"]},
    }
    plain = seen.replace(media=seen.media.replace(words=None))
    np.testing.assert_array_equal(call(model, params, tokens, seen), call(llava, own, tokens, plain))
    with pytest.raises(UserError, match="take `WithText`"):
        call(model, params, tokens, plain)
    init = jax.jit(TokenMixing(4).init)(KEY, jnp.zeros((1, 4 + CONTEXT, 3)))["params"]
    jax.tree.map(np.testing.assert_array_equal, init, params["connector"]["mix"])


def test_only_the_texts_columns_let_the_instruction_in(toy):
    model, params = toy
    _, seen = asked()
    taps = call(model.tower, params["tower"], seen.media)

    @jax.jit
    def run(connector, text):
        loss = lambda c, t: jnp.sum(jnp.square(model.connector.apply({"params": c}, taps.replace(text=t), 0)))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(connector, text)

    own, text = run(params["connector"], taps.text)
    kernel = np.asarray(own["mix"]["kernel"])
    assert (text == 0).all() and (own["text"]["kernel"] == 0).all()
    assert (kernel[4:] != 0).any(axis=1).all()  # at their value of 0
    opened = mixed(params, 0.1 * (np.arange(4 + CONTEXT) >= 4)[:, None])
    own, text = run(opened["connector"], taps.text)
    assert (text != 0).any() and (own["text"]["kernel"] != 0).any()


def test_the_mixing_is_linear_and_over_tokens():
    module = TokenMixing(4)
    z = jax.random.normal(KEY, (2, 3, 4 + CONTEXT, 5))
    kernel = jax.random.normal(jax.random.key(1), (4 + CONTEXT, 4))
    params = {"kernel": kernel, "bias": jnp.zeros(4)}
    out = call(module, params, z)
    np.testing.assert_allclose(out, np.einsum("sp,bisd->bipd", kernel, z), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(call(module, params, 2.0 * z), 2.0 * out)
    order = np.asarray([3, 1, 4, 0, 2])
    np.testing.assert_array_equal(call(module, params, z[..., order]), out[..., order])
    offset = call(module, params | {"bias": jnp.arange(4.0)}, z)
    np.testing.assert_allclose(offset - out, np.broadcast_to(np.arange(4.0)[:, None], out.shape), atol=1e-5)


def test_the_papers_size_adds_116_million_parameters():
    model = config.get_config("paper").task.model
    places, dim, text = model.planner.side**2 // model.planner.patch**2, model.tower.image.width, model.tower.text
    seen = Seen(jnp.zeros((1, 1, 1, places, dim)), None, None, None)
    seen = SeenWithText(seen, jnp.zeros((1, 1, text.context, text.width)), None)
    made = jax.eval_shape(lambda: build(model.connector).init(KEY, seen, None))["params"]
    count = sum(leaf.size for part in ("text", "mix") for leaf in jax.tree.leaves(made[part]))
    assert count == 576 * 653 + 576 + 768 * 1024 + 1024 == 1_164_160


@dataclasses.dataclass(frozen=True)
class Said:
    tokenizer = str(TOKENIZER)

    def __len__(self):
        return 2

    def __getitem__(self, number):
        long = ("<image> what colour is the red circle", "red")
        turns = (long, ("what shape is red", "circle")) if number else (long,)
        return Dialogue((image(number),), turns)


def test_the_question_is_the_same_tokens_in_training_and_in_prompts():
    data = Conversations(Said(), PLANNER, length=40, pack=2, images=2, shuffle=False)
    batch = data.take(np.arange(1))
    assert batch["words"].shape == data.element_spec()["words"].shape[:0] + (1, 2, CONTEXT)
    # One of a dialogue: the shortest. A long one keeps its end.
    cut = [TEXT.bos_id, *TEXT.encode("what colour is the red"), TEXT.eos_id]
    assert batch["words"][0].tolist() == [cut, ids("what shape is red")]
    assert batch_pictures(batch).media.words is batch["words"]
    prompts = [
        ("<image> what shape is red", [image(1)]),
        ("what", []),
        ("<image> what <image> is red", [image(1), image(2)]),
    ]
    (seen,) = Prompts.of(prompts, PLANNER, TEXT).beside(16)
    wanted = [[ids("what shape is red"), [0] * CONTEXT], [[0] * CONTEXT] * 2, [ids("what is red")] * 2]
    assert seen.media.words.tolist() == wanted
    # Of a chat the current question alone, without what stands around it.
    chat = dataclasses.replace(PLANNER, before="and ", between=" ?")
    text = "and <image> what colour is the circle ? red and what shape is red ?"
    (seen,) = Prompts.of([(text, [image(1)])], chat, TEXT).beside(40)
    assert seen.media.words[0, 0].tolist() == ids("what shape is red")
    # Planners that keep no text give batches as they were.
    plain = Conversations(Said(), Square(patch=4, side=8), length=40, shuffle=False)
    assert "words" not in plain.take(np.arange(1)) and "words" not in plain.element_spec()


def test_prompts_decode_as_they_are_read_and_the_question_counts(toy):
    model, params = toy
    open_ = mixed(params, 0.5 * jax.random.normal(KEY, (4 + CONTEXT, 4)))
    decoded_as_read(model, open_, new=8)
    # The instruction alone changes the image's rows, and what stands behind its end token does not change before it.
    (_, seen) = asked("<image> what shape is red")
    rows = call(model, open_, seen.media, method="see")[1]
    other = seen.media.replace(words=np.asarray([[ids("what colour is red")]]))
    assert (call(model, open_, other, method="see")[1] != rows).any(axis=-1).all()
    np.testing.assert_array_equal(
        call(model, params, other, method="see")[1], call(model, params, seen.media, method="see")[1]
    )


def test_the_text_tower_is_causal_and_reads_to_the_first_end_token():
    module = text_tower()
    words = np.asarray([ids("what is red"), ids("what is red and blue")])
    params = drawn(module, words)
    states, last = call(module, params, words)
    np.testing.assert_array_equal(states[0, :4], states[1, :4])
    other = call(module, params, np.where(np.arange(CONTEXT) > 4, 9, words))
    np.testing.assert_array_equal(
        other[1][0], last[0]
    )  # the end token is at 4 there, and behind it in the other
    assert (other[1][1] != last[1]).any()
    with pytest.raises(UserError, match="context=7"):
        call(module, params, words[:, :5])


def test_pairs_find_each_other():
    u = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    # The third pair has weight 0 and is no candidate: logits [[2, 0], [0, 2]] both ways.
    nats, found = info_nce(u, u, jnp.float32(2.0), jnp.asarray([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(nats, [np.log1p(np.exp(-2.0))] * 2 + [0.0], rtol=1e-6)
    assert found.tolist() == [1.0, 1.0, 0.0]
    task = build(config.contrast())
    data = build(config.pairs(0))
    batch = data.take(np.arange(2))
    assert {name: (x.shape[1:], x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in data.element_spec().items()
    }
    assert batch["words"][:, 0, 0].tolist() == [TEXT.bos_id] * 2
    metrics = jax.eval_shape(task.loss, jax.eval_shape(task.init, KEY), batch, KEY)
    assert set(metrics) == {"loss", "accuracy"}
    # CLIP's clipping is of the parameter, after an update: what is below stays.
    scales = [task.remember({"log_scale": np.float32(x), "other": u}, {}) for x in (4.0, 5.0)]
    np.testing.assert_allclose([x["log_scale"] for x in scales], [4.0, np.log(100.0)], rtol=1e-6)
    assert scales[1]["other"] is u
