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
    option = f"-o {name}"
    path = _absolute(name, option)
    if os.path.lexists(path):
        if not is_trace(path):
            raise GradscopeError(option, "exists and is no recorded trace; it is not replaced")
        if not force:
            raise GradscopeError(option, "exists", "--force replaces it, once something is recorded")
    _refuse_unwritable(path, option)
    return path


def recorder_trace(path: str | os.PathLike[str], force: bool) -> Path:
    """The absolute path for ``Recorder(path)``, which stays what it is when the working directory changes.

    Raises GradscopeError where something stands that ``force`` does not allow to replace, or nothing can be made.
    """
    try:
        name = os.fsdecode(path)
    except TypeError:
        raise GradscopeError(f"Recorder({path!r})", "is no path") from None
    option = f"Recorder({name!r})"
    absolute = _absolute(name, option)
    # Rank 0 may have begun the trace that other ranks are about to join.
    first_rank = os.environ.get("RANK", "0") == "0"
    if first_rank and not force and os.path.lexists(absolute):
        raise GradscopeError(str(absolute), "exists already", "force=True replaces it")
    _refuse_unwritable(absolute, option)
    return absolute


def default_trace(command: Sequence[str]) -> Path:
    """``train.gradscope`` in the working directory for ``python train.py``, else ``run.gradscope``; if free.

    Raises GradscopeError if the working directory cannot be written to.
    """
    script = next((word for word in command if word.endswith(".py")), "run.py")
    path = next_free(Path.cwd() / f"{Path(script).stem or 'run'}{SUFFIX}")
    _refuse_unwritable(path, "the working directory", "-o NAME.gradscope records elsewhere")
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


def _absolute(name: str, option: str) -> Path:
    """The path with the suffix that a trace has."""
    if "\0" in name or not os.path.basename(os.path.normpath(name)).strip("."):
        raise GradscopeError(option, "names no file")
    bare = name.rstrip(os.sep)
    return Path(os.path.abspath(bare if bare.endswith(SUFFIX) else bare + SUFFIX))


def _refuse_unwritable(path: Path, option: str, hint: str | None = None) -> None:
    """Make and remove a directory beside ``path``: what permissions promise, a read-only file system does not keep."""
    directory = path.parent
    if not directory.is_dir():
        raise GradscopeError(option, f"there is no directory {directory}")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".gradscope-", dir=directory))
    except OSError as error:
        raise GradscopeError(option, f"nothing can be written in {directory} ({error.strerror})", hint) from None
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        # A name that is too long.
        raise GradscopeError(option, f"cannot be made: {error.strerror}", hint) from None
