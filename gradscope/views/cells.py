"""How numbers look in the cells of a table: aligned, three digits, nothing rounded to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from gradscope.notation import number, percent

T = TypeVar("T")


def share(value: float) -> str:
    """A share with one decimal, so that a column of them aligns; the ends stay apart from 0 and 100."""
    text = f"{100 * value:.1f}"
    return f"{text} %" if 0 < float(text) < 100 else percent(value)


def consistency(value: float) -> str:
    """An estimate in percent: noise can take it below 0, and its two windows above 100."""
    return f"{number(100 * value, 2)} %"


def factor(value: float) -> str:
    """What a length is multiplied by: ``0.02×``, ``1.00×``."""
    return f"{value:.2f}×" if value == 0 or 0.01 <= value < 10 else f"{number(value, 2)}×"


def known(value: T | None, text: Callable[[T], str]) -> str:
    """``text(value)``; empty where nothing is known."""
    return "" if value is None else text(value)
