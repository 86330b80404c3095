"""Where prepared data lives, and how a folder of it comes into being all at once or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from research.errors import UserError
from research.paths import expand


def data_dir() -> Path:
    """The folder of prepared data: the environment's `LATHE_DATA_DIR`, or `~/.cache/lathe/data`."""
    return expand(os.environ.get("LATHE_DATA_DIR") or "~/.cache/lathe/data")


@contextlib.contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends without an exception.

    The rename is atomic, so `target` either doesn't exist or is complete, whenever the process dies. Of two
    processes that prepare the same folder at once the first wins and the other's work is dropped: both
    prepare the same content, because `target` is named by it.

    Raises:
      UserError: the folder can't be written (no permission, disk full).
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        content = scratch / target.name
        content.mkdir()
        try:
            yield content
            try:
                content.rename(target)
            except OSError:
                if not target.is_dir():  # not a race that another process won
                    raise
        except OSError as error:
            raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unwritable(target: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write prepared data to {target}: {error.strerror or error}; "
        "LATHE_DATA_DIR chooses another folder"
    )
