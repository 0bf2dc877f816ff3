"""What a recorded command has left: its traces in a few lines, or why there are none."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradscope.notation import count
from gradscope.recording.settings import NOT_ATTACHED, NOT_INSTALLED, STEPS_SEEN, TORCH_IMPORTED, RecordSettings
from gradscope.trace.schema import METADATA_FILE


@dataclass(frozen=True, slots=True)
class LaunchedTrace:
    """A trace that a process of the command made, and what its ``trace.json`` holds."""

    path: Path
    metadata: dict[str, Any]


def launched_traces(settings: RecordSettings) -> list[LaunchedTrace]:
    """The traces of this launch: ``NAME.gradscope``, and ``NAME-2.gradscope``… of further processes."""
    base = Path(settings.path)
    beside = sorted(base.parent.glob(f"{_escaped(base.stem)}*{base.suffix}"), key=lambda path: (len(path.name), path))
    return [trace for path in beside if (trace := _read(path, settings.launch))]


def _escaped(name: str) -> str:
    from glob import escape

    return escape(name)


def _read(path: Path, launch: str) -> LaunchedTrace | None:
    try:
        metadata = json.loads((path / METADATA_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    extra = metadata.get("extra") if isinstance(metadata, dict) else None
    ours = isinstance(extra, dict) and extra.get("launch") == launch
    return LaunchedTrace(path, metadata) if ours else None


def summary(trace: LaunchedTrace) -> str:
    """What was recorded, and where it is."""
    metadata = trace.metadata
    groups, tensors = len(metadata.get("groups", ())), len(metadata.get("tensors", ()))
    what = f"{_several(groups, 'clip group')} of {_several(tensors, 'tensor')}"
    steps = metadata.get("steps")
    size = sum(file.stat().st_size for file in trace.path.iterdir())
    where = f"{_shown(trace.path)} ({_size(size)})"
    if isinstance(steps, int):
        return f"Recorded {_several(steps, 'update')}, {what}: {where}"
    state = "is still being recorded" if _alive(metadata.get("pid")) else "was cut off before its end"
    return f"Recorded {what}: {where}; it {state}"


def findings(trace: LaunchedTrace) -> Iterator[str]:
    """What is wrong with how the run clips, one sentence each."""
    for finding in trace.metadata.get("findings", ()):
        yield str(finding.get("message", ""))


def next_command(trace: LaunchedTrace) -> str:
    """What to do with the trace."""
    return f"Next: gradscope inspect {shlex.quote(_shown(trace.path))}"


def why_nothing_was_recorded(settings: RecordSettings) -> str:
    """One line for a command that left no trace."""
    if (why := settings.note(NOT_ATTACHED)) is not None:
        return f"nothing was recorded: {why}"
    if settings.note(STEPS_SEEN) is not None:
        return "nothing was recorded: training ended before the first step to record"
    if settings.note(TORCH_IMPORTED) is not None:
        return (
            "no optimizer step was seen: no torch.optim optimizer stepped where it can be seen (not in torch.compile)"
        )
    if (python := settings.note(NOT_INSTALLED)) is not None:
        return f"no optimizer step was seen: {python} has no gradscope; install it there"
    return "no optimizer step was seen: no Python process imported torch (python -I, -E and -S cannot be followed)"


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


def _alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
