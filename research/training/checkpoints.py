"""The checkpoints of a run: written by Orbax in the background, complete or absent, pruned, and restored.

Orbax makes its own folder atomic, but it neither notices a byte that changed on the disk later nor keeps what
belongs to the loop. So a checkpoint is written below `<step>.saving`, summed, described by a manifest
(`research.training.checkpoint_files`) and only then renamed to `<step>`: a plain number is complete.
"""

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError, nearest
from research.training import checkpoint_files as files
from research.training import hosts
from research.training.checkpoint_files import REPLACED, STATE
from research.training.paths import PyTree, named_leaves, nested
from research.training.structures import structures

Position = dict[str, int | str]
Abstract = PyTree | Callable[[int], PyTree]

SAVING, DELETING = ".saving", ".deleting"
_FINISH = 10  # seconds that a process which failed waits for its last checkpoint


class _WithoutOrbaxErrors(logging.Filter):
    """Drops Orbax's own logging of a failed save: the traceback of an error that we raise anyway."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


class Checkpoints:
    """The checkpoints below one directory, for the one process group that trains in it.

    Kept are the `keep_last` newest and, where `best_metric` is named, the `keep_best` with its smallest
    values (checkpoints saved without metrics, or where it is not finite, do not compete). Damage is reported,
    one line each, through `warn`. Every process of a distributed run makes the same calls in the same order,
    on a file system that all of them see.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        best_metric: str | None = None,
        asynchronous: bool = True,
        warn: Callable[[str], None],
    ):
        if keep_last < 1 or keep_best < 0:
            raise UserError(f"keep_last={keep_last}, keep_best={keep_best}: at least 1 and 0 are needed")
        self.directory = files.local_directory(directory)
        self._keep_last, self._keep_best, self._best_metric = keep_last, keep_best, best_metric
        self._asynchronous, self._warn = asynchronous, warn
        self._checkpointer: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failed_alone = False

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints on disk, ascending, without one that is being written."""
        return list(files.step_directories(self.directory))

    def latest_step(self) -> int | None:
        """The newest of `steps()`, or `None`."""
        return max(self.steps(), default=None)

    # Writing

    def save(
        self, step: int, state: PyTree, position: Position, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Writes a checkpoint of `state`, in the background if `asynchronous`.

        position: where the loop stands (record count, stage ...); restoring returns it. `metrics`: what
        `best_metric` is looked up in. Returns as soon as the arrays may be donated or deleted.

        A checkpoint of the same step is replaced; later ones are removed once this one is complete: they
        belong to a history that was left by restoring an earlier step. Raises `UserError` if this save, or
        the one before, could not be written.
        """
        self.wait()
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        if metrics and self._best_metric is not None and self._best_metric not in metrics:
            close = nearest(self._best_metric, metrics)
            hint = f"did you mean {close}?" if close else f"there are: {', '.join(sorted(metrics))}"
            raise UserError(f"best_metric: {self._best_metric} is not among the metrics; {hint}")
        leaves = named_leaves(state)
        content = {
            "format": files.FORMAT,
            "step": int(step),
            "position": {name: v if isinstance(v, str) else int(v) for name, v in position.items()},
            "metrics": metrics,
            "leaves": {name: files.leaf_entry(leaf) for name, leaf in leaves.items()},
            "structures": structures(state),
        }
        # Orbax takes neither typed keys nor empty arrays: the key data and the manifest stand in for them.
        arrays = {name: _data(leaf) for name, leaf in leaves.items() if leaf.size}
        needed = sum(array.size * jnp.dtype(array.dtype).itemsize for array in arrays.values())
        saving = self.directory / f"{step}{SAVING}"
        quiet = _WithoutOrbaxErrors()
        logging.getLogger("absl").addFilter(quiet)
        try:
            self._start(saving, nested(arrays))
        except Exception as error:
            logging.getLogger("absl").removeFilter(quiet)
            raise self._failed(error, saving, needed) from error
        self._thread = threading.Thread(
            target=self._finish, args=(saving, content, needed, quiet), name=f"checkpoint-{step}"
        )
        self._thread.start()
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more. Raises what went wrong with the last save, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._error is None and jax.process_count() > 1:
                # Complete for all, before one of them goes on. A process that failed does not come here: the others
                # may wait for it inside of Orbax, where nothing can be told to them, and end when it ends.
                hosts.any_of(False)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits as `wait` does, then releases Orbax's threads.

        Not after a failure in one of several processes: Orbax would wait for the others, and they for this one.
        """
        if self._failed_alone:
            return
        try:
            self.wait()
        finally:
            if self._checkpointer is not None and not self._failed_alone:
                self._checkpointer.close()
                self._checkpointer = None

    def abandon(self) -> None:
        """To be called before `close` by a process that ends with an error. Among several it then agrees on nothing:
        the others may be in the middle of something else, and end when this one does. What is being written may be
        finished meanwhile."""
        if jax.process_count() > 1:
            self._failed_alone = True
            if self._thread is not None:
                self._thread.join(_FINISH)

    def _start(self, saving: Path, tree: PyTree) -> None:
        # Orbax takes a tenth of a second to import, which a run should not pay before its first step.
        import orbax.checkpoint as ocp

        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._tidy()
            saving.mkdir()
        if self._checkpointer is None:
            self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._checkpointer.save(saving / STATE, args=ocp.args.PyTreeSave(tree))

    def _finish(self, saving: Path, content: dict[str, Any], needed: int, quiet: logging.Filter) -> None:
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                files.write_manifest(saving, content | {"files": files.checksums(saving, sync=True)})
                self._publish(saving, content["step"])
                self._prune(content["step"])
        except BaseException as error:
            self._error = error  # Should explaining it fail too, it still comes out.
            self._error = self._failed(error, saving, needed)
            self._error.__cause__ = error
        finally:
            logging.getLogger("absl").removeFilter(quiet)

    def _failed(self, error: BaseException, saving: Path, needed: int) -> BaseException:
        """Removes what a failed save left and says what it was, in one line if it is the user's to fix."""
        self._failed_alone = jax.process_count() > 1
        with contextlib.suppress(Exception):  # another thread of Orbax's may still write, and would miss its directory
            self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            shutil.rmtree(saving, ignore_errors=True)
        target = f"checkpoint {saving.with_suffix('')}"
        return files.write_failure(error, target, self.directory, needed)

    def _tidy(self) -> None:
        """Removes what a killed process left. Only the writer may: a reader could meet it at work."""
        complete = files.step_directories(self.directory)
        for path in self.directory.iterdir():
            if path.suffix in (SAVING, DELETING):
                shutil.rmtree(path)
            elif path.suffix == REPLACED and path.stem.isdigit():
                if complete[int(path.stem)] == path:
                    path.rename(path.with_suffix(""))
                else:
                    shutil.rmtree(path)

    def _publish(self, saving: Path, step: int) -> None:
        final, replaced = saving.with_suffix(""), saving.with_suffix(REPLACED)
        if final.exists():
            final.rename(replaced)
        saving.rename(final)
        files.sync_directory(self.directory)
        if replaced.exists():
            shutil.rmtree(replaced)

    def _prune(self, newest: int) -> None:
        steps = files.step_directories(self.directory)
        past = [step for step in steps if step <= newest]
        keep = set(past[-self._keep_last :])
        if self._best_metric is not None:
            values = {step: self._metric(steps[step]) for step in past}
            ranked = sorted((value, -step) for step, value in values.items() if value is not None)
            keep |= {-step for _, step in ranked[: self._keep_best]}
        for step, path in steps.items():
            if step not in keep:
                # Renamed first, so that a crash while deleting leaves no checkpoint with files missing.
                path.rename(path.with_suffix(DELETING))
                shutil.rmtree(path.with_suffix(DELETING))

    def _metric(self, path: Path) -> float | None:
        try:
            value = files.read_manifest(path)["metrics"].get(self._best_metric)
        except files.Damaged as damage:
            self._warn(f"checkpoint {path} is damaged: {damage}; it does not compete for the best")
            return None
        return value if value is not None and np.isfinite(value) else None

    # Reading

    def restore_latest(self, abstract_state: Abstract) -> tuple[PyTree, Position] | None:
        """The newest intact checkpoint as (state, position), or `None` where there is none at all.

        abstract_state: pytree of `jax.ShapeDtypeStruct`, or a function from the step found to one; each array
        is placed by its `sharding`, whatever the devices it was saved from. Raises `UserError` if there are
        checkpoints but none is intact, or if the tree differs from the saved one in a name, shape or dtype.
        """
        self.wait()
        if jax.process_count() > 1:
            return self._restore_latest_together(abstract_state)
        found = files.newest_intact(self.directory, self._warn)
        return None if found is None else self._restore(*found, abstract_state)

    def restore(self, step: int, abstract_state: PyTree) -> tuple[PyTree, Position]:
        """The checkpoint of one step, as `restore_latest`. Raises `UserError` if it is absent or damaged."""
        self.wait()
        path, manifest = files.checkpoint_of_step(self.directory, step)
        return self._restore(path, manifest, abstract_state)

    def _restore_latest_together(self, abstract_state: Abstract) -> tuple[PyTree, Position] | None:
        """Process 0 reads and sums the files; the others take its word for the step."""
        found = hosts.first_decides(lambda: files.newest_intact(self.directory, self._warn))
        step = int(hosts.same(np.int64(-1 if found is None else found[1]["step"])))
        if step == -1:
            return None
        path = files.step_directories(self.directory)[step]
        return self._restore(path, files.read_manifest(path), abstract_state)

    def _restore(
        self, path: Path, manifest: dict[str, Any], abstract_state: Abstract
    ) -> tuple[PyTree, Position]:
        if callable(abstract_state):
            abstract_state = abstract_state(manifest["step"])
        wanted = named_leaves(abstract_state)
        if difference := files.mismatches(files.stored_leaves(manifest), wanted, "the checkpoint"):
            raise UserError(f"checkpoint {path} does not fit this run: {difference}")
        # Codes of other bits or in another order can have the same shape.
        stored, here = manifest.get("structures", {}), structures(abstract_state)
        for name in sorted(stored.keys() | here.keys()):
            if stored.get(name) != here.get(name):
                raise UserError(
                    f"checkpoint {path} does not fit this run: {name} is {stored.get(name)} in the checkpoint "
                    f"but {here.get(name)} here"
                )
        arrays = files.read_arrays(path, manifest, wanted)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in wanted])
        return state, manifest["position"]


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if files.is_key(leaf.dtype) else leaf
