"""Every rule, in the order in which they are told."""

from __future__ import annotations

from gradscope.health.rule import Rule
from gradscope.health.rules.nonfinite import NONFINITE

RULES: tuple[Rule, ...] = (NONFINITE,)
