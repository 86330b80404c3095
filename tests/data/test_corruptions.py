"""Corrupted images: what each kind does to a known image, and records that depend on their number alone."""

import numpy as np
import pytest

from research.config import build, of
from research.data.corruptions import CORRUPTIONS, CorruptedImages, corrupt_image
from research.data.images import ImageDataset
from research.errors import UserError

GREY = np.zeros((40, 40, 3), np.float32)  # 0.5 of 1


def apply(image, kind, severity, seed=0, strengths="imagenet_c"):
    return corrupt_image(image, kind, severity, np.random.RandomState(seed), strengths)


def unit(image):
    return (image.astype(np.float64) + 1) / 2


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_severity_is_an_image_and_worse_than_the_one_before(kind):
    test = ImageDataset(split="test", shuffle=False)
    images = test.take(np.arange(20))["images"]
    for strengths in ("imagenet_c", "cifar_c"):
        errors = []
        for severity in range(1, 6):
            bad = np.stack([apply(im, kind, severity, i, strengths) for i, im in enumerate(images)])
            assert bad.shape == images.shape and bad.dtype == np.float32
            assert bad.min() >= -1 and bad.max() <= 1
            errors.append(float(np.mean(np.square(bad - images))))
        assert errors[4] > errors[0]
        # Neighbouring severities of motion blur, defocus and pixelate are alike on 8 x 8 pixels.
        if kind not in ("motion_blur", "defocus_blur", "pixelate"):
            assert errors == sorted(errors)


def test_noise_has_the_stated_size():
    # 4800 values: a standard deviation is known to 1 %, a share of 0.27 to 2.4 %; clipping cuts little of it.
    assert np.std(unit(apply(GREY, "gaussian_noise", 2))) == pytest.approx(0.12, rel=0.04)
    assert np.std(unit(apply(GREY, "speckle_noise", 1))) == pytest.approx(0.5 * 0.15, rel=0.04)
    shot = unit(apply(GREY, "shot_noise", 1))  # Poisson of mean 30, in units of 1/60
    assert np.std(shot) == pytest.approx(30**0.5 / 60, rel=0.04)
    np.testing.assert_allclose(shot * 60, np.round(shot * 60), atol=1e-4)
    impulse = apply(GREY, "impulse_noise", 5)
    assert set(np.unique(impulse)) == {-1, 0, 1}
    assert np.mean(impulse != 0) == pytest.approx(0.27, rel=0.1)
    assert np.mean(impulse[impulse != 0]) == pytest.approx(0.0, abs=0.1)


def test_blurs_spread_a_point_and_keep_its_sum():
    image = np.full((41, 41, 1), -1.0, np.float32)
    image[20, 20] = 1.0
    across = np.arange(41) - 20

    def moments(kind, severity, seed=0):
        spread = unit(apply(image, kind, severity, seed))[..., 0]
        assert spread.sum() == pytest.approx(1.0, abs=1e-3)
        return [
            spread.sum(0) @ across,
            spread.sum(1) @ across,
            spread.sum(0) @ across**2,
            spread.sum(1) @ across**2,
        ]

    # A Gaussian of 2 pixels has variance 4 in both directions; float32 of values in [-1, 1] costs 1e-7 a pixel.
    np.testing.assert_allclose(moments("gaussian_blur", 2), [0, 0, 4, 4], atol=0.05)
    # The disk of radius 3 has rows of 7, 5, 5 and 1 pixels at distances 0 to 3: 2 (5 + 4 * 5 + 9 * 1) / 29 = 2.34.
    np.testing.assert_allclose(moments("defocus_blur", 1), [0, 0, 2.345, 2.345], atol=0.05)
    # One-sided: the mean of |distance| of a normal of sigma 3 is 3 * 0.798, along the angle of the draw.
    angle = np.deg2rad(np.random.RandomState(5).uniform(-45, 45))
    x, y, *_ = moments("motion_blur", 1, 5)
    np.testing.assert_allclose([x, y], 2.394 * np.array([np.cos(angle), np.sin(angle)]), atol=0.15)
    flat = np.random.RandomState(0).uniform(-1, 1, (1, 1, 3)).astype(np.float32) * np.ones(
        (9, 9, 1), np.float32
    )
    for kind in ("gaussian_blur", "defocus_blur", "motion_blur", "pixelate", "contrast"):
        np.testing.assert_allclose(apply(flat, kind, 5), flat, atol=1e-6)


