"""What ``check`` returns: frozen dataclasses of plain numbers, named as in the JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gradscope.notation import setting
from gradscope.results import Source

Severity: TypeAlias = Literal["error", "warn"]
RuleStatus: TypeAlias = Literal["pass", "warn", "fail", "skipped"]
Bound: TypeAlias = Literal["most", "least"]

# What a rule did that ended so, in the order in which rules are counted.
STATUS_WORDS: Mapping[RuleStatus, str] = {"fail": "failed", "pass": "passed", "warn": "warned", "skipped": "skipped"}


@dataclass(frozen=True, slots=True)
class Reading:
    """One number that a rule looked at, and where it was found.

    ``value`` and ``limit`` are in the unit of the rule; None where the rule is a plain yes or no.  ``where`` names a
    layer, tensor, clip group or optimizer; ``steps`` are the first and the last step concerned, by their index.
    ``message`` is one sentence that says it all.  ``bound`` says which way the limit holds: all is well with a value at
    most, or at least, as large.
    """

    value: float | None
    limit: float | None
    where: str | None
    steps: tuple[int, int] | None
    message: str
    bound: Bound = "most"

    @property
    def over_limit(self) -> float:
        """The value over its limit, infinite at a limit of 0."""
        assert self.value is not None and self.limit is not None
        return self.value / self.limit if self.limit else math.inf


@dataclass(frozen=True, slots=True)
class RuleOutcome:
    """What became of one rule on one source.

    ``value`` to ``message``, and ``bound``, are those of its worst violation, else of the reading that came nearest to
    its limit; of a skipped rule ``message`` says why.  ``violations`` are all, the worst first.  ``path`` is that of
    the source.
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
    bound: Bound = "most"


@dataclass(frozen=True, slots=True)
class LimitInForce:
    """A limit of a rule as it was applied, and what it bounds."""

    name: str
    value: float | str
    about: str

    @property
    def typed(self) -> str:
        """The value as one gives it: ``1e+06``, ``float16``."""
        return self.value if isinstance(self.value, str) else setting(self.value)


@dataclass(frozen=True, slots=True)
class RuleText:
    """What a rule is, for readers of its outcome: ``about``, ``formula`` and ``source`` as in ``health.rule.Rule``."""

    rule: str
    severity: Severity
    about: str
    formula: str
    source: str
    limits: tuple[LimitInForce, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Check:
    """What ``gradscope check`` found; true where the run is healthy.

    ``status`` is ``"fail"`` where a rule of severity ``error`` failed, one warned and the check fails on warnings, or
    one was skipped and the check is strict.  ``failed_because`` says which of these.  ``rules`` stand source by
    source, the same rules for each, in the order of the catalogue; ``notes`` are what the sources say about
    themselves.  ``catalogue`` describes the rules that were asked for.
    """

    schema: str
    status: Literal["pass", "warn", "fail"]
    failed_because: str | None
    sources: tuple[Source, ...]
    rules: tuple[RuleOutcome, ...]
    notes: tuple[str, ...] = ()
    catalogue: tuple[RuleText, ...] = ()
    strict: bool = False
    fail_on: Literal["error", "warn"] = "error"

    def __bool__(self) -> bool:
        return self.status != "fail"

    def __repr__(self) -> str:
        """Short enough for the line of an assertion."""
        if self:
            return f"<healthy: {self.tally}>"
        failing = [outcome for outcome in self.rules if self.fails_for(outcome) and outcome.status != "skipped"]
        if not failing:
            return f"<unhealthy: {self.failed_because}>"
        return f"<unhealthy: {', '.join(dict.fromkeys(outcome.rule for outcome in failing))} ({self.tally})>"

    @property
    def tally(self) -> str:
        """``2 failed, 6 passed, 1 warned, 9 skipped``: what there is none of is left out, but for what passed."""
        counted = [(status, word, self.count(status)) for status, word in STATUS_WORDS.items()]
        return ", ".join(f"{n} {word}" for status, word, n in counted if n or status == "pass")

    def fails_for(self, outcome: RuleOutcome) -> bool:
        """Whether this outcome makes the check a failure."""
        failing = {"fail", *["warn"] * (self.fail_on == "warn"), *["skipped"] * self.strict}
        return outcome.status in failing

    def by_source(self) -> tuple[tuple[Source, tuple[RuleOutcome, ...]], ...]:
        """Each source with the outcomes on it."""
        each = len(self.rules) // max(1, len(self.sources))
        return tuple((source, self.rules[i * each : (i + 1) * each]) for i, source in enumerate(self.sources))

    def count(self, status: RuleStatus) -> int:
        """How many rules ended so."""
        return sum(outcome.status == status for outcome in self.rules)
