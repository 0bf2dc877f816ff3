"""Where a result goes: the terminal, a pipe, or a file written in one piece."""

from __future__ import annotations

import io
import os
import shutil
import stat
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from gradscope.commands.overwriting import refuse_overwriting
from gradscope.errors import GradscopeError
from gradscope.printable import printable
from gradscope.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradscope.views import Format, Result
    from gradscope.views.choices import By, Sort

PIPED_WIDTH = 80
WIDEST = 140
# A terminal that can show these can show all that the tables use.
_PROBE = "▸█▌…°×–▲"


@dataclass(frozen=True, slots=True)
class Destination:
    """The output's format, and its file; None is standard output."""

    format: Format
    file: str | None
    no_color: bool
    quiet: bool

    def refuse_unusable(self, inputs: Sequence[str]) -> None:
        """Find out before a long read that the file cannot be written, or holds what must not be lost.

        Raises GradscopeError.
        """
        if self.file is None:
            if sys.stdout is None:
                raise GradscopeError("standard output", "is closed", "-o FILE writes to a file")
            return
        if not self.file:
            raise GradscopeError("-o", "needs the name of a file")
        if os.path.isdir(self.file):
            raise GradscopeError(f"-o {self.file}", "is a directory")
        parent = os.path.dirname(os.path.realpath(self.file))
        if not os.path.isdir(parent):
            raise GradscopeError(f"-o {self.file}", f"there is no directory {parent}")
        refuse_overwriting(self.file, inputs)

    def show(
        self, result: Result, opening: str, *, by: By = "layer", top: int | None = None, sort: Sort = "share"
    ) -> None:
        """Write ``result``; ``opening`` is the sentence about a source that was not named."""
        from gradscope.views import VIEWS
        from gradscope.views.choices import ViewChoices

        if opening and self.format != "table":
            print(printable(opening), file=sys.stderr)
        colour = self.file is None and not self.no_color and _colours_wanted(sys.stdout)
        choices = ViewChoices(
            by=by,
            top=top,
            sort=sort,
            width=self.width,
            colour=colour,
            unicode=self.file is not None or _carries_unicode(sys.stdout),
            opening=opening if self.format == "table" else "",
        )
        self.write(VIEWS[self.format](result, choices))

    @property
    def width(self) -> int:
        """How many cells a line may take."""
        return _width(sys.stdout if self.file is None else None)

    def write(self, text: str) -> None:
        """Write ``text``: all of it or, to a file, nothing.

        Raises GradscopeError if that is not possible.
        """
        if self.file is None:
            _write_to_stdout(text)
            return
        _write_to_file(self.file, text)
        if not self.quiet:
            print(f"Wrote {printable(self.file)}", file=sys.stderr)


def _colours_wanted(out: TextIO) -> bool:
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _carries_unicode(out: TextIO) -> bool:
    try:
        _PROBE.encode(out.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _width(out: TextIO | None) -> int:
    """COLUMNS, else the terminal's width, else PIPED_WIDTH; never so wide that a line is hard to follow."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return min(int(columns), WIDEST)
    if out is None or not out.isatty():
        return PIPED_WIDTH
    return min(shutil.get_terminal_size((PIPED_WIDTH, 24)).columns, WIDEST)


def _write_to_stdout(text: str) -> None:
    """Write and flush; a reader that has seen enough (``| head``) is no failure.

    Raises GradscopeError if standard output is closed or full.
    """
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        # Rows end as the view says, and a name that the encoding cannot carry is escaped rather than fatal.
        out.reconfigure(errors="backslashreplace", newline="")
    try:
        out.write(text)
        out.flush()
    except BrokenPipeError:
        # What is left in the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    except OSError as error:
        raise GradscopeError("standard output", error.strerror or str(error)) from None


def _write_to_file(path: str, text: str) -> None:
    """Write all of ``text`` or nothing: into a file beside ``path`` that then takes its place.

    Raises GradscopeError if that is not possible.
    """
    try:
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            _write_to_device(path, text)
            return
        with whole_file(path) as out:
            out.write(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise GradscopeError(f"-o {path}", error.strerror or str(error)) from None


def _write_to_device(path: str, text: str) -> None:
    """/dev/null, /dev/stdout or a pipe cannot be replaced; a pipe that nobody reads is an error, not a wait."""
    descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    os.set_blocking(descriptor, True)
    with open(descriptor, "w", encoding="utf-8", errors="backslashreplace", newline="") as out:
        out.write(text)
