"""Which source a command reads, and the progress it shows meanwhile."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any, Literal

from gradscope.errors import GradscopeError
from gradscope.sources import open_source

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from gradscope.backward.options import BatchOptions
    from gradscope.commands.options import ReadAs
    from gradscope.gradients import GradientSource, Progress

# A read that ends sooner needs no progress.
PATIENCE_SECONDS = 0.5


def choose_source(
    paths: list[str] | None,
    as_: ReadAs | None,
    quiet: bool,
    weights: str | None = None,
    tag: str | None = None,
    batch: BatchOptions | None = None,
) -> tuple[GradientSource, str]:
    """The source at ``paths``, else the default one with the sentence that says so (empty if ``quiet``).

    With a ``batch``, it is that of the gradients that the checkpoint there has on it.

    Raises GradscopeError if there is none, or it cannot be read.
    """
    _refuse_empty(paths)
    read_as: Literal["gradients", "weights"] | None = as_.value if as_ else None
    if paths:
        return _open(paths[0] if len(paths) == 1 else paths, read_as, weights, tag, batch), ""
    from gradscope.sources.default import default_source

    path, sentence = default_source()
    return _open(path, read_as, weights, tag, batch), "" if quiet else sentence


def choose_sources(
    paths: list[str] | None, as_: ReadAs | None, quiet: bool, tag: str | None = None, batch: BatchOptions | None = None
) -> tuple[list[GradientSource], str]:
    """As :func:`choose_source`, with each of ``paths`` a source by itself, but for single dumps: they are steps of one.

    Raises GradscopeError if there is none, or one cannot be read.
    """
    if not paths:
        source, opening = choose_source(None, as_, quiet, tag=tag, batch=batch)
        return [source], opening
    _refuse_empty(paths)
    if batch is not None:
        return [choose_source([path], as_, quiet, tag=tag, batch=batch)[0] for path in paths], ""
    from gradscope.sources.opening_each import open_each

    return open_each(paths, as_=as_.value if as_ else None, tag=tag), ""


def _refuse_empty(paths: list[str] | None) -> None:
    """An empty path, as of a variable that is not set, would be the working directory."""
    if paths and not all(paths):
        raise GradscopeError("PATH", "is empty")


def _open(
    source: Any,
    as_: Literal["gradients", "weights"] | None,
    weights: str | None,
    tag: str | None,
    batch: BatchOptions | None,
) -> GradientSource:
    if batch is None:
        return open_source(source, as_=as_, weights=weights, tag=tag)
    from gradscope.backward.opening import open_with_batch

    with left_alone():
        return open_with_batch(source, batch, as_=as_, weights=weights, tag=tag)


@contextmanager
def left_alone() -> Iterator[None]:
    """What a model or a loss prints goes to stderr: standard output is the result's.  What it asks nobody answers."""
    asked = sys.stdin
    with redirect_stdout(sys.stderr), open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = asked


@contextmanager
def reading(source: GradientSource, quiet: bool, from_start: bool) -> Iterator[Progress | None]:
    """The progress of reading ``source``, whose first step is read ahead if the reading is ``from_start``."""
    with (
        left_alone(),
        _progress(quiet, source.read_unit) as progress,
        source.reading_ahead(progress) if from_start else nullcontext(),
    ):
        yield progress


@contextmanager
def _progress(quiet: bool, unit: str) -> Iterator[Progress | None]:
    """A progress bar on stderr for reads that take long; None where nobody would see it."""
    if quiet or sys.stderr is None or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield None
        return
    bar = _Bar(unit)
    try:
        yield bar
    finally:
        bar.close()


class _Bar:
    """Told of every piece read; draws from PATIENCE_SECONDS on."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._start = time.monotonic()
        self._rich: RichProgress | None = None

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if self._rich is None:
            if time.monotonic() - self._start < PATIENCE_SECONDS:
                return
            self._rich = _rich_progress(self._unit)
            self._rich.add_task("reading", total=total_bytes)
            self._rich.start()
        self._rich.update(self._rich.task_ids[0], completed=done_bytes, total=total_bytes)

    def close(self) -> None:
        if self._rich is not None:
            self._rich.stop()


def _rich_progress(unit: str) -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    in_bytes = unit == "bytes"
    return Progress(
        TextColumn("reading" if in_bytes else unit),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
