"""The directory of one run: its config, its lock, the places of its files; and loading a model from it.

config.json            the config, exactly
tokenizer.json         a copy, so that the workdir can be moved
checkpoints/<step>/    see `research.training.checkpoints`
metrics.jsonl  tensorboard/  figures/
lock                   held while a process trains here
"""

import fcntl
import os
import re
import socket
import sys
from pathlib import Path
from typing import IO, Any

import jax
from ml_collections import ConfigDict

from research import config as configs
from research import config_names
from research.errors import UserError
from research.paths import expand
from research.training import checkpoint_files as files
from research.training import hosts
from research.training.model_directory import (
    CONFIG,
    TOKENIZER,
    TOKENS,
    WEIGHTS,
    Loaded,
    load_model_directory,
    load_tokenizer,
    read_config,
    save_model,
)
from research.training.partial import ADAPTER, described_tree, load_adapter
from research.training.paths import PyTree, named_leaves
from research.training.structures import with_structures

__all__ = [
    "Loaded",
    "Workdir",
    "find_task",
    "lock_directory",
    "load_model",
    "open_workdir",
    "read_checkpoint",
    "read_config",
    "save_model",
]

LOCK = "lock"
PACKAGE = Path(__file__).resolve().parents[1]
TOKENIZER_CONFIG = "tokenizer_config.json"
_UNUSED = {LOCK, CONFIG, TOKENIZER, TOKENIZER_CONFIG}  # of a workdir in which nothing has run

# What may change between the runs of one workdir: how long it trains, how often it logs, evaluates and saves,
# what it keeps, when it gives up, and where the arrays live. With anything else the steps before and after
# would belong to two experiments.
_FREE = re.compile(
    r"stages\.\d+\.steps|(.*\.)?(\w+_)?every|keep_last|keep_best|explode|replicate_below|(mesh|rules)(\..*)?"
)


class Workdir:
    """An open workdir. It is locked until `close`, or until the process dies in whatever way.

    An error that passes through it before the run has written anything takes the config of a new workdir back, so that
    the mended one is not refused as another.
    """

    def __init__(self, path: Path, config: ConfigDict, lock: IO[str] | None, new: bool = False):
        self.path, self.config, self._lock, self._new = path, config, lock, new
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.figures = path / "figures"

    def close(self) -> None:
        """Lets other processes open it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._new and not {entry.name for entry in self.path.iterdir()} - _UNUSED:
            (self.path / CONFIG).unlink(missing_ok=True)
        self.close()


def begin(workdir: "Workdir | str | os.PathLike[str] | None", resumed: bool) -> None:
    """A run begins, or goes on from a checkpoint: from here on the workdir is that of its config.

    Until then nothing of an existing workdir has changed, so that what is refused leaves it as it was.

    Raises `UserError` where a run would begin afresh although one has been here: the folder of checkpoints is made
    when a run begins, and has been taken away.
    """
    if workdir is None:
        return
    directory = Path(getattr(workdir, "path", workdir))
    checkpoints, metrics = directory / "checkpoints", directory / "metrics.jsonl"
    if not resumed and not checkpoints.exists() and metrics.exists() and metrics.stat().st_size:
        raise UserError(
            f"{directory}: {metrics.name} tells of a run, but its {checkpoints.name}/ is gone: put it back, or choose "
            "another workdir"
        )
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        if isinstance(workdir, Workdir):
            files.write_atomically(directory / CONFIG, configs.to_json(workdir.config))
    except OSError as error:
        raise UserError(f"workdir {directory} cannot be written: {error}") from None


def open_workdir(
    path: str | os.PathLike[str],
    config: ConfigDict,
    *,
    resume: bool = True,
    tokenizer_path: str | os.PathLike[str] | None = None,
) -> Workdir:
    """Creates the workdir of `config`, or opens it again to go on.

    tokenizer_path: a tokenizer.json, copied into the workdir. Without `resume` an existing run is refused. Of
    a distributed run, whose processes all call it, process 0 checks, locks and writes for all.

    Raises `UserError` if the directory is not a workdir, is locked by a living process (named), holds a run
    of another config (the field and both values are named; the length of stages and every cadence may
    change), or can't be written.
    """
    directory = files.local_directory(path)
    opened = hosts.first_decides(lambda: _open(directory, config, resume, tokenizer_path))
    return Workdir(directory, config, None) if opened is None else opened


def _open(
    directory: Path, config: ConfigDict, resume: bool, tokenizer_path: str | os.PathLike[str] | None
) -> Workdir:
    try:
        _check_contents(directory)
        directory.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(directory)
    except OSError as error:
        raise UserError(f"workdir {directory} cannot be opened: {error}") from None
    try:
        new = not (directory / CONFIG).exists()
        if not new:
            if not resume:
                raise UserError(f"{directory} already holds a run: resume it or choose another workdir")
            _check_config(directory, config)
        _copy_tokenizer(directory, tokenizer_path)
        if new:  # last: a directory with a config is complete
            files.write_atomically(directory / CONFIG, configs.to_json(config))
    except OSError as error:
        lock.close()
        raise UserError(f"workdir {directory} cannot be written: {error}") from None
    except BaseException:
        lock.close()
        raise
    return Workdir(directory, config, lock, new)


def _check_contents(directory: Path) -> None:
    """Refuses a directory with files of somebody else's; one that died while it was being made passes."""
    if not directory.exists() or (directory / CONFIG).exists():
        return
    ours = {LOCK, TOKENIZER, TOKENIZER_CONFIG, *(f"{x}.tmp" for x in (CONFIG, TOKENIZER, TOKENIZER_CONFIG))}
    strangers = sorted({entry.name for entry in directory.iterdir()} - ours)
    if strangers:
        raise UserError(
            f"{directory} is not a workdir: it holds {strangers[0]} but no {CONFIG}; choose a new directory"
        )


