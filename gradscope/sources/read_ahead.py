"""Reading in the background, while whoever will want the result is still getting ready."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from gradscope.gradients import Progress

T = TypeVar("T")


class _StoppedError(Exception):
    """Nobody wants the result any more."""


class ReadAhead(Generic[T]):
    """``read(progress)`` running in a thread of its own; it must call ``progress`` now and then to be stoppable."""

    def __init__(self, read: Callable[[Progress], T], progress: Progress | None) -> None:
        self._read = read
        self._progress = progress
        self._wanted = True
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def result(self) -> T:
        """What was read, or the exception that was raised; waits for it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]

    def stop(self) -> None:
        """End the reading at its next progress, if it is still going on, and wait for that."""
        self._wanted = False
        self._thread.join()

    def _run(self) -> None:
        try:
            self._found.append(self._read(self._tell))
        except BaseException as error:  # noqa: BLE001 - raised again where the result is wanted
            self._error = error

    def _tell(self, done_bytes: int, total_bytes: int) -> None:
        if not self._wanted:
            raise _StoppedError
        if self._progress is not None:
            self._progress(done_bytes, total_bytes)
