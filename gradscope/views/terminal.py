"""A screen as text for a terminal: prose wrapped, tables fitted to the width, styles as ANSI or left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rich.cells import cell_len

from gradscope.printable import printable
from gradscope.views.choices import ViewChoices
from gradscope.views.histogram import histogram_lines
from gradscope.views.screen import Block, Column, Line, Row, Screen, Sentence, Table, Tone
from gradscope.views.wrapping import shortened, wrapped

MARGIN = "  "
GAP = 2
COMFORTABLE_NAME = 34
NARROWEST_BAR = 6
# Room that a column which may be spared leaves to the bar.
COMFORTABLE_BAR = 14
WIDEST_BAR = 20
# Prose wider than this is tiring to read.
WIDEST_PROSE = 100
# Red alone is a colour that can be read on black and on white, whatever shades a terminal gives to the names; what
# else stands out does so in the text's own colour.
_STYLES: dict[Tone, str] = {"plain": "", "strong": "bold", "quiet": "dim", "alarm": "bold red"}
_EIGHTHS = " ▏▎▍▌▋▊▉"
_ASCII = {
    "▸": ">", "…": "~", "–": "-", "—": "-", "−": "-", "×": "x", "°": " deg", "≤": "<=", "≥": ">=", "≈": "~", "·": "|",
    "±": "+/-", "→": "->", "₂": "2", "\u00a0": " ", "‖": "||", "²": "^2", "’": "'", "“": '"', "”": '"',
}  # fmt: skip


def terminal_text(screen: Screen, choices: ViewChoices) -> str:
    """``screen`` laid out in ``choices.width`` cells, ending in a newline."""
    lines = list(_lines(screen, choices))
    if not choices.colour:
        return "".join("".join(text for text, _ in line).rstrip() + "\n" for line in lines)
    return _with_ansi(lines, choices.width)


def _with_ansi(lines: Iterable[Line], width: int) -> str:
    from io import StringIO

    from rich.console import Console
    from rich.text import Text

    out = StringIO()
    console = Console(
        file=out, force_terminal=True, color_system="standard", width=width, no_color=False, legacy_windows=False
    )
    for line in lines:
        console.print(Text.assemble(*line), soft_wrap=True, highlight=False)
    return out.getvalue()


def _lines(screen: Screen, choices: ViewChoices) -> Iterator[Line]:
    before: Block | None = None
    said: set[str] = set()
    for block in screen.blocks:
        if before is not None and not _belong_together(before, block):
            yield []
        if isinstance(block, Sentence):
            yield from _sentence(block, choices)
        elif isinstance(block, Table):
            yield from _table(block, choices, said)
        else:
            yield from histogram_lines(block, choices)
        before = block


def _belong_together(before: Block, block: Block) -> bool:
    if not (isinstance(before, Sentence) and isinstance(block, Sentence)):
        return False
    return (before.finding, before.tone) == (block.finding, block.tone)


def spelled(text: str, choices: ViewChoices) -> str:
    """``text`` in characters that the output can carry."""
    text = printable(text)
    if choices.unicode or text.isascii():
        return text
    return "".join(c if c.isascii() else _ASCII.get(c) or ascii(c)[1:-1] for c in text)


# --- prose -----------------------------------------------------------------------------------------------------------


def _sentence(sentence: Sentence, choices: ViewChoices) -> Iterator[Line]:
    width = min(choices.width, WIDEST_PROSE)
    style = _STYLES[sentence.tone]
    head = spelled(sentence.head, choices)
    text = spelled(f"{sentence.head}: {sentence.text}" if head else sentence.text, choices)
    first, *others = wrapped(text, width - GAP if sentence.finding else width)
    marked: Line = [(spelled("▸", choices), "bold"), (" ", "")] if sentence.finding else []
    margin, style_after = MARGIN if sentence.finding else "", "" if head else style
    named = len(head) if first.startswith(head) else 0
    yield [*marked, (first[:named], style), (first[named:], style_after)]
    yield from ([(margin + line, style_after)] for line in others)


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(table: Table, choices: ViewChoices, said: set[str]) -> Iterator[Line]:
    columns = [replace(column, title=spelled(column.title, choices)) for column in table.columns]
    rows = [Row(tuple(spelled(cell, choices) for cell in row.cells), row.bar, row.tone) for row in table.rows]
    kept, widths, bar = _fitted(columns, rows, choices.width)
    if table.title:
        yield from ([(line, "bold")] for line in wrapped(spelled(table.title, choices), choices.width))
        yield []
    heads = Row(tuple(column.title for column in columns), tone="quiet")
    for row in [heads, *rows]:
        yield _table_line(row, columns, kept, widths, bar, choices)
    footnote = table.footnote((columns[i] for i in kept), said)
    for line in wrapped(spelled(footnote, choices), choices.width - GAP) if footnote else []:
        yield [(MARGIN + line, "dim")]


def _fitted(columns: Sequence[Column], rows: Sequence[Row], width: int) -> tuple[list[int], list[int], int]:
    """The columns that fit, their widths, and what is left for the bar (0: no bar)."""
    natural = [
        max([cell_len(column.title), *(cell_len(row.cells[i]) for row in rows)]) for i, column in enumerate(columns)
    ]
    kept = list(range(len(columns)))
    has_bar = any(row.bar is not None for row in rows)
    least_bar, good_bar = (GAP + NARROWEST_BAR, GAP + COMFORTABLE_BAR) if has_bar else (0, 0)

    def room() -> int:
        """What the name column may take."""
        return width - len(MARGIN) - sum(GAP + natural[i] for i in kept[1:])

    while room() < min(natural[0], COMFORTABLE_NAME) + good_bar:
        spare = max((columns[i].spare, i) for i in kept)
        if spare[0] == 0:
            break
        kept.remove(spare[1])
    if room() - least_bar < min(natural[0], COMFORTABLE_NAME):
        least_bar = 0
    name = max(1, min(natural[0], room() - least_bar))
    bar = min(WIDEST_BAR, room() - name - GAP) if least_bar else 0
    return kept, [name, *(natural[i] for i in kept[1:])], bar


def _table_line(
    row: Row, columns: Sequence[Column], kept: Sequence[int], widths: Sequence[int], bar: int, choices: ViewChoices
) -> Line:
    texts = []
    for i, width in zip(kept, widths, strict=True):
        cell = shortened(row.cells[i], width, spelled("…", choices)) if i == 0 else row.cells[i]
        padding = " " * (width - cell_len(cell))
        texts.append(cell + padding if columns[i].align == "left" else padding + cell)
    line: Line = [(MARGIN + (" " * GAP).join(texts), _STYLES[row.tone])]
    if bar and row.bar is not None:
        line += [(" " * GAP, ""), (bar_text(row.bar, bar, choices.unicode), "")]
    return line


def bar_text(value: float, width: int, unicode: bool = True) -> str:
    """A bar ``value`` (0 to 1) of ``width`` cells long, in eighths of a cell where the output can show them."""
    value = min(1.0, max(0.0, value)) if value == value else 0.0
    if not unicode:
        return "#" * round(value * width)
    whole, eighths = divmod(round(value * width * 8), 8)
    return "█" * whole + _EIGHTHS[eighths].strip()
