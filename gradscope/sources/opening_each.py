"""Several paths, each a source by itself; only single gradient dumps belong together, as the steps of one run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gradscope.gradients import GradientSource
from gradscope.sources.dumps import GradientDumps
from gradscope.sources.opening import As, open_source
from gradscope.sources.step_files import is_glob, paths_of_glob

Named = str | os.PathLike[str] | GradientSource


def open_each(named: Sequence[Named], *, as_: As | str | None = None, tag: str | None = None) -> list[GradientSource]:
    """The sources at these paths or quoted globs, in order; the gradient dumps of one step among them are one source.

    It stands where the first of them was named.  What is open already stays as it is.

    Raises:
        GradscopeError: as ``open_source``.
    """
    meant = [each for name in named for each in _meant(name)]
    opened = [_kept(each, as_, tag) for each in meant]
    dumps = [each for each, source in zip(meant, opened, strict=True) if source is None]
    first = opened.index(None) if dumps else 0
    together = [open_source(dumps, as_=as_, tag=tag)] if dumps else []
    return [*_present(opened[:first]), *together, *_present(opened[first:])]


def _meant(name: Named) -> Sequence[Path | GradientSource]:
    if isinstance(name, GradientSource):
        return [name]
    path = Path(name)
    return paths_of_glob(str(path)) if is_glob(str(path)) and not os.path.lexists(path) else [path]


def _kept(named: Path | GradientSource, as_: str | None, tag: str | None) -> GradientSource | None:
    """None for a dump of one step, which is opened again with the others: thousands need not lie in memory."""
    if isinstance(named, GradientSource):
        return named
    source = open_source(named, as_=as_, tag=tag)
    return None if isinstance(source, GradientDumps) and source.info.steps == 1 else source


def _present(sources: Sequence[GradientSource | None]) -> list[GradientSource]:
    return [source for source in sources if source is not None]
