"""Text from files that others made, made safe to print: terminals obey control characters."""

from __future__ import annotations

NO_BREAK_SPACE = "\u00a0"


def printable(text: str) -> str:
    """``text`` with every control, format and undecodable character written as its escape (``\\x1b``)."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == NO_BREAK_SPACE else ascii(c)[1:-1] for c in text)
