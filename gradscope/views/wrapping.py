"""Text in few enough terminal cells: prose in lines, names shortened."""

from __future__ import annotations

from rich.cells import cell_len, chop_cells


def wrapped(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` cells; only a word longer than a line is cut, and ``79 %`` stays whole."""
    lines = []
    line = ""
    for word in text.replace(" %", "\u00a0%").split(" "):
        candidate = f"{line} {word}" if line else word
        if cell_len(candidate) > width:
            if line:
                lines.append(line)
            *whole, candidate = chop_cells(word, width)
            lines += whole
        line = candidate
    return [line.replace("\u00a0%", " %") for line in [*lines, line]]


def shortened(name: str, width: int, ellipsis: str = "…") -> str:
    """``name`` in at most ``width`` cells, its middle left out: both ends of a parameter's name tell."""
    if cell_len(name) <= width:
        return name
    head, tail = "", ""
    for front, back in zip(name, reversed(name), strict=True):
        if cell_len(head + front + ellipsis + tail) > width:
            break
        head += front
        if cell_len(head + ellipsis + back + tail) > width:
            break
        tail = back + tail
    return head + ellipsis + tail
