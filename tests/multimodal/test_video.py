"""Clips that say what they show, films and animations of all kinds, frames as views."""

import io
import json
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from research.data.clips import Clips, make_clip_vocabulary, vocabulary
from research.data.dialogues import LlavaFiles
from research.data.shapes import CELL, COLOURS, PAINT
from research.data.shapes import vocabulary as words_of_shapes
from research.errors import UserError
from research.multimodal.conversations import Conversations
from research.multimodal.media import Square
from research.multimodal.video import Frames, middles, read_video
from tests.multimodal.toys import entry

CLIP = np.repeat(np.arange(8, dtype=np.uint8) * 30, 32 * 48 * 3).reshape(8, 32, 48, 3)
CLIP[:, :16, :16, 0] = 255  # red at the left above
IDENTITY = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


def animation(kind: str, clip: np.ndarray = CLIP) -> bytes:
    buffer, (first, *others) = io.BytesIO(), map(Image.fromarray, clip)
    first.save(
        buffer, kind, save_all=True, append_images=others, **({"lossless": True} if kind == "WEBP" else {})
    )
    return buffer.getvalue()


def film(clip: np.ndarray = CLIP, kind: str = "mp4") -> bytes:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", kind) as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width = clip.shape[1:3]
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_the_clips_say_what_they_show():
    assert vocabulary().fingerprint == make_clip_vocabulary().fingerprint
    text = "<bos> what colour is the circle ? 7"
    assert vocabulary().encode(text) == words_of_shapes().encode(text)
    clips = Clips(size=64, noise=0.0)
    for number in range(24):
        dialogue, movers = clips[number], clips.movers(number)
        ((question, answer),) = dialogue.turns
        assert 0 not in vocabulary().encode(question.replace("<image>", "") + " " + answer)
        (film_,) = dialogue.images
        assert film_.shape == (8, 32, 32, 3)
        last = movers[-1]  # nothing covers it
        lit = (film_ == (PAINT[COLOURS.index(last.colour)] * 255).astype(np.uint8)).all(-1)
        ends = []
        for frame in (lit[0], lit[-1]):
            rows, columns = np.nonzero(frame)
            ends.append((columns.mean(), rows.mean()))
        moved = np.round(np.subtract(ends[1], ends[0])).astype(int).tolist()
        assert moved == [7 * v for v in last.step] and sorted(map(abs, last.step)) == [
            0,
            clips.speeds[last.speed == "fast"],
        ]
        assert {(1, 0): "right", (-1, 0): "left", (0, 1): "down", (0, -1): "up"}[
            tuple(np.sign(moved).tolist())
        ] == last.direction
        one = (
            next(m for m in movers if m.shape in question or f"is {m.colour}" in question)
            if "clip" not in question
            else last
        )
        assert answer in (
            one.direction,
            one.speed,
            f"{one.speed} {one.direction}",
            one.colour,
            one.shape,
        ) or (answer.endswith(f"a {one.speed} {one.colour} {one.shape} moves {one.direction}"))
    told = Clips(size=64, asks=("caption",), told=True)[0]
    assert told.images == () and told.turns[0][0] == f"{told.turns[0][1]} . describe the clip"
    with pytest.raises(UserError, match="a way of at most 24 pixels"):
        Clips(frames=10)


def test_a_clip_played_backwards_is_one_that_comes_as_often():
    # Of every axis and speed, the places where ways begin in one direction are those where they end in the other.
    clips, places = Clips(objects=(1, 1), side=CELL + 7, speeds=(1, 2), frames=4), {}
    for number in range(1024):
        (mover,) = clips.movers(number)
        ends = [min(s, s + 3 * v) for s, v in zip(mover.start, mover.step, strict=True)]
        places.setdefault((mover.speed, mover.direction), set()).add(
            ends["left right".count(mover.direction) == 0]
        )
    for speed, most in (("slow", 5), ("fast", 2)):
        for one, other in (("left", "right"), ("up", "down")):
            assert places[speed, one] == places[speed, other] == set(range(most))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_videos(kind):
    assert middles(8, 4) == [1, 3, 5, 7] and middles(7, 2) == [1, 5] and middles(2, 4) == [0, 1]
    np.testing.assert_array_equal(read_video(animation(kind), 4), CLIP[[1, 3, 5, 7]])
    np.testing.assert_array_equal(read_video(animation(kind, CLIP[:1]), 4), CLIP[:1])  # an image is one frame
    with pytest.raises(UserError, match="a damaged image"):
        read_video(
            animation("GIF", np.random.default_rng(0).integers(0, 256, CLIP.shape, np.uint8))[:-9000], 4
        )


