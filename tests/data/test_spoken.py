"""Spoken digits: deterministic records with their truth, spectra as a second way computes them, units, files."""

import numpy as np
import pytest
from scipy import signal
from scipy.io import wavfile

from research.data.codes import Codebook
from research.data.spoken import (
    UNITS,
    WORDS,
    Spectrograms,
    SpokenDigits,
    SpokenFiles,
    log_mel,
    mel_filters,
    unit_frames,
    units,
)
from research.errors import UserError

SOURCE = SpokenDigits(digits=(2, 3))


def test_a_record_is_a_function_of_its_number_split_and_seed():
    one, again = SOURCE[3], SpokenDigits(digits=(2, 3))[3]
    np.testing.assert_array_equal(one.wave, again.wave)
    assert one.wave.dtype == np.float32 and np.abs(one.wave).max() <= 1.0
    assert SOURCE.truth(3) == (one.digits, one.speaker) and 2 <= len(one.digits) <= 3
    others = SOURCE[4], SpokenDigits(split="test", digits=(2, 3))[3], SpokenDigits(seed=1, digits=(2, 3))[3]
    assert all(not np.array_equal(one.wave[:99], other.wave[:99]) for other in others)
    said = {SpokenDigits(num_speakers=3).truth(i) for i in range(300)}
    assert {digits for digits, _ in said} == {(d,) for d in range(10)} and {s for _, s in said} == {0, 1, 2}
    assert one.text == " ".join(WORDS[digit] for digit in one.digits)


def test_a_voice_has_its_pitch():
    # Voice 0 of 1 speaks at sqrt(90 * 230) = 143.9 Hz, 5 % around, falling from 1.05 to 0.95 of it: so the mean lag of
    # the greatest autocorrelation is 8000 / 143.9 = 55.6 samples, here over the lags of one period.
    source = SpokenDigits(num_speakers=1, noise=0.0)
    lags = []
    for number in range(20):
        wave = source[number].wave[800:1600].astype(np.float64)
        products = signal.correlate(wave, wave, "full")[len(wave) - 1 :]
        lags.append(45 + np.argmax(products[45:70]))
    assert abs(np.mean(lags) / 55.6 - 1) < 0.05