def lock_directory(directory: Path) -> IO[str]:
    """The open file that keeps other processes out of a directory until it is closed, or its process dies.

    Raises `UserError` naming the process that holds it.
    """
    # The kernel drops this lock with the process, so no crash leaves a stale one.
    lock = open(directory / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the workdir is)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise UserError(
            f"{directory} is in use by {holder}: wait for it, or choose another workdir"
        ) from None
    except OSError:
        lock.close()
        raise
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _check_config(directory: Path, config: ConfigDict) -> None:
    saved = read_config(directory / CONFIG)
    differences = [x for x in configs.diff(saved, config) if not _FREE.fullmatch(x[0])]
    if differences:
        shown = "; ".join(f"{path} is {old!r} there and {new!r} here" for path, old, new in differences[:3])
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(f"{directory} holds a run of another config: {shown}{more}; choose another workdir")


def _copy_tokenizer(directory: Path, source: str | os.PathLike[str] | None) -> None:
    if source is None:
        return
    origin, kept = expand(source), directory / TOKENIZER
    if not origin.is_file():
        raise UserError(f"tokenizer {origin} does not exist")
    if (directory / CONFIG).exists() and kept.exists():
        if origin.read_bytes() != kept.read_bytes():
            raise UserError(f"tokenizer {origin} is not the one that the run in {directory} was started with")
        return
    # A tokenizer_config.json beside it names the special tokens.
    for file in (origin, origin.with_name(TOKENIZER_CONFIG)):
        if file.exists() or file == origin:
            name = TOKENIZER if file == origin else TOKENIZER_CONFIG
            files.write_atomically(directory / name, file.read_text(encoding="utf-8"))


def find_task(config: ConfigDict) -> tuple[str, ConfigDict]:
    """The first task with a `model` at `task`, `task.task`, ... of an experiment: its config path and config. A task
    class that makes its model from another one has the property `model_config` instead of an entry in the config.

    Raises `UserError` if there is none.
    """
    path, node = "config", config
    while isinstance(node.get("task"), ConfigDict):
        path, node = f"{path}.task", node["task"]
        if "model" in node or hasattr(config_names.resolve(node["cls"], path), "model_config"):
            return path, node
    raise UserError("config: no `model` in its `task`, nor in any task that wraps")


def load_model(path: str | os.PathLike[str], step: int | None = None, ema: bool = False) -> Loaded:
    """The model of a workdir, of a model directory or of an adapter directory, ready to use.

    Of a workdir it reads the newest intact checkpoint, or that of `step`; only the parameters, or their
    moving average with `ema`. A damaged checkpoint is named on standard error and the one before is used.

    A path `package:...` is looked up in this package: `package:language/base` is the model that ships.

    Raises `UserError` if the path is neither kind of directory, if no checkpoint is intact, or if what is
    asked for is not there.
    """
    directory = directory_of(path)
    if (directory / ADAPTER).exists():
        if step is not None or ema:
            raise UserError(f"{directory} is an adapter directory, with one set of parameters")
        config, saved = load_adapter(directory)
        where, task_config = find_task(config)
        task = configs.build(task_config, where)
        return _loaded(task, task_config, task.recall(saved), load_tokenizer(directory), None)
    if (directory / WEIGHTS).exists():
        if step is not None or ema:
            wanted = "moving average" if ema else f"step {step}"
            raise UserError(f"{directory} is a model directory, with one set of parameters: no {wanted}")
        return load_model_directory(directory)
    if not (directory / CONFIG).exists():
        what = "does not exist" if not directory.exists() else "is neither"
        raise UserError(
            f"{directory} {what}: a workdir ({CONFIG}, checkpoints/) or a model directory ({WEIGHTS})"
        )
    return _load_from_run(directory, step, "ema" if ema else "params")


