"""Generated glyphs: a row and a picture read back."""

import numpy as np
import pytest

from research.data.glyphs import WORDS, GlyphAnswers, GlyphCanvases
from research.errors import UserError


def test_a_row_says_what_the_picture_shows():
    data = GlyphAnswers(side=4, objects=(2, 3), shapes=5, colours=3, noises=2, seed=1)
    batch = data.take(np.arange(6))
    at = data.starts
    assert data.vocab_size == len(WORDS) + 5 + 3 + 4 + 15 + 2 and data.length == 1 + 16 + 3 + 4 + 27
    for i in range(6):
        row = batch["tokens"][i][batch["segments"][i] > 0]
        picture, (_, shape, _), answer = row[1:17], row[17:20], row[data.prompt :]
        places = np.flatnonzero(picture < at["noise"])
        shapes, colours = np.divmod(picture[places] - at["glyph"], 3)
        objects = answer[4:].reshape(-1, 9)
        assert objects[:, 3].tolist() == (at["colour"] + colours).tolist()
        assert objects[:, 4].tolist() == (at["shape"] + shapes).tolist()
        assert (objects[:, 6:8] - at["place"] == np.stack(np.divmod(places, 4), axis=1)).all()
        named = objects[objects[:, 4] == shape]
        assert answer[2] == named[0, 3] and len(named) == 1
        # What has weight are the answer's tokens, as targets.
        weighted = batch["weights"][i] > 0
        assert batch["targets"][i][weighted].tolist() == answer.tolist()
    np.testing.assert_array_equal(data.take(np.array([3]))["tokens"][0], batch["tokens"][3])
    assert {name: x.shape[1:] for name, x in batch.items()} == {
        name: spec.shape for name, spec in data.element_spec().items()
    }
    # The shortest answer of the defaults has 58 tokens.
    assert 4 + 9 * GlyphAnswers().objects[0] >= 50


def test_a_canvas_has_its_glyphs_in_the_crops_it_says():
    data = GlyphCanvases(noise=0.0, objects=(2, 2))
    batch = data.take(np.arange(4))
    for i in range(4):
        crops = batch["images"][i].reshape(2, 48, 2, 48, 3).swapaxes(1, 2).reshape(4, -1)
        assert ((crops > 0).any(axis=1) == batch["present"][i, 1:].any(axis=1)).all()
        assert (batch["present"][i, 0] == batch["present"][i, 1:].sum(axis=0)).all()
        assert batch["present"][i, 0, batch["question"][i]] == 1 and batch["present"][i, 0].sum() == 2
    alone = GlyphCanvases(noise=0.0, objects=(1, 1)).take(np.arange(3))
    for image, colour in zip(alone["images"], alone["labels"], strict=True):
        lit = image.reshape(-1, 3).max(axis=0)
        assert (lit == [(colour + 1) >> bit & 1 for bit in range(3)]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GlyphAnswers(split="dev"), "the splits are train, validation, test"),
        (lambda: GlyphAnswers(objects=(3, 11)), "from 1 to 10 objects"),
        (lambda: GlyphAnswers(noises=0), "at least one of each"),
        (lambda: GlyphCanvases(glyph=10), "glyphs that divide a crop"),
        (lambda: GlyphCanvases(size=0), "at least 1 and 0"),
    ],
)
def test_bad_input(make, message: str):
    with pytest.raises(UserError, match=message):
        make()
