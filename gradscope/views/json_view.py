"""A result as JSON: the field names are the keys, and what is not finite is a string."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import get_args

from gradscope.check_results import Check, RuleStatus

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


def json_text(result: object) -> str:
    """The whole of a result, a dataclass; no choice of rows applies, since the keys are stable."""
    return _text(plain(result))


def check_json(check: Check) -> str:
    """The whole check, and how many of its rules ended how."""
    told = plain(check)
    assert isinstance(told, dict)
    statuses: tuple[RuleStatus, ...] = get_args(RuleStatus)
    return _text({**told, "counts": {status: check.count(status) for status in statuses}})


def _text(value: JsonValue) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


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
