"""A result as JSON: the field names are the keys, and what is not finite is a string."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradscope.results import Inspection, Simulation

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


def json_text(result: Inspection | Simulation) -> str:
    """The whole result; no choice of rows applies, since the keys are stable."""
    return json.dumps(plain(result), indent=2, allow_nan=False) + "\n"


def plain(value: object) -> JsonValue:
    """``value`` in JSON's own types: a dataclass becomes an object, NaN and infinities become strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name.rstrip("_"): plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no place in a result")
