"""A trace of a few steps, which Perfetto and XProf open."""

import re
from pathlib import Path
from typing import Any

import jax

from research.errors import UserError


def parse_profile(text: str) -> tuple[int, int]:
    """`start:steps` -> (the first step that is traced, how many). Raises `UserError`."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not int(found[1]) or not int(found[2]):
        raise UserError(f"--profile={text}: expected FIRST_STEP:STEPS, such as 10:3")
    return int(found[1]), int(found[2])


class Profile:
    """Traces steps first ... first + steps - 1 into `directory`, once, whatever stage they are in.

    The device is waited for on both sides, so that the trace holds these steps and no others.
    """

    def __init__(self, window: tuple[int, int] | None, directory: Path | None):
        self._first, self._steps = window or (0, 0)
        self._directory, self._active = directory, False

    def check(self, done: int, steps: int) -> None:
        """Raises `UserError` where none of the window's steps is to come, `done` of the run's `steps` being made.

        A run that is started again after its trace was written goes on.
        """
        if not self._steps:
            return
        past = self._first + self._steps - 1 <= done and not self._directory.exists()
        if past or self._first > steps:
            asked = f"--profile={self._first}:{self._steps}"
            raise UserError(f"{asked}: none of these steps is to come; {done} of {steps} steps are made")

    def before(self, step: int, state: Any) -> None:
        """Before a step is dispatched. Of a run that resumes inside the window, the rest of it is traced."""
        if not self._active and self._first <= step < self._first + self._steps:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._directory), create_perfetto_trace=True)
            self._active = True

    def after(self, step: int, state: Any) -> bool:
        """After a step was dispatched. Whether the trace has just been written."""
        if not self._active or step < self._first + self._steps - 1:
            return False
        jax.block_until_ready(state)
        self.close()
        return True

    def close(self) -> None:
        """Writes a trace that a run which ends early has begun."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
