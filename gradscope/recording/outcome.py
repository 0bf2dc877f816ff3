"""What a recorded command has left: its traces in a few lines, or why there are none."""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from gradscope.errors import GradscopeError
from gradscope.notation import count
from gradscope.recording.settings import NOT_INSTALLED, STEPPED, STOPPED, TORCH_IMPORTED, RecordSettings
from gradscope.trace.metadata_json import metadata_from_json
from gradscope.trace.schema import METADATA_FILE, TraceMetadata


@dataclass(frozen=True, slots=True)
class LaunchedTrace:
    """A trace that a process of the command made."""

    path: Path
    metadata: TraceMetadata


def launched_traces(settings: RecordSettings) -> list[LaunchedTrace]:
    """The traces of this launch: ``NAME.gradscope``, and ``NAME-2.gradscope``… of further processes."""
    base = Path(settings.path)
    beside = base.parent.glob(f"{glob.escape(base.stem)}*{base.suffix}")
    traces = [
        trace for path in beside if (trace := _read(path)) and trace.metadata.extra.get("launch") == settings.launch
    ]
    return sorted(traces, key=lambda trace: trace.metadata.started)


def _read(path: Path) -> LaunchedTrace | None:
    try:
        return LaunchedTrace(path, metadata_from_json((path / METADATA_FILE).read_bytes(), str(path)))
    except (OSError, GradscopeError):
        return None


def summary(trace: LaunchedTrace) -> str:
    """What was recorded, and where it is."""
    metadata = trace.metadata
    updates = _several(metadata.steps if metadata.steps is not None else _steps_on_disk(trace.path), "update")
    groups = _several(len(metadata.groups), "clip group")
    tensors = _several(len(metadata.tensors), "tensor")
    line = f"Recorded {updates}, {groups}, {tensors}: {_shown(trace.path)} ({_size(_bytes_on_disk(trace.path))})"
    if metadata.ended is not None:
        return line
    return f"{line}; it is {'still being recorded' if _alive(metadata.pid) else 'cut off: the process was killed'}"


def _bytes_on_disk(path: Path) -> int:
    total = 0
    for file in path.iterdir():
        # A trace that is still being recorded renames files.
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def _steps_on_disk(path: Path) -> int:
    from gradscope.trace.reader import RankTrace

    try:
        return len(set(RankTrace.open(path, 0).step.tolist()))
    except GradscopeError:
        return 0


def next_command(trace: LaunchedTrace) -> str:
    """What to do with the trace."""
    return f"Next: gradscope inspect {shlex.quote(_shown(trace.path))}"


def why_nothing_was_recorded(settings: RecordSettings) -> str:
    """One line for a command that left no trace."""
    if (why := settings.note(STOPPED)) is not None:
        return f"nothing was recorded: {why}"
    if settings.note(STEPPED) is not None:
        return "nothing was recorded: training ended before the first step to record"
    if settings.note(TORCH_IMPORTED) is not None:
        return (
            "no optimizer step was seen: no torch.optim optimizer stepped where it can be seen (not in torch.compile)"
        )
    if (python := settings.note(NOT_INSTALLED)) is not None:
        return f"no optimizer step was seen: {python} has no gradscope; install it there"
    return (
        "no optimizer step was seen: no Python process imported torch, or it could not be followed "
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
