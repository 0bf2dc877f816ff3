"""Reading in the background, while whoever will want the result is still getting ready."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
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
        self._future: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def result(self) -> T:
        """What was read, or the exception that was raised; waits for it."""
        return self._future.result()

    def stop(self) -> None:
        """End the reading at its next progress, if it is still going on, and wait for that."""
        self._wanted = False
        self._thread.join()

    def _run(self) -> None:
        try:
            self._future.set_result(self._read(self._tell))
        except BaseException as error:  # noqa: BLE001 - raised again where the result is wanted
            self._future.set_exception(error)

    def _tell(self, done_bytes: int, total_bytes: int) -> None:
        if not self._wanted:
            raise _StoppedError
        if self._progress is not None:
            self._progress(done_bytes, total_bytes)
