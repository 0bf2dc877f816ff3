"""``[tool.gradscope]`` of the nearest ``pyproject.toml``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradscope.errors import GradscopeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAME = "pyproject.toml"
# No project file is nearly as large; what is named so and is, is something else.
_LARGEST_BYTES = 16 << 20
_PLACE = re.compile(r"\s*\(at line (\d+), column (\d+)\)$")
_END = " (at end of document)"


@dataclass(frozen=True, slots=True)
class ProjectFile:
    """A project file at ``path``; ``settings`` is its table ``[tool.gradscope]``, empty where it has none."""

    path: Path
    settings: Mapping[str, Any]

    @property
    def directory(self) -> Path:
        """What paths in the file are relative to."""
        return self.path.parent


def nearest_project(directory: Path | None = None) -> ProjectFile | None:
    """The first ``pyproject.toml`` in ``directory`` (the working directory) or upwards; None where there is none.

    Raises:
        GradscopeError: it cannot be read, or is no TOML (the error names line and column).
    """
    directory = Path() if directory is None else directory
    try:
        parents = directory.absolute().parents
    except OSError:
        # The working directory was removed.
        return None
    for folder in (directory, *parents):
        if os.path.isfile(folder / NAME):
            return read_project(folder / NAME)
    return None


def read_project(path: Path) -> ProjectFile:
    """The project file at ``path``.

    Raises:
        GradscopeError: as :func:`nearest_project`.
    """
    settings: Any = _parsed(path)
    for depth, key in enumerate(("tool", "gradscope")):
        settings = settings.get(key, {})
        if not isinstance(settings, dict):
            raise GradscopeError(str(path), f"{key}{' in [tool]' * depth} must be a table")
    return ProjectFile(path, settings)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise GradscopeError(str(path), f"is no project file: it is larger than {_LARGEST_BYTES >> 20} MiB")
        content = path.read_bytes()
    except OSError as error:
        raise GradscopeError(str(path), error.strerror or str(error)) from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _place_after(content[: error.start].decode("utf-8"))
        raise GradscopeError(f"{path}:{place}", f"is not UTF-8 (byte 0x{content[error.start]:02x})") from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise GradscopeError(str(path), "is nested too deeply") from None
    except ValueError as error:
        raise _damaged(path, text, str(error)) from None


def _damaged(path: Path, text: str, why: str) -> GradscopeError:
    why = why.splitlines()[0]
    if why.endswith(_END):
        place, why = _place_after(text.rstrip("\n")), f"{why.removesuffix(_END)}: the file ends here"
    elif found := _PLACE.search(why):
        place, why = f"{found[1]}:{found[2]}", why[: found.start()]
    else:
        return GradscopeError(str(path), f"is no TOML: {why}")
    return GradscopeError(f"{path}:{place}", f"is no TOML: {why}")


def _place_after(text: str) -> str:
    """Line and column, counted from 1, of what follows ``text``."""
    return f"{text.count(chr(10)) + 1}:{len(text) - text.rfind(chr(10))}"
