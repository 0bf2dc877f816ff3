"""``gradscope export``: a recorded run as a table for other tools."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradscope.commands import options
from gradscope.errors import GradscopeError
from gradscope.printable import printable

if TYPE_CHECKING:
    from gradscope.sources.traces import RecordedTrace


class Per(str, Enum):
    """What a row of the table stands for, at one step."""

    GROUP = "group"
    TENSOR = "tensor"


def export(
    trace: Annotated[
        str | None,
        typer.Argument(
            metavar="TRACE",
            show_default=False,
            help="A *.gradscope directory. Without one: the newest in the working directory or two levels below it.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The file to write: .parquet, .csv or .jsonl.", show_default=False
        ),
    ] = None,
    by: Annotated[
        Per, typer.Option("--by", help="One row per step and clip group, or per step and tensor.")
    ] = Per.GROUP,
    steps: options.Steps = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a recorded run as a table: Parquet, CSV or JSONL, by the suffix of FILE.

    Shards of several ranks are added up; copies count once.
    """
    if output is None:
        raise GradscopeError("-o", "is missing", "-o run.parquet, run.csv or run.jsonl says where to write, and what")
    from gradscope.trace.exporting import SUFFIXES

    suffix = os.path.splitext(output)[1].lower()
    if suffix not in SUFFIXES:
        raise GradscopeError(f"-o {output}", f"must end in one of {', '.join(SUFFIXES)}")
    source = _trace(trace, quiet)
    _refuse_unusable(output, source)
    rows = _write(source, output, suffix, by, steps, quiet)
    if not quiet:
        _say(f"Wrote {output}: {rows:,} rows")


def _trace(path: str | None, quiet: bool) -> RecordedTrace:
    from gradscope.commands.reading import choose_source
    from gradscope.sources.traces import RecordedTrace

    source, opening = choose_source([path] if path else None, None, quiet)
    if not isinstance(source, RecordedTrace):
        raise GradscopeError(
            source.info.path, f"is no recorded run ({source.info.format})", "gradscope record -- COMMAND makes one"
        )
    if not quiet:
        for sentence in (*([opening] if opening else []), *source.notes):
            _say(sentence)
    return source


def _refuse_unusable(output: str, source: RecordedTrace) -> None:
    """Nothing but an earlier export may be replaced.  Raises GradscopeError."""
    from gradscope.commands.destination import Destination
    from gradscope.trace.exporting import is_exported_parquet

    if not (os.path.isfile(output) and is_exported_parquet(Path(output))):
        Destination("csv", output, True, True).refuse_unusable([source.info.path])


def _write(source: RecordedTrace, output: str, suffix: str, by: Per, steps: str | None, quiet: bool) -> int:
    from gradscope.commands.reading import reading
    from gradscope.commands.replacing import replacing
    from gradscope.selection import select_steps
    from gradscope.trace.exporting import export

    places = select_steps(steps, source.info.steps)
    with reading(source, quiet, from_start=False) as progress, replacing(output) as out:
        return export(source.recorded_run, places, by.value, suffix, out, source.told_of(progress, len(places)))


def _say(sentence: str) -> None:
    if sys.stderr is not None:
        print(printable(sentence), file=sys.stderr)
