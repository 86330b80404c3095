"""One checkpoint on disk: its folder, its manifest, the check of every byte, and reading arrays from it.

A directory of checkpoints holds one folder a step:

    <step>/manifest.json    step, position in the data, metrics, every leaf, every file with size and CRC-32
    <step>/state/           the arrays, as Orbax writes them: a nested dict of the leaf names

Leaves are stored under their paths, never under Python types, so a checkpoint outlives a renamed class and
can be read in part.
"""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import UserError
from research.paths import expand
from research.training.paths import named_leaves, nested

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state"
REPLACED = ".replaced"


class Damaged(Exception):
    """A checkpoint whose files are not the ones that were written; the message is the reason."""


def describe(shape: tuple[int, ...], dtype: Any) -> str:
    """A leaf in a message: `float32[4, 8]`."""
    return f"{dtype}[{', '.join(map(str, shape))}]"


def mismatches(
    found: Mapping[str, Any], wanted: Mapping[str, Any], where: str, *, dtypes: bool = True
) -> str:
    """The first few differences between the leaves `found` in `where` and those `wanted`; empty if none.

    Both map names to values with `shape` and `dtype`. Without `dtypes` only names and shapes count.
    """
    lines = []
    for name in sorted(wanted.keys() | found.keys()):
        here = describe(wanted[name].shape, wanted[name].dtype) if name in wanted else None
        there = describe(found[name].shape, found[name].dtype) if name in found else None
        if there is None:
            lines.append(f"{name} {here} is missing from {where}")
        elif here is None:
            lines.append(f"{name} {there} of {where} is not expected here")
        elif tuple(found[name].shape) != tuple(wanted[name].shape) or (dtypes and here != there):
            lines.append(f"{name} is {there} in {where} but {here} here")
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    if any("/experts/" in line for line in lines):
        more += "; to change the number of experts: python -m experiments.upcycle CHECKPOINT --experts=... --output=..."
    return "; ".join(lines[:3]) + more


# Files


def local_directory(path: str | os.PathLike[str]) -> Path:
    """The path as a directory of a mounted file system; refuses `gs://` and the like, which cannot rename."""
    if "://" in str(path):
        raise UserError(f"{path} is not on a mounted file system: mount the bucket and name the mount point")
    return expand(path).absolute()


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file so that a reader, or a crash, sees the old content or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_failure(error: BaseException, target: str | Path, directory: Path, needed: int) -> BaseException:
    """What to raise when writing `target` (of `needed` bytes) below `directory` failed.

    A `UserError` for a full disk, with needed and free bytes, and for whatever else the operating system
    refused; otherwise the error itself, which is then a defect.
    """
    # Tensorstore and safetensors report the errno in words only.
    words = ("No space left on device", "Disk quota exceeded")
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(x in str(error) for x in words):
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        return UserError(f"no room for {target}: up to {needed} bytes are needed, {free} are free")
    if isinstance(error, OSError):
        return UserError(f"{target} cannot be written: {error}")
    return error