def read_adapter(
    path: str | os.PathLike[str], step: int | None = None, ema: bool = False
) -> tuple[ConfigDict, Any, PyTree]:
    """The config, the task, and what was saved, of a run or of an adapter directory.

    Raises `UserError` if it holds a model, or if the run saves all its parameters.
    """
    folder = directory_of(path)
    if (folder / ADAPTER).exists():
        if step is not None or ema:
            raise UserError(
                f"{folder} is an adapter directory, with one set of parameters: no step, no average"
            )
        config, saved = load_adapter(folder)
    else:
        config, saved = read_config(folder / CONFIG), None
    if "task" not in config:
        raise UserError(f"{path} holds a model, not an adapter")
    where, node = find_task(config)
    task = configs.build(node, where)
    if not hasattr(task, "recall"):
        raise UserError(f"{path} was not trained as an adapter: its task is {type(task).__name__}")
    if saved is None:
        saved, _ = read_checkpoint(folder, None, step, "ema" if ema else "params")
    return config, task, saved


def directory_of(path: str | os.PathLike[str]) -> Path:
    """Where a workdir or model directory is; `package:...` is in this package."""
    inside = str(path).removeprefix("package:")
    return files.local_directory(path if inside == str(path) else PACKAGE / inside)


def _load_from_run(directory: Path, step: int | None, part: str) -> Loaded:
    config = read_config(directory / CONFIG)
    where, task_config = find_task(config)
    task = configs.build(task_config, where)
    outer = _packing_task(config, where, task)
    saved = task if outer is None else outer
    recalls = hasattr(saved, "recall")
    abstract = None if recalls else jax.eval_shape(saved.init, jax.random.key(0))
    params, step = read_checkpoint(directory, abstract, step, part)
    params = saved.recall(params) if recalls else params
    return _loaded(task, task_config, params, load_tokenizer(directory), step, outer)


def _loaded(
    task: Any,
    task_config: ConfigDict,
    params: PyTree,
    tokenizer: Any,
    step: int | None,
    outer: Any = None,
) -> Loaded:
    """What was trained; a task that recalls a base has its tokenizer too."""
    outer = task if outer is None and hasattr(task, "unpack") else outer
    params = params if outer is None else jax.jit(outer.unpack)(params)
    shape = getattr(task, "image_shape", None)
    inputs = TOKENS if shape is None else (jax.ShapeDtypeStruct((1, *shape), jax.numpy.float32),)
    made = task_config.get("model") or task.model_config
    tokenizer = getattr(task, "tokenizer", None) if tokenizer is None else tokenizer
    return Loaded(task.model, params, tokenizer, made, step, inputs)


def _packing_task(config: ConfigDict, where: str, task: Any) -> Any:
    """The outermost task that trains another tree of parameters than its model's, or `None`; `task` is at `where`."""
    path, node = "config", config
    while isinstance(node.get("task"), ConfigDict):
        path, node = f"{path}.task", node["task"]
        if hasattr(config_names.resolve(node["cls"], path), "unpack"):
            return task if path == where else configs.build(node, path)
    return None


def read_checkpoint(
    directory: Path, abstract: PyTree | None, step: int | None = None, part: str = "params"
) -> tuple[PyTree, int]:
    """One part of the state that a run saved, shaped like `abstract` (None: as it was saved), and the step it is of.

    Kernels that were saved as structured weights are read as such, where `abstract` has arrays of their shape. The
    newest intact checkpoint, or that of `step`; a damaged one is named on standard error. Raises `UserError` if there
    is none, or if it lacks the part or holds another tree.
    """
    checkpoints = directory / "checkpoints"
    if step is not None:
        found = files.checkpoint_of_step(checkpoints, step)
    else:
        found = files.newest_intact(checkpoints, lambda line: print(f"warning: {line}", file=sys.stderr))
    if found is None:
        raise UserError(f"the run in {directory} has not saved a checkpoint yet")
    path, manifest = found
    prefix = f"{part}/"
    stored = {n: leaf for n, leaf in files.stored_leaves(manifest).items() if n.startswith(prefix)}
    if not stored:
        raise UserError(f"checkpoint {path} has no {part}: the run keeps no moving average of its parameters")
    described = {
        name.removeprefix(prefix): entry
        for name, entry in manifest.get("structures", {}).items()
        if name.startswith(prefix)
    }
    if abstract is None:
        leaves = {name.removeprefix(prefix): leaf for name, leaf in stored.items()}
        abstract = described_tree(leaves, described, f"checkpoint {path}")
    else:
        abstract = with_structures(abstract, described, f"checkpoint {path}")
    wanted = {f"{prefix}{name}": leaf for name, leaf in named_leaves(abstract).items()}
    if difference := files.mismatches(stored, wanted, "the checkpoint"):
        raise UserError(f"checkpoint {path} does not fit the config of its run: {difference}")
    arrays = files.read_arrays(path, manifest, wanted)
    params = jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])
    return params, manifest["step"]
