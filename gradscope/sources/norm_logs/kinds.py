"""Which format a log is in, told by its first bytes and, for text that could be anything, by its name."""

from __future__ import annotations

from typing import Literal

from gradscope.sources.formats.file_region import FileRegion

Kind = Literal["event file", "Parquet", "W&B run", "JSON", "CSV"]

HEAD_BYTES = 1 << 16
CSV_SUFFIXES = (".csv", ".tsv")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


def kind_of_log(region: FileRegion) -> Kind | None:
    """The format of the log in ``region``; None if it is no log."""
    with region.open() as stream:
        head = stream.read(HEAD_BYTES)
    if b"brain.Event:" in head[:64]:
        return "event file"
    if head.startswith(b"PAR1"):
        return "Parquet"
    if head.startswith(b":W&B"):
        return "W&B run"
    if b"\0" in head:
        return None
    name, text = region.path.lower(), head.removeprefix(b"\xef\xbb\xbf").strip()
    if text[:1] in (b"{", b"[") or (text and name.endswith(JSON_SUFFIXES)):
        return "JSON"
    if text and name.endswith(CSV_SUFFIXES):
        return "CSV"
    from gradscope.sources.norm_logs.csv_logs import looks_like_csv

    return "CSV" if looks_like_csv(head) else None
