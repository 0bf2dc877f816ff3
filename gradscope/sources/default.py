"""What a command reads when it is not told: the project's own source, or the newest trace nearby."""

from __future__ import annotations

import glob
import time
from pathlib import Path

from gradscope.errors import GradscopeError
from gradscope.project_file import ProjectFile, nearest_project


def default_source(directory: Path | None = None) -> tuple[Path, str]:
    """The default source for ``directory`` (the working directory), and a sentence that says which it is.

    It is ``source`` in ``[tool.gradscope]`` of the nearest ``pyproject.toml`` upwards, relative to that file; else the
    newest ``*.gradscope`` in the directory or two levels below it.

    Raises:
        GradscopeError: there is neither, or the ``pyproject.toml`` is damaged.
    """
    directory = Path.cwd() if directory is None else directory
    project = nearest_project(directory)
    configured = _configured_source(project) if project is not None else None
    if project is not None and configured is not None:
        path = _relative(project.directory / configured, directory)
        return path, f"Using {path} (source in {_relative(project.path, directory)})"
    return _newest_trace(directory)


def _configured_source(project: ProjectFile) -> str | None:
    source = project.settings.get("source")
    if source is not None and not isinstance(source, str):
        raise GradscopeError(str(project.path), "source in [tool.gradscope] must be a path")
    return source


def _relative(path: Path, directory: Path) -> Path:
    """``path`` as a user in ``directory`` would write it."""
    absolute, start = path.absolute(), directory.absolute()
    return absolute.relative_to(start) if absolute.is_relative_to(start) else path


def _newest_trace(directory: Path) -> tuple[Path, str]:
    root = glob.escape(str(directory))
    traces = [Path(name) for depth in range(3) for name in glob.glob("/".join([root, *["*"] * depth, "*.gradscope"]))]
    if not traces:
        raise GradscopeError(
            "PATH",
            "is missing, and there is no default source here",
            "record a run: gradscope record -- python train.py; or name a file or directory, or set source in "
            "[tool.gradscope] of pyproject.toml",
        )
    changes: dict[Path, float] = {trace: _last_change(trace) for trace in traces}
    newest = max(traces, key=changes.__getitem__)
    path = _relative(newest, directory)
    return path, f"Using {path} (newest, {_age(time.time() - changes[newest])} old)"


def _last_change(trace: Path) -> float:
    """When a trace was last written: appending to a file inside does not touch the directory."""
    inside = trace.iterdir() if trace.is_dir() else ()
    changes: list[float] = [path.stat().st_mtime for path in (trace, *inside)]
    return max(changes)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (unit == "min" and seconds >= length):
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
