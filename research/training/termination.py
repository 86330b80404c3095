"""SIGTERM as a wish: the loop saves, and then stops."""

import signal
import threading
from typing import Any


class Termination:
    """While open, SIGTERM only sets `requested`. Signals reach the main thread; elsewhere it does nothing."""

    def __init__(self, active: bool):
        self.requested = False
        self._active = active and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Termination":
        if self._active:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._active:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, *_: Any) -> None:
        self.requested = True
