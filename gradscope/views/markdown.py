"""A screen as GitHub-flavoured markdown, for a pull request or a job summary."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gradscope.notation import count, number, percent
from gradscope.printable import printable
from gradscope.views.screen import Block, Histogram, Screen, Sentence, Table
from gradscope.views.terminal import bar_text

_BAR_WIDTH = 20
# What markdown or HTML would take for its own; names of layers and files are shown as they are.
# An underscore within a word is an underscore on GitHub, too.
_SPECIAL = re.compile(r"([\\`*{}\[\]<>#|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def markdown_text(screen: Screen) -> str:
    """``screen`` with its findings as a list and its tables as tables."""
    return "\n\n".join("\n".join(lines) for lines in _paragraphs(screen.blocks)) + "\n"


def escaped(text: str) -> str:
    """``text`` as literal markdown, also inside a table."""
    return _SPECIAL.sub(r"\\\1", printable(text))


def _paragraphs(blocks: Sequence[Block]) -> Iterator[list[str]]:
    listed: list[str] = []
    said: set[str] = set()
    for block in blocks:
        if isinstance(block, Sentence) and block.finding:
            listed.append(f"- {_headed(block)}")
            continue
        if listed:
            yield listed
            listed = []
        yield from _paragraph(block, said)
    if listed:
        yield listed


def _paragraph(block: Block, said: set[str]) -> Iterator[list[str]]:
    if isinstance(block, Sentence):
        text = _headed(block)
        yield [f"**{text}**" if block.tone == "strong" and not block.head else text]
    elif isinstance(block, Table):
        if block.title:
            yield [f"**{escaped(block.title)}**"]
        yield _table_lines(block)
        if footnote := block.footnote(block.columns, said):
            yield [f"_{escaped(footnote)}_"]
    else:
        yield _histogram_lines(block)


def _headed(sentence: Sentence) -> str:
    text = escaped(sentence.text)
    return f"**{escaped(sentence.head)}**: {text}" if sentence.head else text


def _table_lines(table: Table) -> list[str]:
    has_bar = any(row.bar is not None for row in table.rows)
    titles = [column.title for column in table.columns]
    rules = ["---" if column.align == "left" else "---:" for column in table.columns]
    lines = [_line([*titles, *[""] * has_bar]), "|" + "|".join([*rules, *["---"] * has_bar]) + "|"]
    for row in table.rows:
        bar = bar_text(row.bar, _BAR_WIDTH) if row.bar is not None else ""
        cells = [f"**{escaped(cell)}**" if row.tone == "strong" and cell else escaped(cell) for cell in row.cells]
        lines.append("| " + " | ".join([*cells, *[bar] * has_bar]) + " |")
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def _histogram_lines(histogram: Histogram) -> list[str]:
    total, tallest = sum(histogram.counts), max(histogram.counts)
    lines = ["| norm | count | share | |", "|---:|---:|---:|---|"]
    bins = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    lines += [
        _line([f"{number(low)} – {number(high)}", count(n), percent(n / total), bar_text(n / tallest, _BAR_WIDTH)])
        for low, high, n in bins
        if n
    ]
    return lines
