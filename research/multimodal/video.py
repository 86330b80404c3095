"""Videos on their way to a model: files of all kinds, and the planner that takes a few frames of each.

Frames are the views of a video's media (`research.multimodal.media.Media`), and an image is a video of one frame. Films
need PyAV, the extra `video`; animated GIF, WebP, PNG and AVIF do not.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from research.errors import UserError
from research.multimodal.media import Media, Square, as_rgb, check_pixels, cut, name_of, opened, read_image
from research.paths import expand

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # Pillow's formats whose frames follow each other in time


def middles(total: int, count: int) -> list[int]:
    """The frames in the middle of `count` equal segments of `total`, or all where there are no more."""
    return (
        list(range(total)) if total <= count else [(2 * i + 1) * total // (2 * count) for i in range(count)]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frames(Square):
    """A video as `frames` views, each one frame squashed (or `padded`) to side x side; fewer where it has no more.

    Args:
        frames: T, the frames in the middle of as many equal segments.
    """

    frames: int

    def __post_init__(self):
        super().__post_init__()
        if self.frames < 1:
            raise UserError(f"Frames: frames={self.frames}: at least 1 is expected")

    @property
    def views(self) -> int:
        return self.frames

    def load(self, source: str | os.PathLike | bytes) -> np.ndarray:
        return read_video(source, self.frames)

    def read(self, image: np.ndarray) -> tuple[Media, list[int | str]]:
        """uint8[F, h, w, 3], or one frame of it -> media without B and I, and the spelling. Raises UserError for what
        is neither."""
        clip = image if image.ndim == 4 else image[None]
        if not len(clip):
            raise UserError("a video without frames")
        check_pixels(clip[0])
        (crop,) = self.plan(*clip.shape[2:0:-1])
        views = ((crop, cut(self.pad(clip[i]), [crop])[0]) for i in middles(len(clip), self.frames))
        return self.fill(views), self.spell((crop,))


def read_video(source: str | os.PathLike | bytes, count: int) -> np.ndarray:
    """A video, an animation or an image, a file or its bytes -> uint8[F, h, w, 3], F at most `count`: its `middles`.

    Only those are kept, so memory does not grow with a film's length; time does, as it is decoded from its beginning.

    Raises:
        UserError: no such file, nothing in it that can be seen, a damaged one, or PyAV is wanted and not there.
    """
    try:
        with opened(source) as file:
            kind = file.format
            if kind in ANIMATED and (total := getattr(file, "n_frames", 1)) > 1:
                return _stack([_still(file, i) for i in middles(total, count)], source)
    except UserError as error:
        if not isinstance(error.__cause__, UnidentifiedImageError):
            raise
        kind = None
    # Pillow knows an MPEG by its head, and can do no more.
    return _read_film(source, count) if kind in (None, "MPEG") else read_image(source)[None]


def _still(file: Any, number: int) -> np.ndarray:
    file.seek(number)
    return as_rgb(file)


def _read_film(source: str | os.PathLike | bytes, count: int) -> np.ndarray:
    total, declared = _packets(source)
    # A trimmed film still declares, and holds, what its edit list leaves out.
    if total < declared and (there := _packets(source, ignore_editlist="1")[0]) < declared:
        raise UserError(f"{name_of(source)}: a damaged video: {there} of its {declared} frames are there")
    frames: list[np.ndarray] = []
    while len(frames) < len(wanted := middles(total, count)):
        # A container may hold more than is shown; then what was decoded is what there is.
        with _film(source) as (container, stream):
            frames, total = _decode(container, stream, wanted)
    if not frames:
        raise UserError(f"{name_of(source)}: a video without frames")
    return _stack(frames, source)


def _packets(source: str | os.PathLike | bytes, **options: str) -> tuple[int, int]:
    """How many packets of frames a film has, and how many frames it declares, 0 where it does not."""
    with _film(source, **options) as (container, stream):
        # The last packet that comes is none, and says so by having no time.
        total = sum(packet.dts is not None or packet.size > 0 for packet in container.demux(stream))
        return total, stream.frames


def _decode(container: Any, stream: Any, wanted: Sequence[int]) -> tuple[list[np.ndarray], int]:
    """-> the frames with these numbers, ascending, and how many frames were decoded, up to the last of them."""
    frames, number = [], -1
    stream.thread_type = "AUTO"
    for number, frame in enumerate(container.decode(stream)):  # noqa: B007
        if number in wanted:
            turns = round(frame.rotation / 90)  # of a quarter against the clock
            frames.append(np.rot90(frame.to_ndarray(format="rgb24"), turns))
        if number == wanted[-1]:
            break
    return frames, number + 1


@contextlib.contextmanager
def _film(source: str | os.PathLike | bytes, **options: str) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and its first video stream. What is found wrong inside is a UserError. options: of FFmpeg's
    demuxer."""
    where, path = name_of(source), None if isinstance(source, bytes) else expand(source)
    try:
        import av
    except ImportError as error:
        raise UserError(f"{where}: reading a video needs PyAV: pip install -e '.[video]'") from error

    if not (len(source) if path is None else path.stat().st_size):
        raise UserError(f"{where}: an empty file")
    what = "neither an image nor a video that can be read"
    try:
        with av.open(io.BytesIO(source) if path is None else str(path), options=options) as container:
            what = "a damaged video"
            covers = av.stream.Disposition.attached_pic  # of an album
            streams = [stream for stream in container.streams.video if not stream.disposition & covers]
            if not streams:
                kinds = ", ".join(dict.fromkeys(stream.type for stream in container.streams)) or "nothing"
                raise UserError(f"{where}: no video in it, only {kinds}")
            yield container, streams[0]
    except av.error.FFmpegError as error:
        raise UserError(f"{where}: {what}: {error.strerror}") from error


def _stack(frames: list[np.ndarray], source: Any) -> np.ndarray:
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1 or 0 in next(iter(sizes)):
        listed = ", ".join(sorted(f"{width}x{height}" for height, width, _ in sizes))
        raise UserError(f"{name_of(source)}: frames of {listed} pixels")
    return np.ascontiguousarray(np.stack(frames))
