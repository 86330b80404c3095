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

Size = tuple[int, int]  # width, height

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


def shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """A large image uint8[h, w, 3] averaged by a whole factor, to a long side of `_GAP` * side or more; others as
    they are."""
    factor = int(max(image.shape) / (_GAP * side))
    if image.shape[0] * image.shape[1] <= _LARGE or factor < 2:
        return image
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(
            lambda strip: np.asarray(Image.fromarray(strip).reduce(factor)), _strips(image, factor)
        )
        return np.concatenate(list(parts))


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
