"""What is wrong with a picture or its prompt is told in one line, and what only looks wrong is read."""

import io
import struct
import tomllib
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import generate
from research.config import build, load_config
from research.config_capture import capture
from research.data.shapes import vocabulary
from research.errors import UserError
from research.multimodal.connectors import PatchProjection, Resampler
from research.multimodal.media import Planner, Square, read_image
from research.training.model_directory import save_model
from tests.multimodal.toys import image, tower, vlm
from tests.programs import drawn

ROOT = Path(generate.__file__).parent.parent


def png(width: int, height: int) -> bytes:
    """A file that says it has so many pixels, and has none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that reads images, with a context of 32, and files."""
    path = tmp_path_factory.mktemp("bad")
    model = vlm()
    model = model.clone(decoder=model.decoder.clone(max_length=32))
    params = drawn(model, jnp.zeros((1, 2), jnp.int32))
    save_model(path / "model", capture(model), params, vocabulary())
    Image.fromarray(image(1)).save(path / "good.png")
    Image.fromarray(image(2, 1, 5000)).save(path / "panorama.png")
    whole = (path / "good.png").read_bytes()
    files = {"cut.png": whole[:-60], "text.png": b"text", "empty.png": b"", "none.png": png(0, 0)}
    files["bomb.png"] = png(60_000, 60_000)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def call(folder: Path, *flags: str) -> int:
    return generate.PROGRAM.call(
        generate.main, [f"--workdir={folder / 'model'}", "--max_new_tokens=2", *flags]
    )


@pytest.mark.parametrize(
    ("images", "prompt", "message"),
    [
        (["absent.png"], "what", "absent.png: no such file"),
        (["cut.png"], "what", "cut.png: a damaged image: "),
        (["text.png"], "what", "text.png: not an image that Pillow can read"),
        (["empty.png"], "what", "empty.png: not an image"),
        (["none.png"], "what", "none.png: not an image"),
        (["bomb.png"], "what", "bomb.png: over 178,956,970 pixels, which is too large"),
        (["."], "what", "Is a directory; an image file is expected"),
        (["good.png"], "<image> what <image>", "2 <image> in the text, but 1 images are given"),
        (["good.png", "good.png"], "<image> what", "1 <image> in the text, but 2 images are given"),
        ([], "<image> what", "1 <image> in the text, but 0 images are given"),
        (["good.png"], "what " * 40, "the model's context is 32: at most 31 leave room for output"),
        (["good.png"] * 9, "what", "prompt 1 has 38 tokens and the model's context is 32"),
    ],
)
def test_generate_tells_it_in_one_line(folder, capsys, images, prompt, message):
    assert call(folder, *(f"--image={folder / name}" for name in images), f"--prompt={prompt}") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_model_of_text_reads_no_images(folder, capsys):
    assert generate.PROGRAM.call(generate.main, [f"--image={folder / 'good.png'}", "--prompt=x"]) == 2
    assert "holds a DecoderLM, which reads no images" in capsys.readouterr().err


def test_a_prompt_may_fill_the_context_and_a_panorama_is_an_image(folder, capsys):
    for name, words, finish in (("panorama.png", 1, "length"), ("good.png", 26, "context")):
        # <bos>, four rows and the words; a context of 32.
        flags = (f"--image={folder / name}", "--prompt=<image>" + " what" * words, "--max_new_tokens=9")
        assert call(folder, *flags) == 0
        err = capsys.readouterr().err
        assert f"{5 + words} prompt tokens" in err and (finish in err or "eos" in err)


def planners() -> dict[str, Planner]:
    """Those of every system that has one, at both sizes."""
    found = {}
    systems = tomllib.loads((ROOT / "research/systems.toml").read_text())["system"]
    for config in {s["config"] for s in systems if s["family"] == "multimodal"} | {"configs/llava.py"}:
        for preset in ("tiny", "paper"):
            node = load_config(f"{ROOT / config}:{preset}").task.get("model")
            if node is not None and "planner" in node:
                found[f"{config}:{preset}"] = build(node.planner)
    return found


def test_every_planner_reads_pictures_of_any_shape():
    for name, planner in planners().items():
        for width, height in ((5000, 1), (1, 5000), (1, 1)):
            media, spelled = planner.read(image(0, height, width))
            empty = planner.nothing(1)
            assert (media.patches.shape, media.grid.shape) == (empty.patches.shape[1:], empty.grid.shape[1:])
            rows = [piece for piece in spelled if not isinstance(piece, str)]
            assert len(rows) == len(set(rows)) and min(rows) >= 0 and max(rows) < planner.rows, name
            assert np.isfinite(media.patches).all() and (media.grid.prod(-1) > 0).any()


@pytest.mark.parametrize(
    "pixels",
    [image()[..., 0], image() / 255.0, np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8)],
    ids=["grey", "floats", "empty", "alpha"],
)
def test_an_array_that_is_no_image_is_told(pixels):
    with pytest.raises(UserError, match=r"an image is uint8\[height, width, 3\], with pixels; not "):
        Square(patch=4, side=8).read(pixels)


def test_a_float_that_is_no_number_is_black():
    buffer = io.BytesIO()
    Image.fromarray(np.asarray([[np.nan, 1.0]], np.float32)).save(buffer, "TIFF")
    np.testing.assert_array_equal(read_image(buffer.getvalue()), [[[0] * 3, [255] * 3]])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            dict(connector=PatchProjection(12)),
            "the connector gives rows 12 wide, and the decoder's tokens are 8 wide",
        ),
        (dict(connector=Resampler(4, 8, 3, 8)), "num_heads=3 does not divide the width of 8"),
        (
            dict(connector=Resampler(3, 8, 2, 8)),
            "the connector makes 3 rows of an image, and Square spells 4",
        ),
        (dict(tower=tower(side=3)), "side=3 has 9 positions and views have 4 patches"),
    ],
)
def test_parts_that_do_not_fit_are_told_before_anything_is_drawn(parts, message):
    model = vlm(**parts)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