def test_log_mel_is_that_of_scipy():
    """The same spectra by scipy's short-time transform, of the pre-emphasised windows by linearity: a window minus its
    mean, and 0.97 times it one sample later."""
    wave = SOURCE[0].wave
    got = log_mel(wave)
    assert got.dtype == np.float32 and got.shape == (1 + (len(wave) - 200) // 80, 64)
    centred = wave.astype(np.float64) - wave.astype(np.float64).mean()
    want = np.empty_like(got)
    for row in range(len(got)):
        frame = signal.detrend(centred[80 * row : 80 * row + 200], type="constant")
        emphasised = signal.lfilter([1, -0.97], 1, frame, zi=[-0.97 * frame[0]])[0]
        window = signal.get_window("hann", 200, fftbins=False)
        _, density = signal.periodogram(emphasised, 8000, window, 256, False, scaling="density")
        # One-sided densities count both signs, but at the ends, and are divided by the rate and the window's power.
        power = density * 8000 * np.sum(window**2)
        power[1:-1] /= 2
        want[row] = np.log(np.maximum(power @ mel_filters(64), np.finfo(np.float32).eps))
    # float32 keeps 24 bits of numbers up to 16: half a unit is 5e-7.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    # A tone is loudest in the triangle that it is nearest to: 1000 Hz is 1000 mel (to 0.1), triangles 32.5 apart.
    tone = np.sin(2 * np.pi * 1000 * np.arange(800) / 8000)
    assert set(log_mel(tone).argmax(1)) == {round((1000.0 - 31.7) / 32.53) - 1}
    with pytest.raises(UserError, match="199 samples is shorter than a window of 200"):
        log_mel(wave[:199])
    with pytest.raises(UserError, match="128 mel bins"):
        mel_filters(128)


def test_units_are_nearest_centres():
    wave = SOURCE[1].wave
    codebook = Codebook.load(UNITS)
    assert codebook.centres.shape == (64, 1, 1, 64)
    got, frames = units(wave), unit_frames(wave)
    assert got.dtype == np.int32 and len(got) == len(log_mel(wave)) // 3 == len(frames)
    distance = np.sum((frames[:, None].astype(np.float64) - codebook.centres[:, 0, 0]) ** 2, axis=-1)
    np.testing.assert_array_equal(got, distance.argmin(1))
    np.testing.assert_array_equal(units(0.5 * wave), got)  # loudness is no part of them
    # Fitting is deterministic.
    small = [Codebook.fit(frames[:, None, None], patch=1, size=4).centres for _ in range(2)]
    np.testing.assert_array_equal(*small)
    assert set(units(wave, Codebook(small[0]))) == {0, 1, 2, 3}


def test_spectrograms_are_image_batches():
    data = Spectrograms(SpokenDigits(), frames=40)
    batch = data.take(np.array([0, 1, 65536]))
    for name, spec in data.element_spec().items():
        assert batch[name].shape == (3, *spec.shape) and batch[name].dtype == spec.dtype
    np.testing.assert_array_equal(batch["images"][0], batch["images"][2])
    assert batch["labels"][0] == data.source.truth(0)[0][0]
    assert (
        Spectrograms(SpokenDigits(), label="speaker").take(np.array([1]))["labels"] == data.source.truth(1)[1]
    )
    mel = log_mel(data.source[1].wave)[:40]
    image = batch["images"][1, :, :, 0]
    np.testing.assert_allclose(np.corrcoef(image[: len(mel)].ravel(), mel.ravel())[0, 1], 1, atol=1e-6)
    assert not image[len(mel) :].any()
    with pytest.raises(UserError, match="an utterance of [23] digits"):
        Spectrograms(SOURCE).take(np.array([0]))


def test_files_are_read_with_their_names(tmp_path):
    wave = (np.arange(400) - 200).astype(np.int16)
    for name in ("3_ann_0", "3_ann_1", "4_bob_2", "9_ann_8"):
        wavfile.write(tmp_path / f"{name}.wav", 8000, wave)
    (tmp_path / "notes.txt").write_text("not a recording")
    source = SpokenFiles(str(tmp_path))
    assert [(r.digits, r.speaker) for r in (source[i] for i in range(4))] == [
        ((3,), 0),
        ((3,), 0),
        ((4,), 1),
        ((9,), 0),
    ]
    np.testing.assert_array_equal(source[0].wave, wave.astype(np.float32) / 32768)
    sizes = {split: len(SpokenFiles(str(tmp_path), split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 2, "validation": 1, "test": 1} and source.num_speakers == 2
    wavfile.write(tmp_path / "5_bob_2.wav", 16000, wave)
    (tmp_path / "6_bob_2.wav").write_bytes(b"RIFF")
    whole = (tmp_path / "3_ann_0.wav").read_bytes()
    (tmp_path / "7_bob_2.wav").write_bytes(whole[:400])
    (tmp_path / "8_bob_2.wav").write_bytes(whole[:22] + b"\0\0" + whole[24:])  # no channels
    wrong = (5, "16000 Hz"), (6, "readable WAV file"), (7, "expected 844 bytes"), (8, "readable WAV file")
    for digit, message in wrong:
        folder = tmp_path / str(digit)
        folder.mkdir()
        (tmp_path / f"{digit}_bob_2.wav").rename(folder / f"{digit}_bob_2.wav")
        with pytest.raises(UserError, match=message):
            SpokenFiles(str(folder))[0]
    for path, message in (("missing", "no such folder"), (".", "no recording of the split test")):
        with pytest.raises(UserError, match=message):
            len(SpokenFiles(str(tmp_path / "5") if path == "." else path, "test"))


@pytest.mark.parametrize("wrong", [{"split": "all"}, {"size": 0}, {"digits": (3, 2)}, {"num_speakers": 0}])
def test_impossible_worlds_are_refused(wrong):
    with pytest.raises(UserError, match="spoken digits: "):
        SpokenDigits(**wrong)
