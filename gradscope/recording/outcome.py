"""What a recorded command has left: its traces in a few lines, or why there are none."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

from gradscope.errors import GradscopeError
from gradscope.notation import count
from gradscope.recording.nothing_recorded import NO_STEP_SEEN, NOT_WHERE_IT_CAN_BE_SEEN
from gradscope.recording.settings import MADE, NOT_INSTALLED, NOTHING, STOPPED, TORCH_IMPORTED, RecordSettings
from gradscope.recording.trace_files import remove_if_empty, steps_on_disk
from gradscope.trace.metadata_json import metadata_from_json
from gradscope.trace.schema import METADATA_FILE, TraceMetadata


@dataclass(frozen=True, slots=True)
class LaunchedTrace:
    """A trace that a process of the command made, and the steps that can be read back."""

    path: Path
    metadata: TraceMetadata
    steps: int

    @property
    def running(self) -> bool:
        """Whether it is still being recorded."""
        return self.metadata.ended is None and _alive(self.metadata.pid)


def launched_traces(settings: RecordSettings) -> list[LaunchedTrace]:
    """The traces of this launch: ``NAME.gradscope``, then ``NAME-2.gradscope``… of further processes."""
    base = Path(settings.path)
    number = re.compile(rf"{re.escape(base.stem)}(?:-(\d+))?{re.escape(base.suffix)}")
    beside = {}
    for path in base.parent.glob(f"{glob.escape(base.stem)}*{base.suffix}"):
        if match := number.fullmatch(path.name):
            beside[int(match[1] or 1)] = path
    return [trace for number in sorted(beside) if (trace := _read(beside[number], settings))]


def _read(path: Path, settings: RecordSettings) -> LaunchedTrace | None:
    try:
        metadata = metadata_from_json((path / METADATA_FILE).read_bytes(), str(path))
    except (OSError, GradscopeError):
        return None
    if metadata.extra.get("launch") != settings.launch:
        return None
    # What was counted may not have been written.
    counted = metadata.steps if settings.note(STOPPED) is None else None
    return LaunchedTrace(path, metadata, counted if counted is not None else steps_on_disk(path))


def removed(trace: LaunchedTrace) -> bool:
    """Whether the trace held not a single step, and is no more."""
    return not trace.steps and not trace.running and remove_if_empty(trace.path, trace.metadata.run)


def summary(trace: LaunchedTrace, code: int) -> str:
    """What was recorded, and where it is; ``code`` is what ``run_command`` returned."""
    metadata = trace.metadata
    updates = _several(trace.steps, "update")
    groups = _several(len(metadata.groups), "clip group")
    tensors = _several(len(metadata.tensors), "tensor")
    line = f"Recorded {updates}, {groups}, {tensors}: {_shown(trace.path)} ({_size(_bytes_on_disk(trace.path))})"
    if metadata.ended is not None:
        return line
    return f"{line}; {'it is still being recorded' if trace.running else f'it is cut off: {_how_it_ended(code)}'}"


def _how_it_ended(code: int) -> str:
    """How a process ended that did not close its trace, as far as the end of the whole command shows it."""
    if code < 0:
        names = {known.value: known.name for known in signal.Signals}
        return f"the command was killed by {names.get(-code, f'signal {-code}')}"
    return "a process ended without closing its trace"


def _bytes_on_disk(path: Path) -> int:
    total = 0
    # A trace that is still being recorded renames files, and one may just have been moved away.
    with contextlib.suppress(FileNotFoundError):
        for file in path.iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += file.stat().st_size
    return total


def lost(processes: int) -> str:
    """What is to be said of processes whose traces were ``removed``."""
    return f"{processes} more process{'' if processes == 1 else 'es'} ended before the first step was written"


def next_command(trace: LaunchedTrace) -> str:
    """What to do with the trace."""
    return f"Next: gradscope inspect {shlex.quote(_shown(trace.path))}"


def why_nothing_was_recorded(settings: RecordSettings, emptied: bool, code: int) -> str:
    """One line for a command that left no trace; ``emptied``: what it left held not a single step."""
    made = settings.note(MADE)
    if made is not None and not emptied:
        what = "cannot be read" if os.path.lexists(made) else "has disappeared: it was deleted or moved meanwhile"
        return f"the trace {_shown(Path(made))} {what}"
    if (why := settings.note(STOPPED) or settings.note(NOTHING)) is not None:
        return f"nothing was recorded: {why}"
    if emptied:
        return f"nothing was recorded: {_how_it_ended(code)}, before the first step was written"
    if settings.note(TORCH_IMPORTED) is not None:
        return f"{NO_STEP_SEEN}: {NOT_WHERE_IT_CAN_BE_SEEN}"
    if (python := settings.note(NOT_INSTALLED)) is not None:
        return f"{NO_STEP_SEEN}: {python} has no gradscope; install it there"
    return (
        f"{NO_STEP_SEEN}: no Python process imported torch, or it could not be followed "
        "(python -I, -E or -S; a script that sets PYTHONPATH anew)"
    )


def _several(number: int, noun: str) -> str:
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def _size(size_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{max(1, round(size_bytes / 1e3))} kB"


def _shown(path: Path) -> str:
    """``path`` as a user in the working directory would write it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
