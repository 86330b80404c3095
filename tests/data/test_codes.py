import numpy as np
import pytest

from research.config import build, of
from research.data.codes import Codebook, CodeDataset
from research.data.images import ImageDataset
from research.data.photographs import PICTURES, PhotographDataset
from research.errors import UserError


def digits(split="train"):
    dataset = ImageDataset("digits", split, shuffle=False)
    return dataset.take(np.arange(len(dataset)))["images"]


def test_as_many_codes_as_grey_levels_lose_nothing():
    """Digits have 17 levels, k / 8 - 1: with one code for each, k-means finds them, and images return exactly."""
    codebook = Codebook.fit(digits()[:100], patch=1, size=17)
    np.testing.assert_array_equal(codebook.centres.reshape(-1), np.arange(17) / 8 - 1)
    images = digits("test")
    codes = codebook.encode(images)
    np.testing.assert_array_equal(codes, (images[..., 0] + 1) * 8)  # from dark to bright
    np.testing.assert_array_equal(codebook.decode(codes), images)


def test_patches_are_read_in_raster_order():
    # Two codes: a bright left column, and a bright bottom row.
    centres = np.array([[[[1.0], [0.0]], [[1.0], [0.0]]], [[[0.0], [0.0]], [[1.0], [1.0]]]], np.float32)
    codes = np.array([[[0, 1, 1], [1, 0, 0]]], np.int32)
    image = np.array(
        [[1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0]], np.float32
    )
    codebook = Codebook(centres)
    np.testing.assert_array_equal(codebook.decode(codes)[0, ..., 0], image)
    np.testing.assert_array_equal(codebook.encode(image[None, ..., None]), codes)


def test_the_codebook_that_ships():
    codebook = Codebook.load()
    assert (codebook.size, codebook.patch, codebook.centres.shape[-1]) == (256, 2, 1)
    codes = np.random.default_rng(0).integers(0, 256, (3, 4, 5)).astype(np.int32)
    np.testing.assert_array_equal(codebook.encode(codebook.decode(codes)), codes)
    for split, decibels in (("train", 32.5), ("test", 33.0)):
        data = PhotographDataset(split, shuffle=False)
        images = data.take(np.arange(0, len(data), len(data) // 50))["images"]
        error = np.mean((codebook.decode(codebook.encode(images)) - images) ** 2)
        assert 10 * np.log10(4 / error) > decibels  # peak signal-to-noise ratio; the range is 2
    # Nearest: no other centre is nearer to any patch.
    patch = images[:1, :2, :2]
    distances = np.sum((codebook.centres - patch) ** 2, axis=(1, 2, 3))
    assert codebook.encode(patch).item() == np.argmin(distances)


def test_saving_is_exact(tmp_path):
    codebook = Codebook.fit(digits()[:50], patch=2, size=12, seed=3)
    codebook.save(tmp_path / "codes.json")
    np.testing.assert_array_equal(Codebook.load(tmp_path / "codes.json").centres, codebook.centres)


def test_language_batches_of_codes(tmp_path):
    dataset = build(of(CodeDataset, images=of(PhotographDataset, split="test", size=8, shuffle=False)))
    batch = dataset.take(np.arange(len(dataset)))
    images = dataset.images.take(np.arange(len(dataset)))
    codes = Codebook.load().encode(images["images"]).reshape(-1, 16)
    np.testing.assert_array_equal(batch["targets"], codes)
    np.testing.assert_array_equal(batch["tokens"][:, 0], 256 + images["labels"])
    np.testing.assert_array_equal(batch["tokens"][:, 1:], codes[:, :-1])
    assert np.all(batch["target_bytes"] == 4) and np.all(batch["positions"] == np.arange(16))
    spec = dataset.element_spec()
    assert {k: (v.shape[1:], v.dtype) for k, v in batch.items()} == {
        k: (s.shape, s.dtype) for k, s in spec.items()
    }
    assert dataset.unconditional == 256 + len(PICTURES)


def test_every_epoch_drops_its_own_share_of_the_classes():
    dataset = CodeDataset(PhotographDataset("test", size=8), drop=0.25, seed=1)
    size = len(dataset)
    first, second = (
        dataset.take(np.arange(size * e, size * (e + 1)))["tokens"][:, 0] == 264 for e in range(2)
    )
    assert first.sum() == second.sum() == round(0.25 * size)
    assert not np.array_equal(first, second)
    some = dataset.take(np.array([3, size + 5]))["tokens"][:, 0] == 264
    assert some.tolist() == [first[3], second[5]]


def test_the_last_batch_of_a_pass_is_padded():
    dataset = CodeDataset(PhotographDataset("test", size=8, shuffle=False))
    last = list(dataset.batches(0, len(dataset) - 1, epochs=1))[-1]
    assert last["weights"].sum() == 16 and np.all(last["weights"][0] == 1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Codebook.load("nowhere.json"), "codebook nowhere.json does not exist"),
        (
            lambda: Codebook.fit(np.zeros((1, 4, 4, 1), np.float32), 2, 3),
            "3 codes can't be fitted to 1 different",
        ),
        (
            lambda: Codebook.load().encode(np.zeros((1, 3, 4, 1), np.float32)),
            "patches of 2 x 2 don't tile them",
        ),
        (
            lambda: Codebook.load().encode(np.zeros((1, 4, 4, 3), np.float32)),
            "images of 3 channels, a codebook of 1",
        ),
        (lambda: CodeDataset(PhotographDataset("test"), drop=2.0), "drop 2.0: a share from 0 to 1"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_file_that_is_no_codebook(tmp_path):
    for text in ("[1]", "{}", '{"centres": [[1, 2]]}', "no"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match="x.json is no codebook"):
            Codebook.load(tmp_path / "x.json")
