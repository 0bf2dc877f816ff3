"""Which files of a directory, a glob or a list are gradient steps, in which order."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradscope.errors import GradscopeError
from gradscope.sources.formats.file_region import unreadable
from gradscope.sources.formats.safetensors_files import INDEX_SUFFIX, shards_of_index

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz", ".npy", ".ckpt")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{3,})-of-(?P<total>\d{3,})(?P<suffix>\.\w+)")
# A model's own file among others, as Hugging Face names it.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "adapter_model.safetensors",
)


@dataclass(frozen=True, slots=True)
class StepFile:
    """One step: its label, and the files (more than one for shards without an index) that hold it."""

    label: str
    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class StepFiles:
    """The steps of a sequence in order, and the names of files like them that were left out."""

    steps: tuple[StepFile, ...]
    ignored: tuple[str, ...] = ()


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts ``step_2`` before ``step_10``."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def is_glob(text: str) -> bool:
    """Whether ``text`` has a wildcard in it."""
    return glob.has_magic(text)


def paths_of_glob(pattern: str) -> list[Path]:
    """What a quoted glob matches, in natural order.

    Raises:
        GradscopeError: nothing.
    """
    matches = [Path(name) for name in glob.glob(pattern, recursive=True)]
    if not matches:
        raise GradscopeError(pattern, "matches no file")
    return sorted(matches, key=lambda path: natural_order(str(path)))


def steps_of_paths(paths: Iterable[Path]) -> StepFiles:
    """One step per path, in natural order; a directory counts as one step and must hold exactly one.

    Raises:
        GradscopeError: a directory among them holds none or several.
    """
    ordered = sorted(paths, key=lambda path: natural_order(str(path)))
    return StepFiles(tuple(_step_of_path(path) for path in ordered))


def _step_of_path(path: Path) -> StepFile:
    if not path.is_dir():
        return StepFile(path.name, (path,))
    steps = _candidates(_entries(path)).steps
    if len(steps) != 1:
        raise GradscopeError(str(path), f"holds {len(steps)} gradient files where one step should be")
    return StepFile(path.name, steps[0].paths)


def steps_of_directory(directory: Path) -> StepFiles:
    """The steps that a directory holds: its files, or if it has none those of its subdirectories.

    Raises:
        GradscopeError: it holds no gradient files; the error names what it does hold.
    """
    entries = _entries(directory)
    found = _candidates(entries)
    if found.steps:
        return found
    below = {}
    for entry in sorted((entry for entry in entries if entry.is_dir()), key=lambda entry: natural_order(entry.name)):
        inside = _candidates(_entries(Path(entry.path)))
        if inside.steps:
            below[entry.name] = inside
    if len(below) == 1:
        return next(iter(below.values()))
    if below and all(len(inside.steps) == 1 for inside in below.values()):
        return StepFiles(tuple(StepFile(name, inside.steps[0].paths) for name, inside in below.items()))
    if below:
        raise GradscopeError(
            str(directory), f"holds several directories of gradient files ({_some(below)})", "name one of them"
        )
    archives = sorted((entry.name for entry in entries if entry.name.endswith(".zip")), key=natural_order)
    hint = f"name one of the checkpoints, such as {directory / archives[-1]}" if archives else None
    raise GradscopeError(str(directory), f"holds no gradient files{_contents(entries)}", hint)


def weights_of_directory(directory: Path) -> StepFile:
    """The one file of weights, or set of shards, in a directory.

    Raises:
        GradscopeError: there is none, or no telling which.
    """
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return StepFile(name, (directory / name,))
    found = steps_of_directory(directory)
    if len(found.steps) != 1:
        raise GradscopeError(
            str(directory), f"holds {len(found.steps)} files of tensors, of which one must be the weights", "name it"
        )
    return found.steps[0]


def has_model_file(directory: Path) -> bool:
    """Whether a file named as Hugging Face names a model's weights lies in the directory."""
    return any((directory / name).is_file() for name in WEIGHT_FILES)


def has_model_config(directory: Path) -> bool:
    """Whether a model's ``config.json``, as transformers and diffusers write it, lies in the directory."""
    path = directory / "config.json"
    if not path.is_file() or path.stat().st_size > 1 << 20:
        return False
    text = path.read_bytes()
    return any(key in text for key in (b'"model_type"', b'"architectures"', b'"_class_name"'))


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise unreadable(directory, error) from None


def _candidates(entries: Sequence[os.DirEntry[str]]) -> StepFiles:
    """The files that may hold tensors: those of the most frequent kind, shards gathered into one step."""
    names = [entry.name for entry in entries if entry.name.endswith((*SUFFIXES, INDEX_SUFFIX)) and entry.is_file()]
    if not names:
        return StepFiles(())
    directory = Path(entries[0].path).parent
    indexed = {
        shard.name for name in names if name.endswith(INDEX_SUFFIX) for shard in shards_of_index(directory / name)
    }
    steps: dict[tuple[str, ...], list[Path]] = {}
    for name in sorted(names, key=natural_order):
        if name in indexed:
            continue
        shard = SHARD.fullmatch(name)
        key = (shard["stem"], shard["total"], shard["suffix"]) if shard else (name, "", _kind(name))
        steps.setdefault(key, []).append(directory / name)
    (kind, _), *_ = Counter(key[-1] for key in steps).most_common(1)
    kept = tuple(StepFile(key[0], tuple(paths)) for key, paths in steps.items() if key[-1] == kind)
    return StepFiles(kept, tuple(path.name for key, paths in steps.items() if key[-1] != kind for path in paths))


def _kind(name: str) -> str:
    return INDEX_SUFFIX if name.endswith(INDEX_SUFFIX) else os.path.splitext(name)[1]


def _contents(entries: Sequence[os.DirEntry[str]]) -> str:
    return f" (only {_some(entry.name for entry in entries)})" if entries else ": it is empty"


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names, key=natural_order)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")
