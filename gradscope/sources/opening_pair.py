"""Two sources for one command."""

from __future__ import annotations

from typing import Any

from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource
from gradscope.sources.opening import As, open_source


def open_pair(
    a: Any, b: Any, *, as_: As | None = None, tag: str | None = None
) -> tuple[GradientSource, GradientSource]:
    """Both sources; ``tag`` picks the series of those of them that are logs of norms.

    Raises GradscopeError where one cannot be read, and for a ``tag`` where neither is a log.
    """
    if tag is None:
        return open_source(a, as_=as_), open_source(b, as_=as_)
    one, other = _by_tag(a, as_, tag), _by_tag(b, as_, tag)
    if "norm-log" not in (one.info.kind, other.info.kind):
        raise GradscopeError(f"--tag {tag}", "goes with a log of norms, and neither source is one")
    return one, other


def _by_tag(source: Any, as_: As | None, tag: str) -> GradientSource:
    try:
        opened = open_source(source, as_=as_)
    except GradscopeError:
        # Some logs open by a tag alone.
        return open_source(source, as_=as_, tag=tag)
    return open_source(source, tag=tag) if opened.info.kind == "norm-log" else opened
