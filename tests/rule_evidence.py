"""Judging one rule in a test."""

from __future__ import annotations

from pathlib import Path

from gradscope.gradients import GradientSource
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limits, LimitValue, Rule, Verdict
from gradscope.sources.opening import open_source


def judged(rule: Rule, source: GradientSource | str | Path, **limits: LimitValue) -> Verdict:
    """The verdict of ``rule`` with its defaults but for ``limits`` (``loss_scale`` is ``loss-scale``)."""
    opened = source if isinstance(source, GradientSource) else open_source(str(source))
    given = {name.replace("_", "-"): value for name, value in limits.items()}
    assert set(given) <= set(rule.defaults())
    return rule.judge(Evidence.gather(opened), Limits({**rule.defaults(), **given}))
