"""What a person sees while a run trains: a live bar on a terminal, now and then a line elsewhere."""

import sys
import time
from typing import Any

LINE_EVERY = 10.0  # seconds between lines where there is no terminal


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Shows how far a run is. `shown=False` shows nothing but warnings.

    total: the last step. step: where the run starts or resumes.
    """

    def __init__(self, total: int, step: int, *, shown: bool):
        self._total, self._first, self._shown = total, step, shown
        self._bar: Any = None
        self._task: Any = None
        self._begun = self._printed = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._shown and sys.stderr.isatty():
            # A tenth of a second that a run without a terminal need not pay.
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                "[progress.description]{task.description}",
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
            )
            self._bar = Bar(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
            self._task = self._bar.add_task("train", total=self._total, completed=self._first, text="")
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def message(self, text: str) -> None:
        """One line that stays."""
        if self._shown:
            self._print(text)

    def warn(self, text: str) -> None:
        """A line that is printed even where nothing is shown."""
        self._print(f"warning: {text}")

    def begin(self) -> None:
        """Starts the clock of the time left: the first step is compiled."""
        self._begun = self._printed = time.monotonic()

    def update(self, stage: str, step: int, values: dict[str, float], rate: str, mfu: float | None) -> None:
        """Shows a logged step. rate: such as "17k tokens/s". mfu: fraction of the devices' peak, if known."""
        if not self._shown:
            return
        now = time.monotonic()
        parts = [f"loss {values['loss']:.4f}", rate]
        if mfu is not None:
            parts.append(f"MFU {100 * mfu:.1f} %")
        if step > self._first:
            parts.append(
                f"{duration((now - self._begun) / (step - self._first) * (self._total - step))} left"
            )
        text = " · ".join(part for part in parts if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=stage, text=text)
        elif now - self._printed >= LINE_EVERY or step == self._total:
            self._printed = now
            self._print(f"{stage} {step}/{self._total} · {text}")

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def data_progress(what: str, done: int, total: int) -> None:
    """Shows a dataset's `prepare(progress)`: live on a terminal, a line for each finished part elsewhere."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{what}: {done:,} of {total:,}", end=end, file=sys.stderr, flush=True)
    elif done == total:
        print(f"{what}: done", file=sys.stderr, flush=True)


def human(number: float) -> str:
    """Three digits and a prefix: 950, 17.4k, 1.23M."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"
