"""Damaged and hostile files end in one line and read nothing outside the directory."""

import errno
import json
import resource
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.errors import UserError
from research.interop import files
from research.interop.files import INDEX, SINGLE, TensorFiles, cast, new_directory, write_tensors
from research.interop.huggingface import load

TABLE = "model.embed_tokens.weight"


def header_of(path):
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def shard(directory):
    """The single file of a directory as two shards and an index."""
    tensors = load_file(directory / SINGLE)
    names = sorted(tensors)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / SINGLE).unlink()


def test_shards_hold_what_the_single_file_held(checkpoint):
    whole = load_file(checkpoint / SINGLE)
    shard(checkpoint)
    with TensorFiles(checkpoint) as tensors:
        assert sorted(tensors.names) == sorted(whole)
        for name, value in whole.items():
            assert tensors.shape(name) == value.shape
            np.testing.assert_array_equal(tensors.read(name), value)


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/../../outside.safetensors",
        "sub/a.safetensors",
        "..",
        ".hidden.safetensors",
        "a.bin",
        "a.safetensors\0",
        "a.safetensors\n",
        "..\\outside.safetensors",
        "",
    ],
)
def test_index_cannot_reach_outside(checkpoint, edit, file):
    shard(checkpoint)
    save_file({TABLE: np.zeros((19, 16), np.float32)}, checkpoint.parent / "outside.safetensors")
    index = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    edit(checkpoint / INDEX, weight_map={**index, TABLE: file})
    with pytest.raises(UserError, match="not the name of a safetensors file in this directory"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map must give the file"),
        ([1], "weight_map must give the file"),
        ({"x": 3}, "weight_map must give the file"),
        ({"x": "c.safetensors"}, "c.safetensors does not exist, but .*index.json names it"),
        ({"x": "a.safetensors"}, "index.json and a.safetensors disagree on lm|disagree on model"),
    ],
)
def test_index_that_is_wrong(checkpoint, edit, weight_map, message):
    shard(checkpoint)
    edit(checkpoint / INDEX, weight_map=weight_map)
    with pytest.raises(UserError, match=message):
        load(checkpoint)


def test_one_tensor_in_two_shards(checkpoint, edit):
    shard(checkpoint)
    tensors = load_file(checkpoint / "a.safetensors")
    name = next(iter(tensors))
    save_file({**load_file(checkpoint / "b.safetensors"), name: tensors[name]}, checkpoint / "b.safetensors")
    with pytest.raises(UserError, match=f"both hold {name}"):
        load(checkpoint)


@pytest.mark.parametrize("keep", [0, 7, 20, -1, -400])
def test_truncated_file(checkpoint, keep):
    content = (checkpoint / SINGLE).read_bytes()
    (checkpoint / SINGLE).write_bytes(content[:keep])
    with pytest.raises(UserError, match="model.safetensors is not a whole safetensors file"):
        load(checkpoint)


def test_header_that_lies(checkpoint):
    """About a tensor's shape, where its bytes are, its type, and about its own length."""
    path = checkpoint / SINGLE
    header, data = header_of(path)
    wide = {**header, TABLE: {**header[TABLE], "shape": [19, 1600]}}
    beyond = {**header, TABLE: {**header[TABLE], "data_offsets": [0, 10**15]}}
    for lie in (wide, beyond):
        with_header(path, lie, data)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load(checkpoint)
    # The same number of bytes in another shape: consistent in itself, so found by the model's shapes.
    with_header(path, {**header, TABLE: {**header[TABLE], "shape": [16, 19]}}, data)
    with pytest.raises(UserError, match=rf"{TABLE} is \[16, 19\] and config.json asks for \[19, 16\]"):
        load(checkpoint)
    path.write_bytes(struct.pack("<Q", 1 << 60) + data)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load(checkpoint)
    with_header(path, {**header, TABLE: {**header[TABLE], "dtype": "I32"}}, data)
    with pytest.raises(UserError, match=f"{TABLE} is stored as I32; supported: F32, F16, BF16"):
        load(checkpoint)


def test_pickle_is_never_read(checkpoint):
    (checkpoint / SINGLE).rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(
        UserError, match="pytorch_model.bin, which is pickle and is never read; .*save_pretrained"
    ):
        load(checkpoint)
    (checkpoint / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has neither model.safetensors nor model.safetensors.index.json"):
        load(checkpoint)


def test_cast_refuses_to_overflow():
    values = np.array([1.0, 70000.0, np.inf], np.float32)
    assert cast(values, "bfloat16", "x").dtype == ml_dtypes.bfloat16
    with pytest.raises(UserError, match="x has 1 values too large for float16"):  # 65504 is the largest
        cast(values, "float16", "x")
    with pytest.raises(UserError, match="x has 1 values too large for float16"):
        cast(values.astype(ml_dtypes.bfloat16), "float16", "x")
    np.testing.assert_array_equal(cast(values[:1].astype(np.float16), "float32", "x"), values[:1])


def test_shards_are_written_within_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SHARD_BYTES", 40)
    sizes = {"a": 16, "b": 24, "c": 4, "d": 48, "e": 4}  # 16 + 24 fit in 40; c alone; d exceeds alone; e
    write_tensors(tmp_path, sizes, lambda name: np.full(sizes[name] // 4, ord(name), np.float32))
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 96
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # whoever may read the index may read the tensors
    numbers = {name: file.split("-")[1] for name, file in index["weight_map"].items()}
    assert numbers == {"a": "00001", "b": "00001", "c": "00002", "d": "00003", "e": "00004"}
    with TensorFiles(tmp_path) as tensors:
        np.testing.assert_array_equal(tensors.read("c"), np.array([99.0], np.float32))


def test_new_directory_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), new_directory(tmp_path / "x" / "out", 1) as content:
        (content / "file").write_text("half")
        raise RuntimeError
    assert list((tmp_path / "x").iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="full exists already"), new_directory(tmp_path / "full", 1):
        pass
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty", 1) as content:
        (content / "file").touch()
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["file"]
    with (
        pytest.raises(UserError, match="no room for .*out: up to 7 bytes"),
        new_directory(tmp_path / "out", 7),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_file_system_that_refuses(tmp_path):
    """A real refusal by the kernel in the middle of the tensors: a limit on the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with (
            pytest.raises(UserError, match="out cannot be written: .*[Ff]ile too large"),
            new_directory(tmp_path / "out", 40_000) as content,
        ):
            write_tensors(content, {"a": 40_000}, lambda name: np.zeros(10_000, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
