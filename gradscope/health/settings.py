"""How a check is set up: which rules, with which limits, and what counts as a failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gradscope.check_results import Severity
from gradscope.health.rule import LimitValue


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What is asked of a check; every name in it is known, and every value within its bounds.

    ``limits`` maps rule → limit → value for what differs from the defaults, ``severities`` rule → severity likewise.
    ``select`` (None: all) and ``ignore`` name rules.  ``strict`` makes a skipped rule a failure, ``fail_on`` ``"warn"``
    a warning.
    """

    limits: Mapping[str, Mapping[str, LimitValue]] = field(default_factory=dict)
    severities: Mapping[str, Severity] = field(default_factory=dict)
    select: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    strict: bool = False
    fail_on: Literal["error", "warn"] = "error"
