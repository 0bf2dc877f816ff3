"""The files of a trace: made when the first step is recorded, and removed where none was written."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gradscope.errors import GradscopeError
from gradscope.recording.trace_names import is_trace
from gradscope.trace.schema import METADATA_FILE, TraceMetadata, stream_name

if TYPE_CHECKING:
    from gradscope.trace.writer import TraceWriter

MOST_TRACES = 10_000
_OWN_FILE = re.compile(r"trace\.json|rank-\d{5}\.(arrows|json)|\..*\.tmp")


def open_trace(path: Path, metadata: TraceMetadata, force: bool) -> tuple[Path, TraceWriter]:
    """A writer for this rank in ``path``, or in the first of ``NAME-2.gradscope``… where its rank is not taken.

    ``metadata.run`` is the same for every process of a run: ranks of one run share a directory, while a process
    with a rank that is taken (a sweep's second training, a restarted worker) begins another.  With ``force`` a trace of
    another run at ``path`` is replaced.

    Raises OSError where no file can be made, FileExistsError where all names are taken.
    """
    from gradscope.trace.writer import TraceWriter

    if force and is_trace(path) and run_of(path) != metadata.run:
        _replace(path)
    for number in range(1, MOST_TRACES):
        directory = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        if directory.exists() and not _belongs(directory, metadata):
            continue
        try:
            return directory, TraceWriter(directory, metadata)
        except FileExistsError:
            continue
    raise FileExistsError(f"{path} and every numbered name beside it are taken")


def steps_on_disk(path: Path) -> int:
    """The steps that can be read back: those of the rank that holds the most."""
    from gradscope.trace.reader import RankTrace

    most = 0
    for stream in path.glob("rank-*.arrows"):
        with suppress(GradscopeError, ValueError, OSError):
            most = max(most, len(set(RankTrace.open(path, int(stream.stem.removeprefix("rank-"))).step.tolist())))
    return most


def remove_if_empty(path: Path, run: str) -> bool:
    """Remove the trace of ``run``, which nobody writes to any more, if no rank has written a row; whether it is gone.

    A directory that holds anything else stays.
    """
    from gradscope.trace.stream import RowStream

    try:
        entries = list(path.iterdir())
        if run_of(path) != run or not all(_OWN_FILE.fullmatch(entry.name) for entry in entries):
            return False
        if any(RowStream.open(entry).blocks for entry in entries if entry.suffix == ".arrows"):
            return False
        for entry in entries:
            entry.unlink()
        path.rmdir()
    except (OSError, GradscopeError):
        return False
    return True


def _belongs(directory: Path, metadata: TraceMetadata) -> bool:
    """Whether ``directory`` is this run's and waits for this rank: a single process shares with nobody."""
    try:
        streams = [entry.name for entry in directory.iterdir()]
    except OSError:
        # A file, or somebody else's.
        return False
    if stream_name(metadata.rank) in streams:
        return False
    if metadata.world_size == 1:
        return not streams
    # Another rank may just be making it: then there is no trace.json to ask yet.
    return METADATA_FILE not in streams or run_of(directory) == metadata.run


def run_of(path: Path) -> str | None:
    """``TraceMetadata.run`` of the trace at ``path``; None where it cannot be read."""
    try:
        held = json.loads((path / METADATA_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return held.get("run") if isinstance(held, dict) else None


def _replace(path: Path) -> None:
    """Rename before removing: another rank must not see half a trace."""
    doomed = path.with_name(f".{path.name}.replaced")
    try:
        path.rename(doomed)
    except OSError:
        # Another rank was quicker.
        return
    shutil.rmtree(doomed, ignore_errors=True)