def sync_directory(path: Path) -> None:
    """Puts renames in a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path, *, sync: bool = False) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file; a CRC finds every change confined to 32 neighbouring bits."""
    size = crc = 0
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def checksums(directory: Path, *, sync: bool = False) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of every file but the manifest; with `sync` they are on the disk afterwards.

    Raises `Damaged` for a symbolic link, which would be read outside of the checkpoint.
    """
    entries = sorted((directory / STATE).rglob("*"))
    if link := next((path for path in entries if path.is_symlink()), None):
        raise Damaged(f"{link.relative_to(directory)} is a link; a checkpoint holds its own files")
    files = [path for path in entries if path.is_file()]
    names = [path.relative_to(directory).as_posix() for path in files]
    with ThreadPoolExecutor(8) as pool:
        sums = pool.map(lambda path: _checksum(path, sync=sync), files)
        return dict(zip(names, sums, strict=True))


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Writes the manifest, with its own checksum, atomically."""
    crc = zlib.crc32(_canonical(content).encode())
    write_atomically(directory / MANIFEST, json.dumps({"crc32": crc, "checkpoint": content}))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of one checkpoint, its own checksum verified. Raises `Damaged`."""
    try:
        outer = json.loads((directory / MANIFEST).read_bytes())
        content, crc = outer["checkpoint"], outer["crc32"]
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise Damaged(f"{MANIFEST} cannot be read") from None
    if crc != zlib.crc32(_canonical(content).encode()):
        raise Damaged(f"the checksum of {MANIFEST} differs")
    if content["format"] != FORMAT:
        raise UserError(f"checkpoint {directory} has format {content['format']}; this version reads {FORMAT}")
    for name in (*content["leaves"], *content["files"]):
        # Leaves become keys of the store, and where it is one of files, paths: none may lead out of the checkpoint.
        if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
            raise Damaged(f"{MANIFEST} names {name!r}, which is no name inside of it")
    return content


def verify(directory: Path) -> dict[str, Any]:
    """Reads every file of a checkpoint, compares it with the manifest and returns that. Raises `Damaged`."""
    content = read_manifest(directory)
    try:
        found = checksums(directory)
    except OSError as error:
        raise Damaged(f"{error.filename} cannot be read: {error.strerror}") from None
    for name, (size, crc) in content["files"].items():
        if name not in found:
            raise Damaged(f"{name} is missing")
        if found[name][0] != size:
            raise Damaged(f"{name} has {found[name][0]} bytes instead of {size}")
        if found[name][1] != crc:
            raise Damaged(f"the checksum of {name} differs")
    return content


def step_directories(directory: Path) -> dict[int, Path]:
    """The complete checkpoints of a directory by step, ascending."""
    if not directory.is_dir():
        return {}
    names = {path.name: path for path in directory.iterdir()}
    found = {int(name): path for name, path in names.items() if name.isascii() and name.isdigit()}
    for name, path in names.items():
        # A crash between the two renames that replace a checkpoint leaves only the old one, intact.
        if name.endswith(REPLACED) and (step := name.removesuffix(REPLACED)).isdigit():
            found.setdefault(int(step), path)
    return dict(sorted(found.items()))


def newest_intact(directory: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose bytes verify, with its manifest; `None` if there never was a checkpoint.

    Every damaged one on the way is named through `warn`. Raises `UserError` if all are damaged.
    """
    steps = step_directories(directory)
    damages = []
    for step in sorted(steps, reverse=True):
        try:
            found = steps[step], verify(steps[step])
        except Damaged as damage:
            damages.append(f"checkpoint {steps[step]} is damaged: {damage}")
            continue
        for line in damages:
            warn(f"{line}; using step {step} instead")
        return found
    if damages:
        raise UserError(
            f"no checkpoint in {directory} can be read ({'; '.join(damages[:3])}): "
            "put back a copy, or start in another workdir"
        )
    return None


def checkpoint_of_step(directory: Path, step: int) -> tuple[Path, dict[str, Any]]:
    """The verified checkpoint of one step and its manifest. Raises `UserError` if it is absent or damaged."""
    steps = step_directories(directory)
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise UserError(f"there is no checkpoint of step {step} in {directory}; there are: {known}")
    try:
        return steps[step], verify(steps[step])
    except Damaged as damage:
        raise UserError(f"checkpoint {steps[step]} is damaged: {damage}") from None


# Arrays


class _Leaf:
    """Shape and dtype of a stored leaf; `impl` is the generator of a typed PRNG key, whose data is stored."""

    def __init__(self, entry: dict[str, Any]):
        self.shape = tuple(entry["shape"])
        self.dtype = entry["dtype"]
        self.impl = entry["impl"]


def stored_leaves(manifest: dict[str, Any]) -> dict[str, _Leaf]:
    """The leaves of a checkpoint by name, each with `shape` and `dtype` (its name)."""
    return {name: _Leaf(entry) for name, entry in manifest["leaves"].items()}


def is_key(dtype: Any) -> bool:
    """Whether it is the dtype of typed PRNG keys."""
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def leaf_entry(leaf: Any) -> dict[str, Any]:
    """What the manifest says of an array."""
    impl = jax.random.key_impl(leaf) if is_key(leaf.dtype) else None
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "impl": impl}


def read_arrays(directory: Path, manifest: dict[str, Any], wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads only the leaves `wanted` (name -> ShapeDtypeStruct, with the sharding to place it by, if any).

    Names, shapes and dtypes must already agree with the manifest; the files must have been verified.
    """
    import orbax.checkpoint as ocp

    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stored = stored_leaves(manifest)
    arrays: dict[str, jax.Array] = {}
    arguments = {}
    for name, leaf in wanted.items():
        sharding = getattr(leaf, "sharding", None) or default
        data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf.dtype) else leaf
        if 0 in data.shape:
            # Orbax stores no empty arrays; all of such an array is in the manifest.
            arrays[name] = jax.device_put(jnp.zeros(data.shape, data.dtype), sharding)
        else:
            arguments[name] = ocp.ArrayRestoreArgs(
                restore_type=jax.Array, dtype=data.dtype, global_shape=data.shape, sharding=sharding
            )
    if arguments:
        tree = nested(arguments)
        request = ocp.args.PyTreeRestore(item=tree, restore_args=tree, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays |= named_leaves(reader.restore(directory / STATE, args=request))
    for name in wanted:
        if stored[name].impl is not None:
            arrays[name] = jax.random.wrap_key_data(arrays[name], impl=stored[name].impl)
    return arrays
