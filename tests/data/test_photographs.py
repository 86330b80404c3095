import numpy as np
import pytest

from research.data.photographs import PICTURES, PhotographDataset, pictures_in_grey
from research.errors import UserError


def test_crops_are_where_they_should_be_and_splits_share_no_pixel():
    pictures = pictures_in_grey()
    assert len(pictures) == len(PICTURES) == PhotographDataset().num_classes
    assert all(min(picture.shape) == 256 and abs(picture).max() <= 1 for picture in pictures)
    first = PhotographDataset("train", shuffle=False).take(np.arange(2))
    np.testing.assert_array_equal(first["images"][0, ..., 0], pictures[0][:32, :32])
    np.testing.assert_array_equal(first["images"][1, ..., 0], pictures[0][:32, 3:35])
    # The astronaut has 256 columns: 192 train, the test crops begin there and 32 further.
    test = PhotographDataset("test", shuffle=False)
    found = test.take(np.arange(3))["images"][..., 0]
    np.testing.assert_array_equal(found[0], pictures[0][:32, 192:224])
    np.testing.assert_array_equal(found[1], pictures[0][:32, 224:256])
    np.testing.assert_array_equal(found[2], pictures[0][32:64, 192:224])
    # (192 - 32) // 3 + 1 = 54 columns of crops and (256 - 32) // 3 + 1 = 75 rows; 2 x 8 in the test quarter.
    labels = [PhotographDataset(split, shuffle=False) for split in ("train", "test")]
    counts = [np.bincount(data.take(np.arange(len(data)))["labels"])[0] for data in labels]
    assert counts == [54 * 75, 2 * 8]


def test_every_epoch_has_every_crop_once_in_its_own_order():
    dataset = PhotographDataset("test", size=16)
    size = len(dataset)
    first, second = (dataset.take(np.arange(e * size, (e + 1) * size))["images"] for e in range(2))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.unique(first, axis=0), np.unique(second, axis=0))
    assert dataset.element_spec()["images"].shape == first.shape[1:] == (16, 16, 1)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(split="tran"), "no split 'tran'; it has train, test; did you mean train\\?"),
        (dict(size=65), "size 65: crops of photographs have 1 to 64 pixels"),
        (dict(seed=-1), "seed -1: from 0"),
    ],
)
def test_mistakes_are_told(fields, message):
    with pytest.raises(UserError, match=message):
        PhotographDataset(**fields)