def test_films_are_read_upright(tmp_path):
    data = film()
    frames = read_video(data, 4)
    assert frames.shape == (4, 32, 48, 3)
    assert np.abs(frames.astype(int) - CLIP[[1, 3, 5, 7]])[:, 4:12, 4:12].max() < 12  # the codec loses some
    assert np.abs(frames.astype(int) - CLIP[[1, 3, 5, 7]])[:, 20:, 20:].max() < 12
    assert read_video(data, 100).shape == (8, 32, 48, 3)
    # The camera was turned: a quarter clockwise shows it upright.
    at = data.index(IDENTITY, data.index(b"tkhd"))
    turn = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data[:at] + turn + data[at + len(turn) :])
    np.testing.assert_array_equal(read_video(tmp_path / "a.mp4", 4), np.rot90(frames, -1, axes=(1, 2)))


def test_of_a_trimmed_film_what_is_shown_is_read():
    data = film()
    at = data.index(b"elst") + 12  # behind version, flags and the number of edits: how long, from when
    assert struct.unpack(">I", data[at : at + 4]) == (1000,)
    half = data[:at] + struct.pack(">I", 500) + data[at + 4 :]
    np.testing.assert_array_equal(read_video(half, 100), read_video(data, 100)[:4])
    # Of a damaged one frames are missing with its edit list as without.
    packed = film(kind="avi")
    last = packed.rindex(b"00dc", 0, packed.index(b"idx1"))
    with pytest.raises(UserError, match="an image: a damaged video: 7 of its 8 frames are there"):
        read_video(packed[:last], 4)


def test_films_that_can_not_be_seen_are_told(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    for name, data, said in (
        ("empty.mp4", b"", "empty.mp4: an empty file"),
        ("cut.mp4", film()[:-900], "cut.mp4: neither an image nor a video that can be read"),
        ("text.mp4", b"text" * 99, "text.mp4: neither an image nor a video"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=said):
            read_video(tmp_path / name, 4)
    with pytest.raises(UserError, match="no such file"):
        read_video(tmp_path / "none.mp4", 4)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(UserError, match="no video in it, only audio"):
        read_video(tmp_path / "sound.wav", 4)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"text.mp4: reading a video needs PyAV: pip install -e '.\[video\]'"):
        read_video(tmp_path / "text.mp4", 4)


def test_frames_are_views():
    planner, one = Frames(patch=8, side=16, frames=4, count=3), Square(patch=8, side=16)
    media, spelled = planner.read(CLIP)
    assert media.patches.shape == (4, 4, 192) and spelled == [0, 1, 2]
    for view, frame in enumerate((1, 3, 5, 7)):
        np.testing.assert_array_equal(media.patches[view], one.read(CLIP[frame])[0].patches[0])
    short, _ = planner.read(CLIP[:2])
    assert short.grid.tolist() == [[2, 2], [2, 2], [0, 0], [0, 0]] and not short.patches[2:].any()
    np.testing.assert_array_equal(planner.read(CLIP[0])[0].patches[0], one.read(CLIP[0])[0].patches[0])
    with pytest.raises(UserError, match="a video without frames"):
        planner.read(CLIP[:0])
    for wrong in (CLIP[0, ..., 0], CLIP / 255.0, CLIP[..., :1]):
        with pytest.raises(UserError, match="an image is uint8"):
            planner.read(wrong)
    with pytest.raises(UserError, match="frames=0: at least 1"):
        Frames(patch=8, side=16, frames=0)


def test_videos_in_llavas_format(tmp_path):
    (tmp_path / "a.gif").write_bytes(animation("GIF"))
    (tmp_path / "b.png").write_bytes(animation("PNG", CLIP[:1]))

    entries = [
        entry("<video>\nwhat ?", "red", video="a.gif"),
        entry("<image>\nwhat ?", "red", video="a.gif"),
        entry("<video> is <image> ?", "red", video="a.gif", image="b.png"),
        entry("<image> is <image> ?", "red", video="a.gif", image="b.png"),
        entry("what is <video> ?", "red"),
    ]
    (tmp_path / "some.json").write_text(json.dumps(entries))
    source = LlavaFiles(str(tmp_path / "some.json"))
    assert source[0].turns == source[1].turns == (("<image>\nwhat ?", "red"),)
    assert [name[-5:] for name in source[2].images] == ["a.gif", "b.png"]
    assert source[4].turns[0][0] == "what is <video> ?"  # words, as there is no video
    with pytest.raises(UserError, match="entry 3: 2 <image> in the questions, but 1 images"):
        source[3]
    planner = Frames(patch=8, side=16, frames=4)
    batch = Conversations(source, planner, 24, images=2, shuffle=False).take(np.arange(3))
    assert (batch["grid"][:, :, :, 0] > 0).sum(2).tolist() == [[4, 0], [4, 0], [4, 1]]
    np.testing.assert_array_equal(batch["patches"][0, 0], planner.read(CLIP)[0].patches)
