"""An optimizer's ``state_dict()`` in a file: whose state it is, of which type, and where its moments lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from gradscope.errors import GradscopeError
from gradscope.sources.checkpoints.optimizer_types import DAMAGED, optimizer_type
from gradscope.sources.checkpoints.parameter_names import Shape, is_float
from gradscope.sources.checkpoints.scalars import hyper_parameters, mapping_of, number_of
from gradscope.sources.formats.tree import Tree
from gradscope.sources.stored import FileTensor, MemoryTensor, StoredTensor, StreamTensor
from gradscope.tensors import ClipGroup

# What the forensics read; everything else in a state is left where it lies.
MOMENTS = (
    "exp_avg",
    "exp_avg_sq",
    "square_avg",
    "grad_avg",
    "momentum_buffer",
    "sum",
    "variance",
    "row_var",
    "col_var",
    "exp_avg_sq_row",
    "exp_avg_sq_col",
)
# Sums and means of squares, which are never negative.
SQUARES = frozenset(
    ("exp_avg_sq", "square_avg", "sum", "variance", "row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col")
)
# State that has its parameter's shape.
_SHAPED = (
    "exp_avg",
    "exp_avg_sq",
    "square_avg",
    "momentum_buffer",
    "sum",
    "variance",
    "exp_inf",
    "state1",
    "prev",
    "ax",
)
MAX_PARAMETERS = 1_000_000


@dataclass(frozen=True, slots=True, eq=False)
class StoredParameter:
    """One parameter's state; ``shape`` is None where the state does not tell it."""

    name: str
    shape: Shape
    param_group: int
    step: float | None
    moments: Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True, eq=False)
