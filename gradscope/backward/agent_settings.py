"""``params/agent.yaml``: how an rsl_rl run was set up, as plain values, and which of its names are rsl_rl's own."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gradscope.errors import GradscopeError
from gradscope.sources.checkpoints.rsl_rl import MAX_YAML_BYTES
from gradscope.sources.formats.file_region import FileRegion

# Where rsl_rl keeps what an agent.yaml may name, whatever its version.
_ROOMS = ("algorithms", "models", "modules")
_FUNCTIONS = ("data_augmentation_func",)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in an ``agent.yaml``.

    Isaac Lab's files hold Python tags.  Nothing is made of those: a tuple becomes a list, an object the mapping of
    its attributes, and the name of a class or function its text.

    Raises:
        GradscopeError: the file is missing, too large, or no YAML mapping.
    """
    if not path.is_file():
        raise GradscopeError(
            str(path),
            "is missing: it says how the networks and the loss are made",
            "keep params/agent.yaml of the run beside its model_*.pt (Isaac Lab writes it; without it: yaml.dump of "
            "the settings that the runner got), or give --model and --loss",
        )
    region = FileRegion.whole(path)
    if region.size > MAX_YAML_BYTES:
        raise GradscopeError(str(path), f"is too large for a run's settings ({region.size:,} bytes)")
    try:
        settings = yaml.load(region.read(), Loader=_PlainLoader)
    except (yaml.YAMLError, RecursionError, UnicodeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GradscopeError(str(path), f"is no YAML ({reason})") from None
    if not isinstance(settings, dict):
        raise GradscopeError(str(path), "holds no settings: it is no mapping")
    return settings


def foreign_names(settings: Any) -> list[str]:
    """The classes and functions that ``settings`` names outside rsl_rl, each as ``KEY: NAME``.

    rsl_rl finds them by importing, so whoever wrote the file chooses what code runs.
    """
    return [f"{key}: {name}" for key, name in _named(settings) if not _is_rsl_rls_own(name) and not name.isidentifier()]


def unknown_names(settings: Any) -> list[str]:
    """The bare names in ``settings``, which rsl_rl looks up in itself, that the installed version does not have."""
    return [f"{key}: {name}" for key, name in _named(settings) if not _is_rsl_rls_own(name) and name.isidentifier()]


def _named(settings: Any) -> Iterator[tuple[str, str]]:
    """What stands under ``class_name`` and the like, at any depth; every shared part once."""
    waiting, seen = [settings], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen or not isinstance(part, dict | list):
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            yield from (
                (str(key), value)
                for key, value in part.items()
                if isinstance(value, str) and (str(key).endswith("class_name") or key in _FUNCTIONS)
            )
            waiting += part.values()
        else:
            waiting += part


def _is_rsl_rls_own(name: str) -> bool:
    """Whether ``name`` is a class that rsl_rl itself defines, by its bare name or with rsl_rl's path before it."""
    *path, last = re.split(r"[.:]", name)
    rooms = [importlib.import_module(f"rsl_rl.{room}") for room in _ROOMS if _is_there(f"rsl_rl.{room}")]
    found = next((vars(room)[last] for room in rooms if last in vars(room)), None)
    if not isinstance(found, type) or not found.__module__.startswith("rsl_rl."):
        return False
    return not path or ".".join(path) == found.__module__ or ".".join(path) in {room.__name__ for room in rooms}


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader, to which a tag that it does not know says nothing."""


def _plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.ScalarNode)
    kind, _, name = suffix.partition(":")
    return name if kind in ("name", "module") else loader.construct_scalar(node)


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)
_PlainLoader.add_multi_constructor("!", _plain)