def test_light():
    image = np.broadcast_to(np.float32([-0.6, -0.2, 0.2]), (2, 2, 3))  # 0.2, 0.4, 0.6 of 1
    # V = 0.6 becomes 0.8 at severity 2, and the ratios stay 1 : 2 : 3.
    np.testing.assert_allclose(
        unit(apply(image, "brightness", 2))[0, 0], np.array([1, 2, 3]) * 0.8 / 3, atol=1e-6
    )
    black = np.full((2, 2, 3), -1, np.float32)
    np.testing.assert_allclose(unit(apply(black, "brightness", 5)), 0.5, atol=1e-6)
    two = np.float32([-1, 1]).reshape(1, 2, 1)  # mean 0.5, factor 0.1 at severity 4
    np.testing.assert_allclose(unit(apply(two, "contrast", 4))[0, :, 0], [0.45, 0.55], atol=1e-6)


def test_digital():
    # 8 x 8 at factor 0.5: means of 2 x 2 pixels, repeated.
    image = np.random.RandomState(1).uniform(-1, 1, (8, 8, 1)).astype(np.float32)
    means = image.reshape(4, 2, 4, 2).mean(axis=(1, 3)).repeat(2, 0).repeat(2, 1)
    np.testing.assert_allclose(apply(image, "pixelate", 2)[..., 0], means, atol=1e-6)
    # JPEG keeps the mean of a block to its step of the first coefficient, and loses more at a lower quality.
    smooth = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8, 1)
    assert abs(float(np.mean(apply(smooth, "jpeg", 1) - smooth))) < 0.05
    colour = np.random.RandomState(1).uniform(-1, 1, (16, 16, 3)).astype(np.float32)
    assert apply(colour, "jpeg", 5).shape == colour.shape


def test_a_record_depends_on_its_number_alone():
    test = ImageDataset(split="test", shuffle=False)
    noisy = build(of(CorruptedImages, data=of(ImageDataset, split="test", shuffle=False), kind="shot_noise"))
    whole = noisy.take(np.arange(183))
    np.testing.assert_array_equal(noisy.take(np.asarray([7, 3]))["images"], whole["images"][[7, 3]])
    batches = list(noisy.batches(0, 100, epochs=1))
    np.testing.assert_array_equal(np.concatenate([b["images"] for b in batches])[:183], whole["images"])
    assert [float(b["weights"].sum()) for b in batches] == [100, 83]
    np.testing.assert_array_equal(whole["labels"], test.take(np.arange(183))["labels"])
    assert len(noisy) == len(test) and noisy.element_spec() == test.element_spec()
    for other in (
        CorruptedImages(test, "shot_noise", seed=1),
        CorruptedImages(test, "speckle_noise"),
        CorruptedImages(test, "shot_noise", strengths="cifar_c"),
    ):
        assert (other.take(np.arange(9))["images"] != whole["images"][:9]).any()
    # The second epoch has noise of its own.
    assert (noisy.take(np.asarray([183]))["images"] != whole["images"][:1]).any()


def test_what_can_not_be_is_told():
    test = ImageDataset(split="test")
    for fields, told in (
        (dict(kind="gausian_noise"), "no such corruption; did you mean gaussian_noise"),
        (dict(kind="jpeg", severity=6), "severity 6: from 1 to 5"),
        (dict(kind="jpeg", strengths="mnist_c"), "strengths 'mnist_c': there are imagenet_c, cifar_c"),
        (dict(kind="jpeg", seed=-1), "seed -1: from 0"),
    ):
        with pytest.raises(UserError, match=told):
            CorruptedImages(test, **fields)

    class Spectra(ImageDataset):
        def take(self, numbers):
            return {"images": np.zeros((len(numbers), 4, 4, 5), np.float32)}

    with pytest.raises(UserError, match="jpeg: images have 5 channels; JPEG stores 1 or 3"):
        CorruptedImages(Spectra(split="test"), "jpeg").take(np.arange(2))
