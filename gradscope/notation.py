"""How numbers are written for people: few digits, the same everywhere."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Literal


def number(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, whole numbers in full: 0.0123, 21.3, 12,346, 1.20e+07."""
    if not math.isfinite(value):
        return f"{value:g}"
    if value == 0:
        return "0"
    scientific = f"{value:.{digits - 1}e}"
    exponent = int(scientific.partition("e")[2])
    if not -4 <= exponent < 7:
        return scientific
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def setting(value: float) -> str:
    """A threshold as its user typed it: 0.5, 10, 1e-05."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def percent(share: float, towards: Literal["nearest", "up", "down"] = "nearest") -> str:
    """A share in percent with one decimal, in prose as in tables.

    It never rounds something to nothing, nor almost all to all: ``0.02 %``, ``< 0.01 %``, ``99.98 %``.  An upper bound
    is rounded ``"up"`` and a lower bound ``"down"``, so that it stays one.
    """
    if math.isnan(share):
        return "nan"
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    for decimals in (1, 2):
        texts = [f"{value:.{decimals}f}", _rounded_percent(share, decimals, towards)]
        if all(0 < float(text) < 100 for text in texts):
            return f"{texts[1]} %"
    if value < 50:
        return "0 %" if towards == "down" else "< 0.01 %"
    return "100 %" if towards == "up" else "> 99.99 %"


def _rounded_percent(share: float, decimals: int, towards: str) -> str:
    rounding = {"up": ROUND_CEILING, "down": ROUND_FLOOR}.get(towards, ROUND_HALF_EVEN)
    # As it is written: 0.1 is 10.0 %, although its float64 is a little more.
    exact = Decimal(repr(float(share))) * 100
    return str(exact.quantize(Decimal(1).scaleb(-decimals), rounding))


def angle(degrees: float) -> str:
    """An angle in degrees: ``0°``, ``0.021°``, ``10.7°``."""
    return "0°" if degrees < 5e-5 else f"{number(degrees)}°"


def count(n: float) -> str:
    """A whole number with thousands separators."""
    return f"{n:,.0f}"


def names(items: tuple[str, ...] | list[str], most: int = 3) -> str:
    """The first few names of a list, and how many more there are."""
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def called(name: str, kind: str = "layer") -> str:
    """A name in a sentence: ``layer 4``, where it might be taken for a number."""
    return f"{kind} {name}" if name[:1].isdigit() else name
