"""Windows, splits that do not leak, whitening by training pixels alone."""

import dataclasses

import numpy as np
import pytest

from research.config import build, of
from research.data.scene_patches import (
    BlockSplit,
    RandomSplit,
    ScenePatches,
    Whitening,
    overlap,
    windows_cover,
)
from research.data.scenes import GeneratedScene, Scene
from research.errors import UserError

SCENE = GeneratedScene(height=36, width=30, bands=12, endmembers=4, classes=3, cells=24, noise=0.1)
SPLIT = BlockSplit(block=6, train=0.25, validation=0.25)


def window(pixel: tuple[int, int], size: int, shape: tuple[int, int]) -> set[tuple[int, int]]:
    """The pixels of the scene in a window, one by one."""
    rows, columns = (range(p - size // 2, p - size // 2 + size) for p in pixel)
    return {(r, c) for r in rows for c in columns if 0 <= r < shape[0] and 0 <= c < shape[1]}


def seen(parts: np.ndarray, part: int, size: int) -> set[tuple[int, int]]:
    pixels = [tuple(p) for p in np.argwhere(parts == part)]
    return set().union(*(window(p, size, parts.shape) for p in pixels))


@pytest.mark.parametrize("size", [3, 4])
def test_no_pixel_is_in_windows_of_two_parts_of_a_block_split(size):
    labels = SCENE.load().labels
    parts = SPLIT.parts(labels, size)
    train, validation, test = (seen(parts, part, size) for part in (1, 2, 3))
    assert train and not train & validation and not train & test and not validation & test
    assert overlap(parts, size) == 0.0
    for part in (1, 2, 3):
        assert set(labels[parts == part]) == {1, 2, 3}
    # Inner blocks keep (6 - size + 1)^2 of their 36 pixels.
    inner = parts[6:12, 6:12]
    assert np.sum(inner > 0) == (7 - size) ** 2


def test_windows_and_overlap_are_counted():
    size, labels = 4, SCENE.load().labels
    parts = RandomSplit(train=0.1, validation=0.0).parts(labels, size)
    train = seen(parts, 1, size)
    assert {tuple(p) for p in np.argwhere(windows_cover(parts == 1, size))} == train
    tests = [tuple(p) for p in np.argwhere(parts == 3)]
    touching = np.mean([bool(window(p, size, parts.shape) & train) for p in tests])
    assert overlap(parts, size) == pytest.approx(touching) and touching > 0.9


def test_random_split_is_stratified():
    labels = SCENE.load().labels.copy()
    labels[:2] = 0
    parts = RandomSplit(train=0.25, validation=0.5).parts(labels, 4)
    assert (parts[labels == 0] == 0).all() and (parts[labels > 0] > 0).all()
    for label in (1, 2, 3):
        count = np.sum(labels == label)
        found = np.bincount(parts[labels == label], minlength=4)[1:]
        assert found.tolist() == [
            round(count / 4),
            round(count / 2),
            count - round(count / 4) - round(count / 2),
        ]
    assert not np.array_equal(parts, RandomSplit(train=0.25, validation=0.5, seed=1).parts(labels, 4))


def test_only_training_pixels_are_whitened_by():
    data = ScenePatches(SCENE, SPLIT, 3, components=5)
    training = data.prepared.whitened[data.chosen].astype(np.float64)
    np.testing.assert_allclose(training.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.cov(training.T), np.eye(5), atol=1e-5)

    @dataclasses.dataclass(frozen=True)
    class Spoiled:
        """The scene with other spectra wherever it is not trained."""

        def load(self) -> Scene:
            scene = SCENE.load()
            return dataclasses.replace(
                scene, cube=np.where(data.chosen[..., None], scene.cube, 9.0 * scene.cube + 1.0)
            )

    spoiled = ScenePatches(Spoiled(), SPLIT, 3, components=5)
    np.testing.assert_array_equal(spoiled.prepared.whitened[data.chosen], data.prepared.whitened[data.chosen])
    assert not np.array_equal(spoiled.prepared.whitened, data.prepared.whitened)
    # Two bands by hand: variances 2 and 1/2 along (1, 1) and (1, -1), so 1 / sqrt(2 v) of their sum and difference.
    spectra = np.array([[1.0, 1.0], [-1.0, -1.0], [0.5, -0.5], [-0.5, 0.5]]) * np.sqrt(1.5)
    found = Whitening.fit(spectra + 3.0, 2)
    np.testing.assert_allclose(found.mean, [3.0, 3.0])
    np.testing.assert_allclose(np.abs(found.matrix), [[0.5, 1.0], [0.5, 1.0]])


def test_bands_are_whitened_one_by_one():
    data = ScenePatches(SCENE, SPLIT, 3, components=12, bands=True)
    training = data.prepared.whitened[data.chosen].astype(np.float64)
    np.testing.assert_allclose(training.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(training.std(0), 1.0, atol=1e-5)
    # Bands are not mixed: each is its own, scaled.
    cube = SCENE.load().cube[data.chosen].astype(np.float64)
    np.testing.assert_allclose(training, (cube - cube.mean(0)) / cube.std(0), atol=1e-4)
    with pytest.raises(UserError, match="components=5, and the scene has 12 bands"):
        len(ScenePatches(SCENE, SPLIT, 3, components=5, bands=True))


def test_records():
    data = build(
        of(
            ScenePatches,
            scene=of(GeneratedScene, **dataclasses.asdict(SCENE)),
            split=of(BlockSplit, block=6),
            num_classes=3,
            part="test",
            components=5,
        )
    )
    spec = data.element_spec()
    batch = next(data.batches(0, 8))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: ((8, *s.shape), s.dtype) for k, s in spec.items()
    }
    assert len(data) == np.sum(data.prepared.parts == 3)
    whole = dataclasses.replace(data, part="all", shuffle=False)
    images, labels = (whole.take(np.arange(len(whole)))[name] for name in ("images", "labels"))
    scene, whitened = data.prepared.scene, data.prepared.whitened
    np.testing.assert_array_equal(labels.reshape(36, 30), scene.labels - 1)
    np.testing.assert_array_equal(images[:, 2, 2].reshape(whitened.shape), whitened)
    pixel = 10 * 30 + 7
    np.testing.assert_array_equal(images[pixel], whitened[8:12, 5:9])
    # The upper left pixel has two rows and columns outside of the scene before it.
    np.testing.assert_array_equal(images[0], np.pad(whitened[:2, :2], ((2, 0), (2, 0), (0, 0))))
    first, second = (data.take(np.arange(len(data)) + e * len(data))["images"][:, 2, 2] for e in (0, 1))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(second, axis=0))


def test_wrong_splits_and_fields():
    labels = np.ones((8, 8), np.int32)
    labels[0, 0] = 2
    wrong = [
        (lambda: RandomSplit(train=0.6, validation=0.4), "train=0.6, validation=0.4: shares"),
        (lambda: RandomSplit().parts(labels, 4), "class 2 has 1 labelled pixels, too few"),
        (lambda: BlockSplit(block=3).parts(labels, 4), "windows of 4 pixels don't fit into such blocks"),
        (
            lambda: BlockSplit(block=4, draws=3).parts(labels, 4),
            "none of 3 ways to split the scene into blocks of 4",
        ),
        (lambda: ScenePatches(SCENE, SPLIT, 3, "tset"), r"no part 'tset'.*did you mean test\?"),
        (
            lambda: len(ScenePatches(SCENE, SPLIT, 4, components=5)),
            "generated scene, seed 0: 3 classes, but num_classes=4",
        ),
        (
            lambda: len(ScenePatches(SCENE, SPLIT, 3, components=13)),
            "components=13: .* of 12 bands have 1 to 12",
        ),
        (lambda: Whitening.fit(np.outer(np.arange(5.0), np.ones(3)), 2), "vary in 1 directions alone"),
        (
            lambda: len(ScenePatches(SCENE, RandomSplit(validation=0.0), 3, "validation", components=5)),
            "no pixel for validation",
        ),
    ]
    for call, message in wrong:
        with pytest.raises(UserError, match=message):
            call()
