"""A histogram in a few lines of text, with the thresholds marked beneath it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradscope.notation import number
from gradscope.views.choices import ViewChoices
from gradscope.views.screen import Histogram, Line
from gradscope.views.wrapping import wrapped

HEIGHT = 4
MARGIN = "  "
_LEVELS = " ▁▂▃▄▅▆▇█"


def histogram_lines(histogram: Histogram, choices: ViewChoices) -> Iterator[Line]:
    """``histogram`` upright: HEIGHT lines of columns, the smallest and largest value below, then the marks."""
    if not any(histogram.counts):
        return
    left, right = number(histogram.smallest), number(histogram.largest)
    width = choices.width - len(MARGIN)
    each = max(1, min(3, width // len(histogram.counts)))
    span = each * len(histogram.counts)
    yield from ([(MARGIN + line, "dim")] for line in wrapped(histogram.title, width))
    tallest = max(histogram.counts)
    for level in reversed(range(HEIGHT)):
        cells = (_cell(count / tallest, level, choices.unicode) * each for count in histogram.counts)
        yield [(MARGIN, ""), ("".join(cells).rstrip(), "")]
    yield [(MARGIN + left + right.rjust(max(len(right) + 1, span - len(left))), "dim")]
    pointer = "▲" if choices.unicode else "^"
    for label, value in histogram.marks:
        yield from ([(MARGIN + line, "")] for line in _mark(pointer, label, _position(histogram, value, each), width))


def _cell(height: float, level: int, unicode: bool) -> str:
    """The part of a column ``height`` (0 to 1) tall that lies in line ``level``, counted from below."""
    filled = min(1.0, max(0.0, height * HEIGHT - level))
    if not unicode:
        return "#" if filled >= 0.5 or (level == 0 and height > 0) else " "
    # A rare value is still a value: its column is never empty.
    least = 1 if level == 0 and height > 0 else 0
    return _LEVELS[max(least, round(filled * 8))]


def _position(histogram: Histogram, value: float, each: int) -> int:
    """The cell under which ``value`` lies; bins are equally wide on a logarithmic axis."""
    edges = histogram.edges
    last = each * len(histogram.counts) - 1
    if value <= edges[0]:
        return 0
    if value >= edges[-1]:
        return last
    bin_ = next(i for i in range(len(histogram.counts)) if value < edges[i + 1])
    low, high = edges[bin_], edges[bin_ + 1]
    inside = math.log(value / low) / math.log(high / low) if low > 0 else (value - low) / (high - low)
    return min(last, int(each * (bin_ + inside)))


def _mark(pointer: str, label: str, position: int, width: int) -> list[str]:
    """A pointer below ``position`` with its label on the side that has room, else beneath it."""
    if position + 2 + len(label) <= width:
        return [" " * position + f"{pointer} {label}"]
    if len(label) < position:
        return [" " * (position - 1 - len(label)) + f"{label} {pointer}"]
    return [" " * position + pointer, label]
