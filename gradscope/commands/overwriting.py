"""What ``-o`` must not replace: the files that a command reads, and whatever else holds tensors."""

from __future__ import annotations

import codecs
import glob
import os
from collections.abc import Iterable, Iterator

from gradscope.errors import GradscopeError

# Every report is text, and no file of tensors is: the first bytes tell.
_SNIFFED_BYTES = 4096
# Read beside the tensors: the only files of a source that are text.
_SETTINGS = ("pyproject.toml", "agent.yaml", "config.json", "trainer_state.json", "trace.json")
_INDEX_SUFFIX = ".index.json"


def refuse_overwriting(file: str, inputs: Iterable[str]) -> None:
    """Nothing may be lost: ``file`` is no input, nor what a directory or a glob among ``inputs`` may stand for.

    An earlier report, which is text, may be replaced.

    Raises GradscopeError.
    """
    target = os.path.realpath(file)
    if not os.path.isfile(target):
        return
    if any(os.path.realpath(path) == target for path in _named(inputs)):
        raise GradscopeError(f"-o {file}", "is the input; it would be overwritten")
    name = os.path.basename(target)
    if name in _SETTINGS or name.endswith(_INDEX_SUFFIX):
        raise GradscopeError(f"-o {file}", "holds the settings of a run or a model; it would be overwritten")
    if not _is_text(file):
        raise GradscopeError(f"-o {file}", "holds tensors or other data; it would be overwritten")


def _named(inputs: Iterable[str]) -> Iterator[str]:
    for path in inputs:
        yield from [path] if os.path.exists(path) else glob.glob(path, recursive=True)


def _is_text(file: str) -> bool:
    try:
        with open(file, "rb") as stream:
            head = stream.read(_SNIFFED_BYTES)
    except OSError as error:
        raise GradscopeError(f"-o {file}", error.strerror or str(error)) from None
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head
