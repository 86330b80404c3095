"""Batches that are padded on the left, as processors of transformers give them: every row is one of its own."""

import jax
import numpy as np
import pytest

from research.data.shapes import vocabulary
from research.errors import UserError
from research.multimodal.ep_alm import EPALM, LateToken, SoftPrompt
from research.multimodal.llava_uhd import Slices
from research.multimodal.media import Square
from research.multimodal.padded import Padded
from research.multimodal.prompts import Prompts, pictures
from tests.multimodal.test_model import PROMPTS, louder
from tests.multimodal.toys import WIDTH, image, tower, vlm
from tests.programs import call, drawn

TEXT = vocabulary()
PLACEHOLDER = TEXT.encode("<image>")[0]
IMAGES = [x for _, images in PROMPTS for x in images]


def handed(planner, prompts=PROMPTS):
    """Tokens and mask, padded on the left, of prompts whose images are spelled by placeholders."""
    written = Prompts.of(prompts, planner, TEXT).written
    rows = [
        [PLACEHOLDER if slot >= 0 else token for token, slot in zip(row.tokens, row.slots, strict=True)]
        for row in written
    ]
    length = max(map(len, rows)) + 1
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    # Whatever stands at padding is not read, placeholders neither.
    return np.array([[PLACEHOLDER] * (length - len(row)) + row for row in rows]), mask


def models():
    late = LateToken(start=1, stop=2, levels=1, num_layers=2)
    parts = dict(tower=tower(class_token=True, norm_all=True), connector=SoftPrompt(2, WIDTH), hooks=(late,))
    return {
        "LLaVA": vlm(),
        "shared positions": vlm(planner=Square(patch=4, side=8, share="image")),
        "eP-ALM": vlm(EPALM, Square(patch=4, side=8, count=2), **parts),
    }


@pytest.mark.parametrize("name", models())
def test_rows_padded_on_the_left_have_logits_of_their_own(name):
    model = models()[name]
    params = louder(drawn(model, np.zeros((1, 2), np.int32)))
    tokens, mask = handed(model.planner)
    batch = Padded.of(tokens, mask, IMAGES, model.planner, TEXT, placeholder=PLACEHOLDER)
    there = mask > 0
    count, length = tokens.shape

    def left(x):
        out = np.zeros_like(x)
        for row, own, begin in zip(out, x, batch.begins, strict=True):
            row[begin:] = own[: length - begin]
        return out

    seen = batch.pictures
    moved = seen.replace(
        slot=np.where(there, left(np.asarray(seen.slot)), -1), positions=left(np.asarray(seen.positions))
    )

    @jax.jit
    def run(params):
        logits = model.apply({"params": params}, batch.tokens, seen, segments=batch.segments)
        last = model.apply({"params": params}, batch.tokens, batch.lengths, seen, method="prefill")[0]
        # The same rows as they were handed over.
        where_they_are = model.apply({"params": params}, tokens, moved, segments=mask)
        return batch.back(logits), last, where_they_are

    logits, last, where_they_are = map(np.asarray, run(params))
    np.testing.assert_allclose(last, logits[:, -1], atol=1e-5)
    np.testing.assert_allclose(where_they_are[there], logits[there], atol=1e-5)
    assert np.abs(logits[there]).max() > 0.5
    for row in range(count):
        own = Prompts.of(PROMPTS[row : row + 1], model.planner, TEXT).written
        alone = np.zeros((1, length), np.int32)
        alone[0, : len(own[0].tokens)] = own[0].tokens
        segments = (np.arange(length) < len(own[0].tokens))[None].astype(np.int32)
        wanted = call(model, params, alone, pictures(own, model.planner, 2, length), segments=segments)
        np.testing.assert_allclose(logits[row][there[row]], np.asarray(wanted)[0][segments[0] > 0], atol=1e-5)


@pytest.mark.parametrize(
    "planner", [Square(patch=4, side=8, share="row"), Slices(patch=4, side=16, most=2, queries=2)]
)
def test_what_is_handed_over_is_what_prompts_say(planner):
    prompts = [*PROMPTS, ("<image><image>", [image(4), image(5, 30, 9)])]
    tokens, mask = handed(planner, prompts)
    images = [x for _, own in prompts for x in own]
    asked = Padded.of(tokens, mask, images, planner, TEXT, placeholder=PLACEHOLDER).asked
    for one, other in zip(asked.written, Prompts.of(prompts, planner, TEXT).written, strict=True):
        assert (one.tokens, one.slots, one.positions) == (other.tokens, other.slots, other.positions)
        jax.tree.map(np.testing.assert_array_equal, one.media, other.media)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mask=np.zeros((3, 4))), r"tokens \[3, 14\] and mask \[3, 4\]: \[batch, length\] is expected"),
        ("empty", r"tokens \[3, 0\] and mask \[3, 0\]: \[batch, length\] is expected"),
        (dict(images=IMAGES[:2]), "row 3 of the batch: there is no image for 4 of its 4 placeholders"),
        (dict(images=[*IMAGES, image()]), "4 images are given, and the batch has places for 3"),
        ("hole", "row 1 of the batch has padding between its tokens"),
        ("nothing", "row 2 of the batch has no tokens"),
        ("cut", "row 3 of the batch ends 3 placeholders before its image 1 does"),
    ],
)
def test_what_no_batch_of_prompts_is_is_told(change, message):
    planner = Square(patch=4, side=8)
    tokens, mask = handed(planner)
    if change == "empty":
        tokens, mask = tokens[:, :0], mask[:, :0]
    if change == "hole":
        mask[0, 5] = 0
    if change == "nothing":
        mask[1] = 0
    if change == "cut":
        mask[2, -3:] = 0
    given = dict(mask=mask, images=IMAGES) | (change if isinstance(change, dict) else {})
    with pytest.raises(UserError, match=message):
        Padded.of(tokens, planner=planner, tokenizer=TEXT, placeholder=PLACEHOLDER, **given)
