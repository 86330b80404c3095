"""A checkpoint from somebody else is data: nothing in it runs, and nothing outside of it is read.

The same of weights and HF directories: tests/interop/test_files.py, test_workdir.py; of sweeps: test_sweep.py.
"""

import json
import pickle

import jax.numpy as jnp
import pytest

from research.errors import UserError
from research.training import checkpoint_files as files
from research.training.checkpoints import Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint, in a directory beside a file that is none of its business."""
    (tmp_path / "secret").write_text("secret")
    checkpoints = Checkpoints(tmp_path / "checkpoints", asynchronous=False, warn=print)
    checkpoints.save(1, {"x": jnp.arange(4.0)}, {"records": 8})
    checkpoints.close()
    return tmp_path / "checkpoints" / "1"


def rewritten(checkpoint, **changes):
    """Its manifest with other entries and a checksum that fits, as whoever can write files can."""
    content = json.loads((checkpoint / files.MANIFEST).read_bytes())["checkpoint"]
    files.write_manifest(checkpoint, content | changes)


LEAF = {"shape": [4], "dtype": "float32", "impl": None}


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "x/../../secret", "x//y", "x\\..", "x\0", "."]
)
@pytest.mark.parametrize("kind", ["leaves", "files"])
def test_names_stay_inside(checkpoint, kind, name):
    rewritten(checkpoint, **{kind: {name: LEAF if kind == "leaves" else [6, 0]}})
    with pytest.raises(UserError, match="names .* which is no name inside of it"):
        files.checkpoint_of_step(checkpoint.parent, 1)


@pytest.mark.parametrize("target", ["../../../secret", "/etc"])
def test_links_are_not_followed(checkpoint, target):
    (checkpoint / files.STATE / "link").symlink_to(target)
    with pytest.raises(UserError, match="state/link is a link"):
        files.checkpoint_of_step(checkpoint.parent, 1)


class Runs:
    """What a pickle does when it is read."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


@pytest.mark.parametrize("place", ["manifest.json", "state/_METADATA", "state/manifest.ocdbt"])
def test_a_pickle_is_not_read(checkpoint, place):
    (checkpoint / place).write_bytes(pickle.dumps(Runs()))
    if place != files.MANIFEST:
        rewritten(checkpoint, files=files.checksums(checkpoint))
    with pytest.raises(Exception) as caught:
        found = files.newest_intact(checkpoint.parent, print)
        files.read_arrays(*found, files.stored_leaves(found[1]))
    assert not isinstance(caught.value, pytest.fail.Exception)
