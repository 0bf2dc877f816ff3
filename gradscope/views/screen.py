"""What a reader is shown of a result: an opening line, sentences, tables, closing lines; no layout yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Tone = Literal["plain", "strong", "quiet", "alarm"]
# A line laid out: stretches of text, each with its style in rich's words.
Line = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Column:
    """One column.  Where room is short, columns with the highest ``spare`` go first; those with 0 stay.

    ``note`` says what the column holds, in a footnote that goes where the column goes.
    """

    title: str
    align: Literal["left", "right"] = "right"
    spare: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a text per column; ``bar`` is the length of its bar, 0 to 1."""

    cells: tuple[str, ...]
    bar: float | None = None
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column holds names, which may be shortened; nothing else ever is."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    caption: str = ""

    def footnote(self, columns: Iterable[Column], said: set[str]) -> str:
        """The caption, and the notes of ``columns`` as far as they are not in ``said``, where they are put down."""
        notes = [column.note for column in columns if column.note and column.note not in said]
        said.update(notes)
        return "; ".join([*notes, self.caption] if self.caption else notes)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts over bins whose ``edges`` ascend, from ``smallest`` to ``largest`` value.

    ``marks`` are named values to point at.
    """

    title: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    smallest: float
    largest: float
    marks: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sentence:
    """A line of prose; findings carry a ``▸``.

    ``head`` is a name before the text; where there is one, the tone is the head's alone.
    """

    text: str
    finding: bool = False
    tone: Tone = "plain"
    head: str = ""


Block = Sentence | Table | Histogram


@dataclass(frozen=True, slots=True)
class Screen:
    """Blocks in reading order; consecutive sentences belong together."""

    blocks: tuple[Block, ...]
