"""Generated scenes are linear mixtures of what they say; MATLAB files are read or refused in one line."""

import dataclasses

import numpy as np
import pytest
from scipy.io import savemat

from research.data.scenes import GeneratedScene, MatScene
from research.errors import UserError

SMALL = GeneratedScene(
    height=20, width=24, bands=40, endmembers=6, classes=4, cells=12, noise=0.0, shading=0.0
)


def test_a_generated_scene_is_a_linear_mixture():
    scene = SMALL.load()
    assert scene.generated and scene.name.startswith("generated")
    assert scene.cube.shape == (20, 24, 40) and scene.abundances.shape == (20, 24, 6)
    assert set(scene.labels.flat) == {1, 2, 3, 4} and scene.num_classes == 4
    assert scene.abundances.min() >= 0.0
    # Sums of 6 numbers below 1 in float32.
    np.testing.assert_allclose(scene.abundances.sum(-1), 1.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(scene.cube, scene.abundances @ scene.spectra, rtol=0, atol=1e-6)
    # Unmixing by least squares finds the shares again: 40 equations for 6 unknowns.
    spectra = scene.spectra.astype(np.float64)
    found, *_ = np.linalg.lstsq(spectra.T, scene.cube.reshape(-1, 40).T.astype(np.float64), rcond=None)
    error = np.abs(found.T - scene.abundances.reshape(-1, 6)).max()
    assert error < 1e-7 * 10 * np.linalg.cond(
        spectra
    )  # rounding of the cube, times what the spectra make of it
    # Smooth: the narrowest bump is a tenth of the range wide, so a step of 1/39 changes it by at most
    # 0.8 * 0.26 * 5 bumps, and second differences are an order below the range.
    assert np.abs(np.diff(scene.spectra, 2, axis=1)).max() < 0.15
    assert scene.spectra.min() >= 0.1 and scene.spectra.max() <= 0.9 + 1e-6


def test_shade_noise_seed_and_layout():
    clean, shaded = SMALL.load(), dataclasses.replace(SMALL, shading=0.2).load()
    ratio = shaded.cube / clean.cube
    np.testing.assert_allclose(ratio, ratio[..., :1] * np.ones(40), rtol=1e-5)  # one factor a pixel
    assert np.isclose(ratio[..., 0].std(), 0.2, rtol=1e-4)
    noisy = dataclasses.replace(SMALL, noise=0.1).load()
    # 19200 draws: their standard deviation is known to 0.5 %; four of these are allowed.
    assert np.isclose((noisy.cube - clean.cube).std(), 0.1, rtol=0.02)
    np.testing.assert_array_equal(dataclasses.replace(SMALL).load().cube, clean.cube)
    assert not np.array_equal(dataclasses.replace(SMALL, seed=1).load().labels, clean.labels)
    pure = dataclasses.replace(SMALL, layout="noise", variation=0.0, purity=1.0).load()
    assert set(pure.labels.flat) == {1, 2, 3, 4}
    # In the middle of an area nothing is mixed: there the abundance of the class's own endmember is 1.
    own = np.take_along_axis(pure.abundances, pure.labels[..., None] - 1, axis=-1)[..., 0]
    same = np.all(
        [np.roll(pure.labels, (r, c), (0, 1)) == pure.labels for r in (-1, 0, 1) for c in (-1, 0, 1)], axis=0
    )
    inside = same[1:-1, 1:-1]
    assert inside.any() and not inside.all()
    np.testing.assert_allclose(own[1:-1, 1:-1][inside], 1.0, atol=1e-6)
    assert own[1:-1, 1:-1][~inside].max() < 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"endmembers": 3}, r"GeneratedScene.endmembers: 3; each of 9 classes has its own"),
        ({"layout": "voronoy"}, r"'voronoy' is neither voronoi nor noise; did you mean voronoi\?"),
        ({"cells": 5}, "GeneratedScene.cells: 5"),
        ({"purity": 1.5}, "GeneratedScene.purity: 1.5"),
        ({"noise": -0.1}, "GeneratedScene.noise: -0.1 is negative"),
        ({"bands": 1}, "GeneratedScene.bands: 1; at least 2"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(UserError, match=message):
        GeneratedScene(**fields)


def test_matlab_files(tmp_path):
    cube = np.arange(2 * 3 * 5, dtype=np.uint16).reshape(2, 3, 5)
    truth = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    files = {
        name: str(tmp_path / f"{name}.mat") for name in ("cube", "truth", "both", "text", "short", "lost")
    }
    savemat(files["cube"], {"paviaU": cube})
    savemat(files["truth"], {"paviaU_gt": truth})
    savemat(
        files["both"], {"a": cube, "b": cube + 1.0, "nan": np.full((2, 3, 5), np.nan), "half": truth + 0.5}
    )
    savemat(files["short"], {"gt": truth[:1]})
    (tmp_path / "text.mat").write_text("no matrix")
    scene = MatScene(files["cube"], files["truth"]).load()
    np.testing.assert_array_equal(scene.cube, cube)
    np.testing.assert_array_equal(scene.labels, truth)
    assert (scene.cube.dtype, scene.labels.dtype) == (np.float32, np.int32)
    assert not scene.generated and scene.num_classes == 2 and scene.name == "cube"
    np.testing.assert_array_equal(MatScene(files["both"], files["truth"], "b").load().cube, cube + 1)
    with open(files["cube"], "rb") as file, open(tmp_path / "v73.mat", "wb") as new:
        header = bytearray(file.read(128))
        header[124:126] = b"\x00\x02"  # the version of MATLAB 7.3
        new.write(header)
    wrong = [
        ((files["lost"], files["truth"]), r"lost.mat: no such file"),
        ((files["text"], files["truth"]), r"text.mat: not a MATLAB file"),
        ((str(tmp_path / "v73.mat"), files["truth"]), r"a MATLAB 7.3 file, which is HDF5; save it with"),
        (
            (files["both"], files["truth"]),
            r"3 arrays have 3 axes, name one of them; it holds a \[2, 3, 5\], b",
        ),
        ((files["cube"], files["truth"], "PaviaU"), r"no array 'PaviaU'; it holds .*; did you mean paviaU\?"),
        ((files["both"], files["truth"], "half"), r"half is \[2, 3\], but 3 axes are expected"),
        ((files["cube"], files["short"]), r"short.mat: labels of 1x3 pixels, but .*cube.mat has 2x3"),
        ((files["both"], files["truth"], "nan"), r"30 values are NaN or infinite"),
        ((files["cube"], files["both"], None, "half"), r"labels are whole numbers, 0 where nothing is known"),
    ]
    for arguments, message in wrong:
        with pytest.raises(UserError, match=message):
            MatScene(*arguments).load()
