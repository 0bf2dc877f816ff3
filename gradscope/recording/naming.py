"""What parameters are called, as the checkpoint spells it: found by looking at the modules that are alive.

A parameter is named by the root module that owns it, the way its ``state_dict`` would name it
(``mlp_extractor.policy_net.0.weight``), without what wrappers add (``module.``, ``_orig_mod.``,
``_fsdp_wrapped_module.``).  Where several root modules are trained, each name starts with what the training code calls
its root (``actor.mlp.0.weight``): the attribute or variable that holds it, seen from the frame that clips or steps.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.recording.frames import variables

WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule"})
_ADDED_BY_WRAPPERS = re.compile(r"(^|\.)(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)(?=\.|$)")
# How far out from the clip call the code that names the modules may stand.
FRAMES_SEARCHED = 12


class ParameterNames:
    """Names every parameter once.  No two that are alive share a name; one that is gone leaves its name to another."""

    def __init__(self) -> None:
        self._holders: dict[str, weakref.ref[Tensor]] = {}
        self._names: dict[int, str] = {}
        self._prefixes: dict[int, str] = {}
        self._sizes: dict[str, int] = {}
        self._optimized: set[int] = set()

    def have_an_optimizer(self, parameters: Sequence[Tensor]) -> bool:
        """Whether some optimizer updated any of ``parameters`` when they were named."""
        return not self._optimized.isdisjoint(map(id, parameters))

    def known(self, parameter: Tensor) -> str | None:
        """The name that ``parameter`` was given before."""
        name = self._names.get(id(parameter))
        return name if name is not None and self._holders[name]() is parameter else None

    def name(self, parameters: Sequence[Tensor], frame: FrameType | None) -> list[str]:
        """One name per parameter.  ``frame`` is where they were clipped or stepped.

        Looking for modules takes about a tenth of a second; it is done once for every new model.
        """
        named = [self.known(parameter) for parameter in parameters]
        unnamed = [parameter for parameter, name in zip(parameters, named, strict=True) if name is None]
        fresh = iter(self._spell(unnamed, frame) if unnamed else ())
        return [name if name is not None else next(fresh) for name in named]

    def whole_root(self, names: Sequence[str]) -> str | None:
        """How ``names`` begin where they are all the parameters of one root module; None otherwise."""
        prefixes = {name.partition(".")[0] for name in names}
        prefix = prefixes.pop() if len(prefixes) == 1 else ""
        return prefix if self._sizes.get(prefix) == len(names) else None

    def _spell(self, parameters: Sequence[Tensor], frame: FrameType | None) -> list[str]:
        modules, optimizers = _alive()
        owned = _owned_by_roots(modules)
        wanted = {id(parameter) for parameter in parameters}
        optimized = set().union(*map(parameter_ids, optimizers))
        self._optimized -= wanted
        self._optimized |= wanted & optimized
        outer = list(_scopes(frame))
        several = _owners(owned, _trained_here(wanted, optimizers, outer)) > 1
        # A parameter of several roots is named by the one that owns most of those asked for.
        owned.sort(key=lambda pair: (-len(wanted & pair[1].keys()), len(pair[1])))
        for root, names in owned:
            if not wanted.isdisjoint(names):
                # All of a root at once: its other parameters may be clipped one by one.
                self._spell_root(root, names, self._prefix(root, outer) if several else None)
                self._optimized |= names.keys() & optimized
        spelled = []
        for position, parameter in enumerate(parameters):
            name = self.known(parameter)
            if name is None:
                found = _variable(lambda value, p=parameter: value is p, outer)
                name = self._take(found or f"param[{position}]", parameter)
            spelled.append(name)
        return spelled

    def _spell_root(self, root: nn.Module, names: dict[int, str], prefix: str | None) -> None:
        for parameter in root.parameters():
            if self.known(parameter) is None:
                name = names[id(parameter)]
                self._take(name if prefix is None else f"{prefix}.{name}", parameter)
        if prefix is not None:
            self._sizes[prefix] = len(names)

    def _prefix(self, root: nn.Module, outer: list[Any]) -> str:
        known = self._prefixes.get(id(root))
        if known is None:
            found = _variable(lambda value: value is root or _unwrapped(value) is root, outer)
            known = self._prefixes[id(root)] = found or type(root).__name__.lower()
        return known

    def _take(self, name: str, parameter: Tensor) -> str:
        unique, number = name, 2
        while unique in self._holders and self._holders[unique]() is not None:
            unique, number = f"{name}#{number}", number + 1
        self._holders[unique] = weakref.ref(parameter)
        self._names[id(parameter)] = unique
        return unique


def parameter_ids(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ``id`` of every parameter that ``optimizer`` updates."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _trained_here(wanted: set[int], optimizers: list[torch.optim.Optimizer], scopes: list[dict[str, Any]]) -> set[int]:
    """The parameters of the optimizers that update any of ``wanted`` or can be seen from the training code."""
    visible = {id(value) for scope in scopes for value in list(scope.values())}
    own = [(optimizer, parameter_ids(optimizer)) for optimizer in optimizers]
    return wanted.union(*(ids for optimizer, ids in own if id(optimizer) in visible or not wanted.isdisjoint(ids)))


def _alive() -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
    """Every module and optimizer there is; a type is asked once, as a million objects are of a few thousand."""
    modules: list[nn.Module] = []
    optimizers: list[torch.optim.Optimizer] = []
    wanted: dict[type, list[Any] | None] = {}
    for thing in gc.get_objects():
        kind = type(thing)
        try:
            found = wanted[kind]
        except KeyError:
            found = modules if issubclass(kind, nn.Module) else None
            found = wanted[kind] = optimizers if issubclass(kind, torch.optim.Optimizer) else found
        if found is not None:
            found.append(thing)
    return (
        [module for module in modules if {"_modules", "_parameters"} <= module.__dict__.keys()],
        [optimizer for optimizer in optimizers if "param_groups" in optimizer.__dict__],
    )


def _owned_by_roots(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, dict[int, str]]]:
    """The root modules, and the names of their parameters by ``id``."""
    everything = list(modules)
    children = {
        id(child)
        for module in everything
        if type(module).__name__ not in WRAPPERS
        for child in module._modules.values()
        if child is not None
    }
    owned = []
    for module in everything:
        if id(module) in children or type(module).__name__ in WRAPPERS:
            continue
        names = {id(parameter): _unwrapped_name(name) for name, parameter in module.named_parameters()}
        if names:
            owned.append((module, names))
    return owned


def _owners(owned: list[tuple[nn.Module, dict[int, str]]], trained: set[int]) -> int:
    """How many roots it takes to own every trained parameter that has one: a root inside another adds nothing."""
    owners = 0
    missing = set(trained)
    for _, names in sorted(owned, key=lambda pair: -len(trained & pair[1].keys())):
        if not missing.isdisjoint(names):
            owners += 1
            missing -= names.keys()
    return owners


def _unwrapped(value: object) -> object:
    while type(value).__name__ in WRAPPERS and isinstance(value, nn.Module):
        inner = next((child for child in value._modules.values() if child is not None), None)
        if inner is None:
            return value
        value = inner
    return value


def _unwrapped_name(name: str) -> str:
    return _ADDED_BY_WRAPPERS.sub("", name).lstrip(".")


def _scopes(frame: FrameType | None) -> Iterator[dict[str, Any]]:
    """The variables of each frame outwards, and the attributes of its ``self``: attributes first."""
    for _ in range(FRAMES_SEARCHED):
        if frame is None:
            return
        local = variables(frame)
        owner = local.get("self")
        attributes = getattr(owner, "__dict__", None)
        if isinstance(attributes, dict):
            yield attributes
            if isinstance(owner, nn.Module):
                yield attributes.get("_modules", {})
                yield attributes.get("_parameters", {})
        yield local
        frame = frame.f_back


def _variable(matches: Any, scopes: Iterable[dict[str, Any]]) -> str | None:
    for scope in scopes:
        for name, value in list(scope.items()):
            if name != "self" and isinstance(name, str) and matches(value):
                return name.lstrip("_") or name
    return None
