"""How numbers look in the cells of a table, beside what ``notation`` says for every place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from gradscope.notation import number, percent

T = TypeVar("T")


def consistency(value: float) -> str:
    """An estimate in percent: noise can take it below 0, and its two windows above 100."""
    if value <= 0:
        return "none"
    return percent(value) if value < 1 else f"{100 * value:.1f} %"


def factor(value: float) -> str:
    """What a length is multiplied by: ``0.02×``, ``1.00×``."""
    return f"{value:.2f}×" if value == 0 or 0.01 <= value < 10 else f"{number(value, 2)}×"


def known(value: T | None, text: Callable[[T], str]) -> str:
    """``text(value)``; empty where nothing is known."""
    return "" if value is None else text(value)
