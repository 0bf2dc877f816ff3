"""CSV and its kin: any separator, quoted or not, W&B's chart and history exports among them.

A chart export of W&B has the columns ``Step``, ``RUN - TAG``, ``RUN - TAG__MIN`` and ``RUN - TAG__MAX``; where the
three differ, the chart had put several logged values into one point.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradscope.errors import GradscopeError
from gradscope.notation import count
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.norm_logs.series import FloatArray, IntArray, NormLog, is_step, log_of_table
from gradscope.sources.norm_logs.tables import GrowingColumn
from gradscope.sources.norm_logs.tags import Tags, is_gradient_norm

if TYPE_CHECKING:
    from pyarrow.csv import CSVStreamingReader

DELIMITERS = (",", "\t", ";")
SAMPLE_BYTES = 1 << 20
BLOCK_BYTES = 4 << 20
MISSING = ["", "null", "NULL", "None", "NA", "N/A", "<NA>"]
BOM = b"\xef\xbb\xbf"


class _Ragged(NamedTuple):
    """A row with more or fewer fields than there are columns."""

    line: int
    expected: int
    fields: int


def looks_like_csv(head: bytes) -> bool:
    """Whether the first two lines have equally many separators, or the first is the name of a norm and nothing else."""
    lines = head.splitlines()[:2]
    if b"\0" in head or len(lines) < 2:
        return False
    if any(0 < lines[0].count(mark.encode()) == lines[1].count(mark.encode()) for mark in DELIMITERS):
        return True
    return is_gradient_norm(_text(lines[0])) and _is_number(_text(lines[1]))


def read_csv_log(region: FileRegion, what: str, tags: Tags) -> NormLog:
    """The log in a CSV file.

    Raises:
        GradscopeError: it has no header, rows of different lengths, or text where a norm should be.
    """
    delimiter, names, sample = _header(region, what)
    numeric = [name for i, name in enumerate(names) if _is_numeric([row[i] for row in sample if i < len(row)])]
    wanted = [name for name in names if is_step(name) or tags.wants(name)]
    spreads = [f"{name}__{end}" for name in wanted for end in ("MIN", "MAX") if f"{name}__{end}" in names]
    columns, notes = _columns(what, delimiter, names, [*wanted, *spreads])
    others = tuple(name for name in numeric if name not in columns and not name.endswith(("__MIN", "__MAX")))
    format_ = "W&B chart export" if spreads else "W&B history" if {"_step", "_runtime"} & set(names) else "CSV log"
    tables = {name: columns[name].whole() for name in wanted if name in numeric or not is_step(name)}
    notes += [note for name in wanted if (note := _averaged(name, columns))]
    return log_of_table(format_, tables, others, *notes)


def _header(region: FileRegion, what: str) -> tuple[str, list[str], list[list[str]]]:
    """The separator, the names of the columns, and the first few rows."""
    with region.open() as stream:
        head = stream.read(SAMPLE_BYTES)
    lines = head.removeprefix(BOM).splitlines()
    if len(head) == SAMPLE_BYTES:
        lines = lines[:-1]
    if not lines:
        raise GradscopeError(what, f"its first line is longer than {SAMPLE_BYTES >> 20} MiB")
    try:
        text = [line.decode("utf-8") for line in lines[:50]]
    except UnicodeDecodeError:
        raise GradscopeError(what, "is not UTF-8") from None
    delimiter = max(DELIMITERS, key=text[0].count)
    try:
        names, *sample = list(csv.reader(text, delimiter=delimiter))
    except csv.Error as error:
        raise GradscopeError(what, f"is damaged CSV ({error})") from None
    names = [name.strip() for name in names]
    if all(_is_number(name) for name in names):
        raise GradscopeError(what, "has no header line that names its columns")
    if twice := [name for name, times in Counter(names).items() if times > 1 and name]:
        raise GradscopeError(what, f"has two columns called {twice[0]}")
    return delimiter, names, sample


def _columns(
    what: str, delimiter: str, names: Sequence[str], wanted: Sequence[str]
) -> tuple[dict[str, GrowingColumn], list[str]]:
    """The ``wanted`` columns, and notes on what was left out."""
    import pyarrow

    columns = {name: GrowingColumn() for name in wanted}
    ragged: list[_Ragged] = []
    rows = 0
    try:
        for batch in _open(what, delimiter, names, wanted, ragged) if wanted else ():
            for name, strings in zip(wanted, batch.columns, strict=True):
                columns[name].extend(*_numbers(strings, what, name, rows))
            rows += batch.num_rows
    except pyarrow.ArrowInvalid as error:
        raise GradscopeError(what, _fault(str(error))) from None
    return columns, _cut_off(ragged, rows, what)


def _open(
    what: str, delimiter: str, names: Sequence[str], wanted: Sequence[str], ragged: list[_Ragged]
) -> CSVStreamingReader:
    import pyarrow
    from pyarrow import csv as arrow_csv

    def note(row: Any) -> str:
        if len(ragged) < 2:
            ragged.append(_Ragged(row.number, row.expected_columns, row.actual_columns))
        return "skip"

    return arrow_csv.open_csv(
        what,
        # One thread, so that rows are numbered.
        read_options=arrow_csv.ReadOptions(
            use_threads=False, block_size=BLOCK_BYTES, column_names=list(names), skip_rows=1
        ),
        parse_options=arrow_csv.ParseOptions(delimiter=delimiter, invalid_row_handler=note),
        convert_options=arrow_csv.ConvertOptions(
            include_columns=list(wanted),
            column_types=dict.fromkeys(wanted, pyarrow.string()),
            null_values=MISSING,
            strings_can_be_null=True,
        ),
    )


def _numbers(strings: Any, what: str, name: str, start: int) -> tuple[IntArray, FloatArray]:
    """The values of a piece of a column that begins at row ``start``, and the numbers of their rows."""
    import pyarrow
    from pyarrow import compute

    held = strings.is_valid().to_numpy(zero_copy_only=False)
    stripped = compute.utf8_trim_whitespace(strings.drop_null())
    try:
        values = compute.cast(stripped, pyarrow.float64()).to_numpy(zero_copy_only=False)
    except pyarrow.ArrowInvalid:
        if is_step(name):
            # Not a column of steps, then.
            return np.empty(0, np.int64), np.empty(0)
        texts = stripped.to_pylist()
        place = next(place for place, text in enumerate(texts) if not _is_number(text))
        row = start + int(np.flatnonzero(held)[place])
        raise GradscopeError(what, f"row {row + 1}: {name} is {texts[place][:40]!r}, not a number") from None
    return np.flatnonzero(held) + start, values


def _cut_off(ragged: Sequence[_Ragged], rows: int, what: str) -> list[str]:
    """A note, where only the last row is short, as in a file that is being written."""
    if not ragged:
        return []
    first = ragged[0]
    # The header is line 1.
    if len(ragged) == 1 and first.line > rows + 1 and first.fields < first.expected:
        return [f"The last row is cut off ({first.fields} of {first.expected} columns) and left out."]
    raise GradscopeError(what, f"line {first.line} has {first.fields} columns, and its header {first.expected}")


def _averaged(name: str, columns: Mapping[str, GrowingColumn]) -> str | None:
    """A note, where W&B's chart had averaged several steps into one point."""
    ends = [columns.get(f"{name}__{end}") for end in ("MIN", "MAX")]
    if None in ends:
        return None
    value, least, most = (column.whole() for column in (columns[name], *ends) if column is not None)
    if not len(value.values) == len(least.values) == len(most.values):
        return None
    averaged = int((least.values < most.values).sum())
    if not averaged:
        return None
    return (
        f"{count(averaged)} of {count(len(value.values))} points of {name} are means of several steps, as the chart "
        "drew them: export the run's history for the norms themselves."
    )


def _is_numeric(texts: Sequence[str]) -> bool:
    held = [text.strip() for text in texts if text.strip() not in MISSING]
    return bool(held) and all(map(_is_number, held))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _text(line: bytes) -> str:
    return line.removeprefix(BOM).decode("utf-8", "replace").strip().strip('"')


def _fault(message: str) -> str:
    if "straddl" in message:
        return f"a line is longer than {BLOCK_BYTES >> 20} MiB"
    return "is not UTF-8" if "UTF8" in message else f"is damaged CSV ({message.splitlines()[0][:100]})"
