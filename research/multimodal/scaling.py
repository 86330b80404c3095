"""Images scaled for a tower by Pillow's bicubic filter; photographs in strips, on several threads.

Pillow keeps four bytes of a pixel, filters along one axis, rounds, and filters along the other. So a strip of rows can
become such an image, be averaged and filtered along its rows while it is in a core's cache; what is left of all strips
is then filtered along columns, some on each thread. Pillow holds Python's lock in none of it, and of the whole it makes
the same, to the bit where it too begins with rows, as it does unless an image is tall.
"""

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from research.errors import UserError

Size = tuple[int, int]  # width, height
Colour = tuple[float, float, float]  # in [0, 1]

_LARGE = 2**22  # pixels
_GAP = 1.4
_STRIP = 3 * 2**19  # pixels: few enough for a cache, enough to keep a thread from Python for a while
_THREADS = min(os.cpu_count() or 1, 4)


def scaled(image: np.ndarray, sizes: Iterable[Size], exact: bool = False) -> dict[Size, np.ndarray]:
    """uint8[h, w, 3] -> the image in every size, uint8[height, width, 3].

    Unless that is to be exact, an image that shrinks to less than a sixth is averaged by whole factors first, as far as
    leaves it thrice the size; one of over 4 megapixels, once for all sizes, as far as leaves it 1.4 times the size.
    That makes a photograph cheap. It moves a pixel of a picture of 5 or 12 megapixels (photographs, enlarged, with and
    without noise of up to 12) by 0.15 to 0.7 of 255 in the mean, where bilinear filtering moves it by 0.2 to 0.6; of
    noise alone by 1.3 to 5.7, and by 0.7 to 3.4.
    """
    if image.shape[0] * image.shape[1] > _LARGE and not exact:
        return _in_strips(image, list(dict.fromkeys(sizes)))
    source, gap = Image.fromarray(image), None if exact else 3.0
    return {
        size: np.asarray(source.resize(size, Image.Resampling.BICUBIC, reducing_gap=gap))
        for size in dict.fromkeys(sizes)
    }


def squared(image: np.ndarray, side: int, colour: Colour) -> np.ndarray:
    """uint8[h, w, 3] -> `in_square` of it; where that would be over 4 megapixels, and more than 2.8 * side wide, in its
    size uint8[side, side, 3] already: averaged by one whole factor, as far as leaves it 1.4 times the size."""
    longest = max(image.shape[:2])
    factor = int(longest / (_GAP * side))
    if longest**2 <= _LARGE or factor < 2:
        return in_square(image, colour)
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(
            lambda strip: np.asarray(Image.fromarray(strip).reduce(factor)), _strips(image, factor)
        )
        averaged = np.concatenate(list(parts))
    filling, starts, places, ends = _bytes(colour), [], [], []
    for axis, length in enumerate(image.shape[:2]):
        begin = (longest - length) // 2
        place = -(-begin // factor)
        # The image's first pixel stands at a whole place, and the square begins where that puts it.
        starts.append((place * factor - begin) / factor)
        ends.append((place * factor - begin + longest) / factor)
        places.append(slice(place, place + averaged.shape[axis]))
        share = length % factor / factor
        if share and length < longest:  # of the last pixel; what is left of it is the square's
            last = averaged[(slice(None),) * axis + (-1,)]
            last[...] = np.round(last * share + filling * (1 - share))
    height, width = (max(math.ceil(end), place.stop) for end, place in zip(ends, places, strict=True))
    canvas = np.broadcast_to(filling, (height, width, 3)).copy()
    canvas[tuple(places)] = averaged
    extent = (*starts[::-1], *ends[::-1])
    return np.asarray(Image.fromarray(canvas).resize((side, side), Image.Resampling.BICUBIC, extent))


def in_square(image: np.ndarray, colour: Colour) -> np.ndarray:
    """uint8[h, w, 3] -> the image in the middle of a square of a colour in [0, 1]. Raises UserError where that
    would take over 3 GB."""
    height, width = image.shape[:2]
    side = max(height, width)
    if side > 2**15:
        raise UserError(
            f"an image of {width}x{height} pixels: a square around it would be over {2**15} pixels wide"
        )
    square = np.broadcast_to(_bytes(colour), (side, side, 3)).copy()
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _bytes(colour: Colour) -> np.ndarray:
    """uint8[3]."""
    return np.uint8(np.float32(colour) * 255)


def _in_strips(image: np.ndarray, sizes: list[Size]) -> dict[Size, np.ndarray]:
    height, width = image.shape[:2]
    across, x_factors = _factors(width, [size[0] for size in sizes])
    down, y_factors = _factors(height, [size[1] for size in sizes])
    plan = list(zip(sizes, x_factors, y_factors, strict=True))
    done = {(w, h): np.empty((h, w, 3), np.uint8) for w, h in sizes}

    def along_rows(strip: np.ndarray) -> list[Image.Image]:
        """For every size, a strip of its width."""
        source, parts = Image.fromarray(strip).reduce((across, down)), []
        for (w, _), x, y in plan:
            part = source.reduce((x, y)) if x * y > 1 else source
            parts.append(_filtered(part, (w, part.height), (width / (across * x), part.height)))
        return parts

    def along_columns(number: int, left: int, right: int) -> None:
        """Columns `left` to `right` of a size, of its height."""
        size, _, y = plan[number]
        rows = [strip[number] for strip in strips]
        joined, top = Image.new("RGB", (right - left, sum(part.height for part in rows))), 0
        for part in rows:
            joined.paste(part, (-left, top))  # what does not fit falls off
            top += part.height
        box = joined.width, height / (down * y)
        done[size][:, left:right] = _filtered(joined, (joined.width, size[1]), box)

    with ThreadPoolExecutor(_THREADS) as pool:
        strips = list(pool.map(along_rows, _strips(image, down * math.lcm(*y_factors))))
        waiting = []
        for number, (w, _) in enumerate(sizes):
            edges = [w * k // _THREADS for k in range(_THREADS + 1)]
            pairs = zip(edges, edges[1:], strict=False)
            waiting += [pool.submit(along_columns, number, a, b) for a, b in pairs if a < b]
        for part in waiting:
            part.result()
    return done


def _factors(length: int, targets: list[int]) -> tuple[int, list[int]]:
    """By how much an axis is averaged, for all its targets at once, and then for each."""
    common = max(int(length / (_GAP * max(targets))), 1)
    left = -(-length // common)
    return common, [max(int(left / (_GAP * target)), 1) for target in targets]


def _strips(image: np.ndarray, unit: int) -> list[np.ndarray]:
    """Strips of a multiple of `unit` rows, but for the last."""
    rows = max(_STRIP // (image.shape[1] * unit), 1) * unit
    return [image[top : top + rows] for top in range(0, len(image), rows)]


def _filtered(image: Image.Image, size: Size, extent: tuple[float, float]) -> Image.Image:
    """`extent` of an image, from its corner, in a size: averaging may have made it longer, for the pixels left over."""
    return image.resize(size, Image.Resampling.BICUBIC, (0.0, 0.0, *extent))
