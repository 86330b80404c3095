import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits
from tensorflow_datasets.core import constants

from research.config import build, of
from research.data.images import ImageDataset, _resized
from research.errors import UserError


def epoch(dataset):
    return dataset.take(np.arange(len(dataset)))


def test_digits_are_all_there_and_splits_are_disjoint():
    parts = [epoch(ImageDataset("digits", split, shuffle=False)) for split in ("train", "validation", "test")]
    assert [len(p["labels"]) for p in parts] == [1429, 185, 183]
    raw, labels = load_digits(return_X_y=True)
    got = sorted(
        (bytes(((image + 1) * 8).astype(np.uint8)), int(label))
        for part in parts
        for image, label in zip(part["images"], part["labels"], strict=True)
    )
    assert got == sorted((bytes(r.astype(np.uint8)), int(n)) for r, n in zip(raw, labels, strict=True))
    for part in parts:
        assert part["images"].min() == -1 and part["images"].max() == 1
        # Every tenth image of each class, so no class has more than one image too many.
    validation, test = (np.bincount(part["labels"]) for part in parts[1:])
    np.testing.assert_array_equal(validation, -(-np.bincount(labels) // 10))
    np.testing.assert_array_equal(test, (np.bincount(labels) + 8) // 10)


def test_batches_and_order():
    dataset = build(of(ImageDataset, source="digits", split="test"))
    spec = dataset.element_spec()
    batch = next(dataset.batches(0, 6))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: ((6, *s.shape), s.dtype) for k, s in spec.items()
    }
    assert spec["images"].shape == (8, 8, 1)
    first, second = (dataset.take(np.arange(183 * e, 183 * (e + 1)))["images"] for e in range(2))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(second, axis=0))
    halves = [next(dataset.batches(180, 6, rows=range(k, 6, 2)))["images"] for k in range(2)]
    np.testing.assert_array_equal(np.stack(halves, 1).reshape(6, 8, 8, 1)[:3], first[180:])
    batches = list(dataset.batches(0, 100, epochs=1))
    assert [b["weights"].sum() for b in batches] == [100, 83]
    assert dataset.num_classes == 10


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Images of two sizes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(4):
            file = io.BytesIO()
            Image.new("RGB", (4, 4 + 2 * (i // 2)), (0, 51 * i, 255)).save(file, "png")
            file.seek(0)
            yield i, {"image": file, "label": i % 3}


def test_tfds_images(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    dataset = ImageDataset("tfds:tiny_images", "train", size=4, shuffle=False)
    batch = epoch(dataset)
    assert batch["images"].shape == (4, 4, 4, 3)
    assert batch["labels"].tolist() == [0, 1, 2, 0]
    # 51 i / 127.5 - 1 = 0.4 i - 1
    np.testing.assert_allclose(batch["images"][:, 0, 0], [[-1, 0.4 * i - 1, 1] for i in range(4)], atol=1e-6)
    assert dataset.num_classes == 3
    with pytest.raises(UserError, match=r"image 2 has shape \(6, 4, 3\), the first one \(4, 4, 3\); size="):
        epoch(ImageDataset("tfds:tiny_images", "train", shuffle=False))
    with pytest.raises(UserError, match=r"no field 'imgae'; did you mean image\?"):
        ImageDataset("tfds:tiny_images", image_key="imgae").prepare()
    with pytest.raises(UserError, match=r"label is int64\[\], not an image uint8\[h, w, c\]"):
        epoch(ImageDataset("tfds:tiny_images", image_key="label"))
    with pytest.raises(UserError, match=r"no split 'tran'; it has train; did you mean train\?"):
        ImageDataset("tfds:tiny_images", "tran").prepare()


def test_resizing_cuts_the_middle():
    image = np.zeros((4, 8, 1), np.float32)
    image[:, :2], image[:, 6:] = -1, 1
    # The middle four columns are 2 to 5, all zero.
    np.testing.assert_array_equal(_resized(image, 4), np.zeros((4, 4, 1)))
    assert _resized(image, 2).shape == (2, 2, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "digit"}, r"images come from digits or tfds:NAME; did you mean digits\?"),
        ({"split": "valid"}, r"digits: no split 'valid'; it has train, validation, test"),
        ({"size": 0}, "size 0: at least one pixel is expected"),
        ({"seed": 1 << 32}, "seed 4294967296: from 0"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(UserError, match=message):
        ImageDataset(**fields)
