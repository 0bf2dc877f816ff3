"""What a rule is: a question about the evidence, the limits of a good answer, and where the question comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from gradscope.check_results import Reading, Severity

if TYPE_CHECKING:
    from gradscope.health.evidence import Evidence

LimitValue: TypeAlias = float | str
Judge: TypeAlias = Callable[["Evidence", "Limits"], "Verdict"]


@dataclass(frozen=True, slots=True)
class Limit:
    """One setting of a rule: ``--rule NAME.LIMIT=VALUE``.

    ``default`` is a number, or a text; a setting takes what is of the same kind.  ``least`` and ``most`` bound a
    number, both inclusive.  ``choices`` are the only texts it takes, where there are any; ``verify`` raises
    GradscopeError for a text that is none.
    """

    name: str
    default: LimitValue
    about: str
    least: float = 0.0
    most: float = float("inf")
    choices: tuple[str, ...] = ()
    verify: Callable[[str], None] | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings in force for one rule: its own, or those that were given in their place."""

    values: Mapping[str, LimitValue]

    def number(self, name: str) -> float:
        """The number ``name``."""
        value = self.values[name]
        assert not isinstance(value, str)
        return float(value)

    def text(self, name: str) -> str:
        """The text ``name``."""
        value = self.values[name]
        assert isinstance(value, str)
        return value


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule says: ``skipped`` (why it cannot answer), or its ``violations``, worst first, or neither: all well.

    ``nearest`` is the reading that came nearest to the limit, for a rule that passes.
    """

    skipped: str | None = None
    violations: tuple[Reading, ...] = ()
    nearest: Reading | None = None

    @classmethod
    def cannot_tell(cls, why: str) -> Verdict:
        """The source does not hold what the rule asks for; ``why`` completes "skipped: ..."."""
        return cls(skipped=why)

    @classmethod
    def well(cls, nearest: Reading) -> Verdict:
        """Nothing is beyond the limit."""
        return cls(nearest=nearest)

    @classmethod
    def violated(cls, violations: Sequence[Reading]) -> Verdict:
        """These are beyond the limit, worst first."""
        return cls(violations=tuple(violations))

    @classmethod
    def by_value(cls, readings: Sequence[Reading]) -> Verdict:
        """By one or more readings that are well up to their limit: those above it are violations, the largest first."""
        ordered = sorted(readings, key=lambda reading: reading.value or 0.0, reverse=True)
        beyond = [reading for reading in ordered if (reading.value or 0.0) > (reading.limit or 0.0)]
        return cls.violated(beyond) if beyond else cls.well(ordered[0])


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of the health check.

    ``about`` says in one sentence what it finds, ``formula`` what is compared with the limits, and ``source`` where
    that comes from (a paper, a library's documentation).  ``judge`` is a pure function of evidence and limits.
    """

    name: str
    severity: Severity
    about: str
    formula: str
    source: str
    limits: tuple[Limit, ...]
    judge: Judge

    def defaults(self) -> dict[str, LimitValue]:
        """Every limit as it is where nothing else is asked for."""
        return {limit.name: limit.default for limit in self.limits}
