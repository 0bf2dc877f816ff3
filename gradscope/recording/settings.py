"""What ``gradscope record`` tells the processes of its command, through one environment variable."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gradscope.errors import GradscopeError
from gradscope.trace.schema import Detail

VARIABLE = "GRADSCOPE_RECORD"
# Notes that a process may leave, told apart by their names.
TORCH_IMPORTED, NOT_INSTALLED, STOPPED, NOTHING, MADE = "torch", "not-installed", "stopped", "nothing", "made"
# One variable holds at most 128 KiB, and a character takes up to 12 bytes in JSON.
_MOST_COMMAND_CHARACTERS = 8_000


@dataclass(frozen=True, slots=True)
class RecordSettings:
    """One launch: where to record (``path``, absolute) and how; the other fields are those of ``Recorder``.

    ``launch`` is the same for all processes of the command, and stands in ``TraceMetadata.extra["launch"]`` of the
    traces that they make.  ``notes`` is a directory, gone once the command has ended, in which they leave word.
    """

    path: str
    launch: str
    notes: str
    command: tuple[str, ...]
    every: int = 1
    start: int = 0
    max_steps: int | None = None
    include: tuple[str, ...] | None = None
    detail: Detail = "default"
    stop_on: str | None = None
    force: bool = False
    quiet: bool = False

    def to_environment(self) -> str:
        """The value of ``VARIABLE``."""
        return json.dumps({**asdict(self), "command": _abridged(self.command)})

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RecordSettings | None:
        """The settings that ``environment`` holds; None where there are none.

        Raises GradscopeError for a value that ``gradscope record`` did not write.
        """
        text = environment.get(VARIABLE)
        if not text:
            return None
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or not values.keys() <= {field.name for field in fields(cls)}:
                raise ValueError("unknown settings")
            lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            return cls(**{**values, **lists})
        except (ValueError, TypeError) as error:
            raise GradscopeError(VARIABLE, f"was not set by gradscope record ({error})") from None

    def leave_note(self, name: str, text: str = "") -> bool:
        """Leave ``text`` under ``name`` for the launcher; whether this process was the first to do so.

        A launcher that has gone reads no notes: then nothing happens.
        """
        with contextlib.suppress(OSError), open(Path(self.notes, name), "x", encoding="utf-8") as note:
            note.write(text)
            return True
        return False

    def note(self, name: str) -> str | None:
        """What was left under ``name``; None: nothing."""
        try:
            return Path(self.notes, name).read_text(encoding="utf-8")
        except OSError:
            return None


def _abridged(command: tuple[str, ...]) -> list[str]:
    """The first words of a command that names thousands of files, and how many more there are."""
    length = 0
    kept: list[str] = []
    for word in command:
        length += len(word)
        if length > _MOST_COMMAND_CHARACTERS:
            return [*kept, f"... {len(command) - len(kept)} more"]
        kept.append(word)
    return kept
