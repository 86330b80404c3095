"""The record of a run: `metrics.jsonl`, one line per logged step, and TensorBoard event files."""

import json
import os
import time
from pathlib import Path
from typing import Any

from research.errors import UserError

Row = dict[str, Any]
# What a row says about itself rather than about the model; not drawn as curves.
LABELS = ("step", "kind", "stage", "name", "variant")


def read_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a `metrics.jsonl`; a last line that a killed process left unfinished is not one.

    Raises `UserError` if any other line is not a JSON object with `step`, `kind` and, of an evaluation, its `name` and
    `variant`, or if the file can't be read.
    """
    return [row for row, _ in _scan(Path(path))]


def metric_label(evaluator: str, variant: str, metric: str) -> str:
    """`evaluator/variant/metric`, without the variant where it has no name."""
    return "/".join(part for part in (evaluator, variant, metric) if part)


def final_metrics(rows: list[Row]) -> dict[str, float]:
    """The last of every number: `train/loss`, and `<evaluator>/<variant>/<metric>`."""
    final: dict[str, float] = {}
    for row in rows:
        numbers = {k: v for k, v in row.items() if isinstance(v, float | int) and k != "step"}
        if row["kind"] == "train":
            final |= {f"train/{name}": value for name, value in numbers.items()}
        else:
            final |= {
                metric_label(row["name"], row["variant"], name): value for name, value in numbers.items()
            }
    return final


def _scan(path: Path) -> list[tuple[Row, int]]:
    """[(row, byte offset of its end)]."""
    rows, offset = [], 0
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            row["step"] + 0
            if row["kind"] != "train":
                row["name"], row["variant"]  # as `metric_label` needs them
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path}:{number} is not a line of metrics: {line[:80]!r}") from None
        offset += len(line)
        rows.append((row, offset))
    return rows


class MetricsWriter:
    """Appends rows to `directory/metrics.jsonl` and their numbers to `directory/tensorboard/`.

    `step` is where the run resumes (0 at its start): later rows belong to a history that is now repeated and
    are cut off. `directory` None records nothing but keeps `rows`, and so does a host that does not write.
    """

    def __init__(self, directory: Path | None, step: int, *, writes: bool = True):
        self.rows: list[Row] = []
        self._directory, self._step = directory, step
        self._board = self._file = None
        if directory is None:
            return
        path = directory / "metrics.jsonl"
        kept = [(row, end) for row, end in _scan(path) if row["step"] <= step]
        self.rows = [row for row, _ in kept]
        board = directory / "tensorboard"
        if board.exists() and not board.is_dir():
            raise UserError(f"{board} is a file, and the folder of event files belongs there; move it away")
        if not writes:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        # Steps only grow, so what is kept is a prefix.
        self._file.truncate(kept[-1][1] if kept else 0)

    def write(self, row: Row) -> None:
        """Appends one row: `step`, `kind`, labels, numbers, and lists of numbers, drawn as histograms."""
        self.rows.append(row)
        if self._file is None:
            return
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        board = self._event_file()
        parts = [row[key] for key in ("name", "variant") if row.get(key)] or [row["kind"]]
        for key, value in row.items():
            tag = "/".join([*parts, key])
            if isinstance(value, list):
                board.add(_histogram(tag, value), row["step"])
            elif key not in LABELS:
                board.add(_scalar(tag, value), row["step"])

    def _event_file(self) -> "_EventFile":
        if self._board is None:
            purge = self._step + 1 if self._step else None
            self._board = _EventFile(self._directory / "tensorboard", purge)
        return self._board

    def close(self) -> None:
        """Writes out what is buffered and closes the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


class _EventFile:
    """A TensorBoard event file, written by the thread that logs.

    Not by tensorboardX's own thread: where that fails, on a full disk, it ends, and what waits for it waits for ever.
    """

    FLUSH = 10.0  # seconds

    def __init__(self, directory: Path, purge_step: int | None):
        # Imported here because protobuf takes a while and nothing is written before the first step.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        self._file, self._event = EventsWriter(str(directory / "events")), Event
        self._flushed = time.monotonic()
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(step=purge_step, file_version="brain.Event:2"))
            self._file.write_event(Event(step=purge_step, session_log=start, wall_time=time.time()))

    def add(self, summary: Any, step: int) -> None:
        self._file.write_event(self._event(step=step, summary=summary, wall_time=time.time()))
        if time.monotonic() - self._flushed > self.FLUSH:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


def _scalar(tag: str, value: float) -> Any:
    from tensorboardX.summary import scalar

    return scalar(tag, value)


def _histogram(tag: str, values: list[float]) -> Any:
    """A list as a histogram whose bucket i holds its i-th value: TensorBoard stacks them over the steps."""
    from tensorboardX.summary import histogram_raw

    return histogram_raw(
        tag,
        min=0,
        max=len(values),
        num=len(values),
        sum=sum(values),
        sum_squares=sum(value * value for value in values),
        bucket_limits=list(range(1, len(values) + 1)),
        bucket_counts=values,
    )
