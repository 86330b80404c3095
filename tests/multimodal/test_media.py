"""Files of all kinds, planners' shapes, dialogues in LLaVA's format."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from research.data.dialogues import LlavaFiles
from research.data.shapes import Cells, Pages, Scenes, make_vocabulary, vocabulary
from research.errors import UserError
from research.multimodal.conversations import Conversations
from research.multimodal.media import CLIP_MEAN, Crop, Square, cut, read_image
from research.multimodal.scaling import in_square
from research.nn.patch import patchify
from tests.multimodal.toys import image


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_all_kinds_of_files_become_upright_rgb():
    pixels = image(0, 3, 5)
    plain = Image.fromarray(pixels)
    np.testing.assert_array_equal(read_image(encoded(plain)), pixels)
    grey = Image.fromarray(pixels[..., 0])
    np.testing.assert_array_equal(read_image(encoded(grey)), np.repeat(pixels[..., :1], 3, 2))
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)  # 255 * 257 = 65535
    np.testing.assert_array_equal(read_image(encoded(deep)), np.repeat(pixels[..., :1], 3, 2))
    alpha = Image.fromarray(np.dstack([pixels, np.full((3, 5), 0, np.uint8)]))
    assert (read_image(encoded(alpha)) == 255).all()  # nothing of it is seen over white
    flat = Image.new("CMYK", (4, 2), (255, 0, 0, 0))  # cyan
    red, green, blue = read_image(encoded(flat, "TIFF"))[0, 0]
    assert red < 5 and green > 250 and blue > 250
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned to the right: to show it, a quarter turn clockwise
    np.testing.assert_array_equal(read_image(encoded(plain, exif=turned)), np.rot90(pixels, -1))


def test_files_that_are_no_images_are_told(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_image(tmp_path / "a.png")
    with pytest.raises(UserError, match="not an image"):
        read_image(b"text")
    with pytest.raises(UserError, match="a damaged image"):
        read_image(encoded(Image.fromarray(image(0, 30, 30)))[:-400])


def test_a_square_of_patches():
    planner = Square(patch=4, side=8, padded=True, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels = np.full((8, 2, 3), 255, np.uint8)
    media, spelled = planner.read(pixels)
    assert media.patches.shape == (1, 4, 48) and media.grid.tolist() == [[2, 2]] and spelled == [0, 1, 2, 3]
    columns = media.patches[0, 0].reshape(4, 4, 3)[0, :, 0]
    np.testing.assert_array_equal(columns, [0, 0, 0, 1])  # columns 3 and 4 of 8 are the image
    # A panorama of 1 x 5000 pixels is as good as any.
    assert planner.read(image(0, 1, 40_000))[0].patches.shape == (1, 4, 48)
    with pytest.raises(UserError, match="40000x1 pixels: a square around it would be over 32768 pixels wide"):
        dataclasses.replace(planner, exact=True).read(image(0, 1, 40_000))
    with pytest.raises(UserError, match="side=9 is not a multiple of patch=4"):
        Square(patch=4, side=9)


def test_every_second_pixel():
    pixels = image(1, 4, 6)
    strided, block = cut(pixels, [Crop((6, 4), (1, 0, 6, 4), 2), Crop((6, 4), (2, 1, 4, 3))])
    np.testing.assert_array_equal(strided, pixels[::2, 1::2])
    np.testing.assert_array_equal(block, pixels[1:3, 2:4])


def test_a_photograph_is_averaged_before_it_is_scaled_unless_that_is_to_be_exact():
    height, width = 1800, 2400  # barely large
    rows, columns, k = (np.float32(x) for x in np.ogrid[:height, :width, :3])
    pixels = np.uint8(127.5 + 120.0 * np.sin(rows / 300 + k) * np.cos(columns / 300 * (k + 1)))
    whole = in_square(pixels, CLIP_MEAN)
    bicubic = np.asarray(Image.fromarray(whole).resize((224, 224), Image.Resampling.BICUBIC))
    options = dict(patch=14, side=224, padded=True, mean=CLIP_MEAN, std=(1.0, 1.0, 1.0))
    exact, near = (Square(**options, exact=exact).read(pixels)[0].patches for exact in (True, False))
    scaled = np.float32(bicubic) / 255.0 - np.float32(CLIP_MEAN)
    np.testing.assert_array_equal(exact[0], patchify(scaled[None], 14)[0])
    # 0.17 in the mean and 5 at most; if what whole factors leave over were stretched, 0.98 and 65.
    assert 0 < np.abs(near - exact).mean() < 0.3 / 255 and np.abs(near - exact).max() < 10 / 255
    # Crops of one size are parts of one scaled image, and steps are taken of it.
    left, right, strided = cut(
        pixels,
        [
            Crop((480, 360), (0, 0, 240, 360)),
            Crop((480, 360), (240, 0, 480, 360)),
            Crop((480, 360), (1, 0, 480, 360), 2),
        ],
    )
    both = np.concatenate([left, right], axis=1)
    np.testing.assert_array_equal(strided, both[::2, 1::2])
    blocks = pixels.reshape(360, 5, 480, 5, 3).mean(axis=(1, 3))
    assert np.abs(both - blocks).mean() < 1  # of 255
    # In strips and on threads it is what Pillow makes of the whole, of which averaging left 2399 / 3 by 1799 / 3.
    odd = pixels[:-1, :-1]
    found = cut(odd, [Crop.whole(480, 360), Crop.whole(60, 50)])
    averaged = Image.fromarray(odd).reduce(3)
    for part, found_, factors in (
        (averaged, found[0], (3, 3)),
        (averaged.reduce((9, 8)), found[1], (27, 24)),
    ):
        extent = (0, 0, 2399 / factors[0], 1799 / factors[1])
        size = found_.shape[1::-1]
        np.testing.assert_array_equal(found_, np.asarray(part.resize(size, Image.Resampling.BICUBIC, extent)))


def test_the_world_says_what_it_shows():
    assert vocabulary().fingerprint == make_vocabulary().fingerprint
    scenes = Scenes(size=64, noise=0.0, asks=("colour", "place"))
    for i in range(8):
        (question, answer), (kinds, colours) = scenes[i].turns[0], scenes.cells(i)
        words = question.split()
        shape = words[-1]
        ((row, column),) = np.argwhere(kinds == scenes.kinds.index(shape))
        if "colour" in words:
            assert answer == ("red", "green", "blue", "yellow", "purple", "white")[colours[row, column]]
        else:
            step = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}[words[3]]
            r, c = row + step[0], column + step[1]
            there = 0 <= r < 3 and 0 <= c < 3 and kinds[r, c] >= 0
            assert answer == (scenes.kinds[kinds[r, c]] if there else "nothing")
        assert 0 not in vocabulary().encode(question.replace("<image>", "") + " " + answer)
    cells = Cells(Pages(size=4, shapes=((2, 3),), objects=(2, 2)), "colour").take(np.arange(4))
    assert cells["images"].shape == (4, 16, 24, 3) and ((cells["labels"] > 0).sum(1) == 2).all()
    bright = cells["images"].reshape(4, 2, 8, 3, 8, 3).max(axis=(2, 4, 5)).reshape(4, 6) > 0.5
    np.testing.assert_array_equal(bright, cells["labels"] > 0)


def test_dialogues_in_llavas_format(tmp_path):
    Image.fromarray(image(5)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
    entries = [
        {"image": "a.png", "conversations": turns},
        {"conversations": [dict(turns[0], value="many ?"), turns[1]]},
    ]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, entries)))
    source = LlavaFiles(str(tmp_path / "some.jsonl"))
    assert len(source) == 2 and source[0].turns == (("<image>\nwhat ?", "red"),) and source[1].images == ()
    planner = Square(patch=4, side=8)
    data = Conversations(source, planner, 16, shuffle=False, tokenizer=None)
    batch = data.take(np.arange(2))
    assert batch["grid"].tolist() == [[[[2, 2]]], [[[0, 0]]]]
    np.testing.assert_array_equal(batch["patches"][0, 0], planner.read(image(5))[0].patches)
    assert (batch["slot"][1] == -1).all() and batch["weights"][1].sum() > 0
    (tmp_path / "bad.json").write_text(json.dumps([{"image": [], "conversations": turns}]))
    with pytest.raises(UserError, match=r"entry 0: 1 <image> in the questions, but 0 images"):
        LlavaFiles(str(tmp_path / "bad.json"))[0]
    with pytest.raises(UserError, match="turn 1 is not a text from gpt"):
        (tmp_path / "worse.json").write_text(json.dumps([{"conversations": [turns[0], turns[0]]}]))
        LlavaFiles(str(tmp_path / "worse.json"))[0]
