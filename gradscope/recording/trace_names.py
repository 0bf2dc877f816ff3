"""Where a recording goes: the directory that the user named, or one named after the command."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gradscope.errors import GradscopeError
from gradscope.trace.schema import METADATA_FILE

SUFFIX = ".gradscope"


def named_trace(name: str, force: bool) -> Path:
    """The absolute path for ``-o name``; without the suffix ``.gradscope`` it gets it.

    Raises GradscopeError where something stands that ``force`` does not allow to replace, or nothing can be made.
    """
    if not os.path.basename(os.path.normpath(name)).strip("."):
        raise GradscopeError(f"-o {name}", "names no file")
    path = Path(os.path.abspath(name if name.rstrip(os.sep).endswith(SUFFIX) else name.rstrip(os.sep) + SUFFIX))
    option = f"-o {name}"
    if os.path.lexists(path):
        if not is_trace(path):
            raise GradscopeError(option, "exists and is no recorded trace; it is not replaced")
        if not force:
            raise GradscopeError(option, "exists", "--force replaces it, once something is recorded")
    _refuse_unwritable(path.parent, option)
    return path


def default_trace(command: Sequence[str]) -> Path:
    """``train.gradscope`` in the working directory for ``python train.py``, else ``run.gradscope``; if free.

    Raises GradscopeError if the working directory cannot be written to.
    """
    script = next((word for word in command if word.endswith(".py")), "run.py")
    path = next_free(Path.cwd() / f"{Path(script).stem or 'run'}{SUFFIX}")
    _refuse_unwritable(path.parent, "the working directory")
    return path


def next_free(path: Path) -> Path:
    """``path`` itself if nothing stands there, else the first free one of ``NAME-2``, ``NAME-3``…"""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def is_trace(path: Path) -> bool:
    """Whether ``path`` is a directory that ``gradscope record`` made."""
    try:
        with open(path / METADATA_FILE, "rb") as stream:
            metadata = json.load(stream)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(metadata, dict) and str(metadata.get("schema", "")).startswith("gradscope.trace/")


def _refuse_unwritable(directory: Path, option: str) -> None:
    """Make and remove a directory: what permissions promise, a read-only file system does not keep."""
    if not directory.is_dir():
        raise GradscopeError(option, f"there is no directory {directory}")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".gradscope-", dir=directory))
    except OSError as error:
        hint = "-o NAME.gradscope records elsewhere" if not option.startswith("-o") else None
        raise GradscopeError(option, f"nothing can be written in {directory} ({error.strerror})", hint) from None