class StoredOptimizer:
    """One optimizer of a checkpoint, its moments not yet read."""

    name: str
    type: str
    param_groups: tuple[Mapping[str, Any], ...]
    parameters: tuple[StoredParameter, ...]
    clip_groups: tuple[ClipGroup, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names, in the optimizer's order."""
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def unnamed(self) -> int:
        """How many parameters have no name of their own."""
        return sum(1 for i, parameter in enumerate(self.parameters) if parameter.name == f"param[{i}]")


class Naming(Protocol):
    """How a family of checkpoints names parameters: from their shapes, one list for each parameter group."""

    def __call__(self, shapes: Sequence[Sequence[Shape]]) -> Sequence[str | None] | None:
        """A name for each parameter, None where it cannot be told; None for all."""


def is_optimizer_state(node: Tree) -> bool:
    """Whether ``node`` is what ``Optimizer.state_dict()`` gives, be it damaged."""
    content = mapping_of(node)
    return content is not None and {"state", "param_groups"} <= content.keys()


def stored_optimizer(name: str, node: Tree, naming: Naming, what: str, type_: str | None = None) -> StoredOptimizer:
    """The optimizer whose ``state_dict()`` is ``node``.

    Names come from the state itself where it holds them, else from ``naming``; a parameter that neither names is
    ``param[i]``.  ``type_`` is the class that the file tells, else its keys tell it.  ``what`` names the file.  Of a
    state or parameter groups of a wrong type only that is told: the type is ``"damaged"``.

    Raises:
        GradscopeError: the parameters are not numbered as PyTorch does.
    """
    content = mapping_of(node) or {}
    state, groups = mapping_of(content.get("state")), _param_groups(content.get("param_groups"))
    if state is None or groups is None:
        return StoredOptimizer(name, DAMAGED, (), ())
    keys = _keys(groups, what)
    entries = [{k: mapping_of(state.get(k)) or {} for k in group} for group in keys]
    shapes = [[_shape(entry) for entry in group.values()] for group in entries]
    names = _names(groups, keys, naming(shapes))
    hyper = tuple(hyper_parameters(group) for group in groups)
    flat = [(g, entry) for g, group in enumerate(entries) for entry in group.values()]
    parameters = tuple(
        StoredParameter(
            name=names[i],
            shape=_shape(entry),
            param_group=g,
            step=number_of(entry.get("step", groups[g].get("step"))),
            moments={key: entry[key] for key in MOMENTS if _is_moment(entry.get(key))},
        )
        for i, (g, entry) in enumerate(flat)
    )
    return StoredOptimizer(name, type_ or _type(flat, hyper), hyper, parameters)


def _param_groups(node: Tree) -> list[Mapping[Any, Any]] | None:
    """The parameter groups; None where they are not what PyTorch writes."""
    groups = [mapping_of(group) or {} for group in node] if isinstance(node, list | tuple) else [{}]
    return groups if all("params" in group for group in groups) else None


def _keys(groups: Sequence[Mapping[Any, Any]], what: str) -> list[list[int | str]]:
    """The state's keys of each group's parameters, in order; a parameter that stands twice counts where it is first."""
    keys: list[list[int | str]] = []
    seen: set[int | str] = set()
    for group in groups:
        params = group.get("params")
        if not isinstance(params, list | tuple) or not all(type(key) in (int, str) for key in params):
            raise GradscopeError(what, "holds an optimizer state whose parameters are not numbered")
        fresh = list(dict.fromkeys(key for key in params if key not in seen))
        seen.update(fresh)
        keys.append(fresh)
    if len(seen) > MAX_PARAMETERS:
        raise GradscopeError(what, f"holds an optimizer state of {len(seen):,} parameters")
    return keys


def _names(
    groups: Sequence[Mapping[Any, Any]], keys: Sequence[Sequence[int | str]], told: Sequence[str | None] | None
) -> list[str]:
    count = sum(map(len, keys))
    stored = [name for group, members in zip(groups, keys, strict=True) for name in _stored_names(group, members)]
    if len(stored) == count == len(set(stored)):
        return stored
    if told is None or len(told) != count:
        told = [None] * count
    return [name if name is not None else f"param[{i}]" for i, name in enumerate(told)]


def _stored_names(group: Mapping[Any, Any], keys: Sequence[int | str]) -> list[str]:
    """Names in the state itself: PyTorch's ``param_names``, or names for keys, as FSDP's full state has."""
    names = group.get("param_names")
    if isinstance(names, list | tuple) and len(names) == len(keys):
        return [name for name in names if isinstance(name, str)]
    return [key for key in keys if isinstance(key, str)]


def _shape(entry: Mapping[Any, Any]) -> Shape:
    for key in _SHAPED:
        if isinstance(value := entry.get(key), FileTensor | MemoryTensor | StreamTensor):
            return value.info.shape
    return _factored_shape(entry)


def _factored_shape(entry: Mapping[Any, Any]) -> Shape:
    """The shape behind Adafactor's means: Hugging Face drops the averaged dimension, PyTorch keeps it as 1."""
    rows = entry.get("exp_avg_sq_row", entry.get("row_var"))
    columns = entry.get("exp_avg_sq_col", entry.get("col_var"))
    if not (_is_moment(rows) and _is_moment(columns) and rows.info.shape and columns.info.shape):
        return None
    leading = rows.info.shape if "exp_avg_sq_row" in entry else rows.info.shape[:-1]
    return (*leading, columns.info.shape[-1])


def _is_moment(value: object) -> TypeGuard[StoredTensor]:
    return isinstance(value, FileTensor | MemoryTensor | StreamTensor) and is_float(value.info)


def _type(flat: Sequence[tuple[int, Mapping[Any, Any]]], hyper: Sequence[Mapping[str, Any]]) -> str:
    stored = (item for _, entry in flat for item in entry.items())
    state_keys = {key for key, value in stored if isinstance(key, str) and value is not None}
    hyper_keys = {key for group in hyper for key in group}
    decoupled = any(group.get("decoupled_weight_decay") is True for group in hyper)
    return optimizer_type(state_keys, hyper_keys, decoupled)


def whole_clip_group(optimizer: StoredOptimizer, name: str, max_norm: float | None) -> tuple[ClipGroup, ...]:
    """One clip group over everything that the optimizer trains; libraries write 0 or infinity for no clipping."""
    limit = max_norm if max_norm is not None and 0.0 < max_norm < math.inf else None
    return (ClipGroup(name, optimizer.names, limit),)
