"""``gradscope record``: run a training command and record its gradients."""

from __future__ import annotations

import contextlib
import os
import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from gradscope.commands import options
from gradscope.errors import GradscopeError
from gradscope.printable import printable

if TYPE_CHECKING:
    from gradscope.recording.settings import RecordSettings

WHAT = "What to record"


class DetailName(str, Enum):
    """How much is stored of each step."""

    DEFAULT = "default"
    FULL = "full"
    NORMS = "norms"


class StopOn(str, Enum):
    """What ends a run."""

    NONFINITE = "nonfinite"


def record(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="COMMAND...", show_default=False, help="The training command, as you would type it."),
    ] = None,
    every: Annotated[
        int, typer.Option("--every", min=1, metavar="N", help="Only every N-th step.", rich_help_panel=WHAT)
    ] = 1,
    start: Annotated[
        int, typer.Option("--start", min=0, metavar="N", help="Only from step N on.", rich_help_panel=WHAT)
    ] = 0,
    max_steps: Annotated[
        int | None,
        typer.Option("--max-steps", min=1, metavar="N", help="Only N steps; training goes on.", rich_help_panel=WHAT),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include", metavar="GLOB", help="Only parameters with such names; repeatable.", rich_help_panel=WHAT
        ),
    ] = None,
    stop_on: Annotated[
        StopOn | None,
        typer.Option(
            "--stop-on",
            help="End the run by a FloatingPointError at the first step that used NaN or Inf.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    detail: Annotated[
        DetailName,
        typer.Option(
            "--detail",
            help="Spectra of the tensors at every 10th step, at every step (full), or none at all (norms).",
            rich_help_panel=WHAT,
        ),
    ] = DetailName.DEFAULT,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="NAME.gradscope",
            help="The trace; by default it is named after the script.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the trace that -o names.", rich_help_panel=options.OUTPUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Only what is wrong.", rich_help_panel=options.OUTPUT)
    ] = False,
    debug: options.Debug = False,
) -> int:
    """Run a training command unchanged, and record the gradient of every optimizer step before it is clipped.

    What comes after -- is the command: gradscope record -- python train.py --lr 3e-4. Its exit code is kept.
    """
    if not command:
        raise GradscopeError("record", "no command was given", "gradscope record -- python train.py")

    import tempfile
    import uuid

    from gradscope.recording.launching import end_like, find_program, recorded_environment, run_command
    from gradscope.recording.settings import RecordSettings
    from gradscope.recording.trace_names import default_trace, named_trace

    program = find_program(command[0])
    path = named_trace(output, force) if output is not None else default_trace(command)
    with tempfile.TemporaryDirectory(prefix="gradscope-", ignore_cleanup_errors=True) as notes:
        settings = RecordSettings(
            path=str(path),
            launch=uuid.uuid4().hex,
            notes=notes,
            command=tuple(command),
            every=every,
            start=start,
            max_steps=max_steps,
            include=tuple(include) if include else None,
            detail=detail.value,
            stop_on=stop_on.value if stop_on else None,
            force=force,
            quiet=quiet,
        )
        code = run_command(program, command, recorded_environment(settings, os.environ))
        _say_what_was_recorded(settings, code)
    return end_like(code)


def _say_what_was_recorded(settings: RecordSettings, code: int) -> None:
    from gradscope.recording import outcome
    from gradscope.recording.settings import STOPPED

    traces = outcome.launched_traces(settings)
    left = [trace for trace in traces if not outcome.removed(trace)]
    if not left:
        _say(f"gradscope: {outcome.why_nothing_was_recorded(settings, bool(traces), code)}")
    for trace in traces:
        if trace in left and not settings.quiet:
            _say(outcome.summary(trace, code))
        for finding in trace.metadata.findings:
            _say(f"warning: {finding.message}")
    if left and (why := settings.note(STOPPED)) is not None:
        _say(f"warning: {why}")
    if left and len(left) < len(traces):
        _say(f"warning: {outcome.lost(len(traces) - len(left))}")
    readable = next((trace for trace in left if trace.steps), None)
    if readable is not None and not settings.quiet:
        _say(outcome.next_command(readable))


def _say(line: str) -> None:
    """A line on stderr: standard output is the command's."""
    if sys.stderr is not None:
        # Whoever read stderr may have gone; the command's exit code still counts.
        with contextlib.suppress(OSError):
            print(printable(line), file=sys.stderr, flush=True)
