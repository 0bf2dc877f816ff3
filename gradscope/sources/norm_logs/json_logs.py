"""JSON Lines, JSON lists of records, JSON columns, and the Hugging Face Trainer's ``trainer_state.json``.

The Trainer's ``grad_norm`` is what its clip returned, the norm before clipping, at the last step before the log is
written (``Trainer._maybe_log_save_evaluate``); its loss, in contrast, is a mean over ``logging_steps``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from gradscope.errors import GradscopeError
from gradscope.notation import count
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.norm_logs.series import NormLog
from gradscope.sources.norm_logs.tables import Records
from gradscope.sources.norm_logs.tags import Tags

MAX_LINE = 16 << 20
# Parsed JSON takes about ten times its size.
MAX_DOCUMENT = 128 << 20
BOM = b"\xef\xbb\xbf"
LINES, DOCUMENT, TRAINER = "JSON Lines log", "JSON log", "Hugging Face Trainer log"


def read_json_log(region: FileRegion, what: str, tags: Tags) -> NormLog:
    """The log in a JSON file of any of these layouts.

    Raises:
        GradscopeError: it is damaged, too large, nested too deep, or laid out otherwise.
    """
    with region.open() as stream:
        first = stream.readline(MAX_LINE)
        if _is_record(first):
            stream.seek(0)
            return _read_lines(stream, what, tags)
    if region.size > MAX_DOCUMENT:
        raise GradscopeError(
            what, f"is one JSON document of more than {MAX_DOCUMENT >> 20} MiB", "save it line by line"
        )
    document = _parsed(region.read(), what)
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        return _read_trainer(document, what, tags)
    records = Records(what, tags)
    for number, record in enumerate(_records(document, what)):
        records.add(record, f"record {number}")
    return records.log(DOCUMENT)


def _is_record(line: bytes) -> bool:
    """Whether a first line is a record by itself, and so the file JSON Lines."""
    try:
        record = json.loads(line.removeprefix(BOM))
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and not any(isinstance(value, list) for value in record.values())


def _read_lines(stream: BinaryIO, what: str, tags: Tags) -> NormLog:
    records, number = Records(what, tags), 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise GradscopeError(what, f"line {number} is longer than {MAX_LINE >> 20} MiB")
        if line.isspace():
            continue
        try:
            # Decoded first: json would look for UTF-16 and UTF-32 in every line.
            record = json.loads(line.removeprefix(BOM).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n") and not isinstance(error, RecursionError):
                return records.log(LINES, f"The last line, {count(len(line))} bytes, is cut off and left out.")
            raise GradscopeError(what, f"line {number} is no JSON ({_fault(error)})") from None
        records.add(record, number)
    return records.log(LINES)


def _parsed(text: bytes, what: str) -> Any:
    try:
        return json.loads(text.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        raise GradscopeError(what, f"is damaged JSON ({_fault(error)})") from None


def _fault(error: ValueError | RecursionError) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error)[:80]


def _records(document: Any, what: str) -> list[Any]:
    """The records of a list, or of columns by name."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise GradscopeError(what, "holds no records")
    columns = {name: values for name, values in document.items() if isinstance(values, list)}
    if not columns:
        return [document]
    if len({len(values) for values in columns.values()}) > 1:
        raise GradscopeError(what, "holds lists of different lengths, which are no columns of one table")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _read_trainer(state: dict[str, Any], what: str, tags: Tags) -> NormLog:
    records = Records(what, tags)
    for number, record in enumerate(state["log_history"]):
        records.add(record, f"log_history[{number}]")
    log = records.log(TRAINER)
    steps, every = state.get("global_step"), state.get("logging_steps")
    logged = max((len(series.values) for series in log.series.values()), default=0)
    meaning = "The norms are those before clipping, as the Trainer's clip returned them."
    if type(steps) is int and steps > logged > 0:
        each = f" (logging_steps {every:g})" if isinstance(every, int | float) and every > 0 else ""
        meaning = (
            f"A sample: the log holds the norms of {count(logged)} of {count(steps)} updates{each}, each that of the "
            "last update before the log was written. They are the norms before clipping."
        )
    return NormLog(
        log.format, log.series, log.others, meaning=(meaning,), max_norm=_max_norm(what), counted=log.counted
    )


def _max_norm(what: str) -> float | None:
    """``max_grad_norm`` of the TrainingArguments beside the log, read by a reader that runs nothing of them."""
    arguments = Path(what).parent / "training_args.bin"
    if not arguments.is_file():
        return None
    from gradscope.sources.checkpoints.huggingface import max_grad_norm

    return max_grad_norm(arguments.parent)[0]
