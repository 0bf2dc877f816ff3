"""What ``check`` returns: frozen dataclasses of plain numbers, named as in the JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradscope.results import Source

Severity = Literal["error", "warn"]
RuleStatus = Literal["pass", "warn", "fail", "skipped"]


@dataclass(frozen=True, slots=True)
class Reading:
    """One number that a rule looked at, and where it was found.

    ``value`` and ``limit`` are in the unit of the rule; None where the rule is a plain yes or no.  ``where`` names a
    layer, tensor, clip group or optimizer; ``steps`` are the first and the last step concerned, by their index.
    ``message`` is one sentence that says it all.
    """

    value: float | None
    limit: float | None
    where: str | None
    steps: tuple[int, int] | None
    message: str


@dataclass(frozen=True, slots=True)
class RuleOutcome:
    """What became of one rule on one source.

    ``value`` to ``message`` are those of its worst violation, else of the reading that came nearest to its limit; of a
    skipped rule ``message`` says why.  ``violations`` are all, the worst first.  ``path`` is that of the source.
    """

    rule: str
    severity: Severity
    status: RuleStatus
    value: float | None
    limit: float | None
    where: str | None
    steps: tuple[int, int] | None
    message: str
    violations: tuple[Reading, ...]
    path: str


@dataclass(frozen=True, slots=True)
class Check:
    """What ``gradscope check`` found; true where the run is healthy.

    ``status`` is ``"fail"`` where a rule of severity ``error`` failed, one warned and the check fails on warnings, or
    one was skipped and the check is strict.  ``failed_because`` says which of these.  ``rules`` stand source by
    source, each in the order of the catalogue; ``notes`` are what the sources say about themselves.
    """

    schema: str
    status: Literal["pass", "warn", "fail"]
    failed_because: str | None
    sources: tuple[Source, ...]
    rules: tuple[RuleOutcome, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.status != "fail"

    def count(self, status: RuleStatus) -> int:
        """How many rules ended so."""
        return sum(outcome.status == status for outcome in self.rules)
