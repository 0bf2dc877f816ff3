"""Logs by the directory that holds them: a Trainer's ``trainer_state.json``, a W&B run, or a run's event files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from gradscope.errors import GradscopeError
from gradscope.sources.step_files import natural_order

TRAINER_STATE = "trainer_state.json"
MAX_DEPTH = 4
MAX_DIRECTORIES = 2000


def is_event_file(name: str) -> bool:
    """Whether TensorBoard would take a file of this name for an event file."""
    return "tfevents" in name


def log_in_directory(directory: Path) -> Path | list[Path] | None:
    """The log of a Trainer (its newest) or of W&B in ``directory``, else the event files of the one run in or below it.

    Raises:
        GradscopeError: there are several runs.
    """
    for pattern in (TRAINER_STATE, f"checkpoint-*/{TRAINER_STATE}", "*.wandb"):
        if found := sorted(directory.glob(pattern), key=lambda path: natural_order(str(path))):
            return found[-1]
    runs = dict(_runs(directory))
    if len(runs) > 1:
        names = sorted((str(run.relative_to(directory)) for run in runs), key=natural_order)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise GradscopeError(
            str(directory), f"holds {len(names)} runs of event files ({shown})", f"name one: {directory / names[-1]}"
        )
    return next(iter(runs.values()), None)


def _runs(directory: Path) -> Iterator[tuple[Path, list[Path]]]:
    """The directories with event files in them, and those files; what lies below a run belongs to it."""
    for seen, (found, below, files) in enumerate(os.walk(directory)):
        place = Path(found)
        events = sorted((name for name in files if is_event_file(name)), key=natural_order)
        if events:
            yield place, [place / name for name in events]
        if events or seen > MAX_DIRECTORIES or len(place.relative_to(directory).parts) >= MAX_DEPTH:
            below.clear()
