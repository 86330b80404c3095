"""An object in a process of its own: each library keeps its threads and its allocator to itself, and stays
warm while the others take their turns."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from research.errors import UserError

PAUSE = (
    0.3  # seconds between turns; threads spin for a while after their work and would slow the next contender
)


class Contender:
    """`make(*args)` in a new process; `contender(method, *args)` calls a method of it and waits.

    `make` is a function of a module; arguments and results are pickled. Errors come back: a UserError as
    itself, anything else as a RuntimeError with its traceback.
    """

    def __init__(self, make: Callable[..., Any], *args: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args))
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def __call__(self, method: str, *args: Any) -> Any:
        self._connection.send((method, args))
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"a benchmarked process died with exit code {self._process.exitcode}"
            ) from None
        if kind == "mistake":
            raise UserError(value)
        if kind == "defect":
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()  # on which it ends by itself, unless it is in the middle of something
        self._process.join(timeout=5)
        self._process.terminate()
        self._process.join()

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(connection: Connection, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    made = None
    while True:
        try:
            if made is None:
                made, value = make(*args), None
            else:
                method, arguments = connection.recv()
                value = getattr(made, method)(*arguments)
        except EOFError:
            return
        except UserError as error:
            connection.send(("mistake", str(error)))
        except Exception:
            connection.send(("defect", traceback.format_exc()))
        else:
            connection.send(("value", value))
