"""A recorder that a framework starts and stops."""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradscope.recording.recorder import Recorder


class TrainingRecorder:
    """Records while a framework trains; a second training goes to ``NAME-2.gradscope``.

    Frameworks that tell nobody when training raises leave the recorder running: it then ends with the process, or when
    the next training starts.
    """

    def __init__(self, path: str | os.PathLike[str], options: dict[str, Any]) -> None:
        """Record to ``path``; ``options`` are those of ``gradscope.Recorder``.

        Raises GradscopeError as ``gradscope.Recorder`` does, before anything trains.
        """
        from gradscope.recording.recorder import Recorder

        self._options = options
        self._next: Recorder | None = Recorder(path, **options)
        self._path = self._next.path
        self._running: Recorder | None = None

    @property
    def path(self) -> Path:
        """Where the current training, or else the last one, is recorded."""
        return self._path

    def start(self) -> None:
        """Training starts."""
        self.stop()
        recorder, self._next = self._next or self._another(), None
        recorder.start()
        self._running = recorder
        atexit.register(self.stop)

    def stop(self) -> None:
        """Training has ended; more than once does no harm."""
        if self._running is not None:
            self._running.stop()
            self._path = self._running.path
            self._running = None
            atexit.unregister(self.stop)

    def _another(self) -> Recorder:
        from gradscope.recording.recorder import Recorder
        from gradscope.recording.trace_names import next_free

        return Recorder(next_free(self._path), **self._options)

    def __getstate__(self) -> dict[str, Any]:
        # Launchers that spawn processes pickle callbacks; a recorder belongs to one process.
        return {**self.__dict__, "_next": None, "_running": None}
