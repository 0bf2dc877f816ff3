"""Numbers and mappings out of a checkpoint's tree, whatever they are wrapped in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gradscope.notation import setting
from gradscope.sources.checkpoints.parameter_names import is_float
from gradscope.sources.formats.tree import Opaque, Tree
from gradscope.sources.stored import FileTensor, MemoryTensor, StreamTensor, read
from gradscope.trace.schema import LintFinding


def mapping_of(node: Tree) -> Mapping[Any, Any] | None:
    """``node`` as a mapping, if it is one or a subclass of dict."""
    if isinstance(node, Opaque):
        return node.mapping
    return node if isinstance(node, Mapping) else None


def attributes_of(node: Tree) -> Mapping[Any, Any]:
    """The attributes of an object of an unknown class; a mapping's items."""
    if isinstance(node, Opaque) and isinstance(node.state, Mapping):
        return node.state
    return mapping_of(node) or {}


def number_of(value: Tree) -> float | None:
    """``value`` as a float, if it is a finite number or a tensor of one; None for everything else."""
    if isinstance(value, FileTensor | MemoryTensor | StreamTensor):
        value = _only_element(value)
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def max_norm_of(value: Tree, where: str) -> tuple[float | None, tuple[str, ...]]:
    """``value`` as a ``max_norm``, None for none; and a note if it is there but no number that could be one.

    0 and infinity stand for no clipping, as the libraries write it.  ``where`` names the file for the note.
    """
    number = value if isinstance(value, float) and math.isinf(value) else number_of(value)
    if value is None or (number is not None and number >= 0):
        return number if number and math.isfinite(number) else None, ()
    said = repr(value) if isinstance(value, bool | int | float | str) else "no number"
    return None, (f"max_norm is unknown: max_grad_norm in {where} is {said[:40]}.",)


def unusable_limit(value: Tree, where: str) -> tuple[LintFinding, ...]:
    """What is wrong with ``value`` as the max_norm of a library that clips at any number; nothing if it is positive."""
    number = number_of(value)
    if number is None or number > 0:
        return ()
    effect = "it turns every gradient around" if number else "it zeroes every gradient and stops training"
    return (LintFinding("bad-threshold", f"max_grad_norm in {where} is {setting(number)}: {effect}."),)


def _only_element(tensor: FileTensor | MemoryTensor | StreamTensor) -> float | None:
    if tensor.info.numel != 1:
        return None
    if is_float(tensor.info):
        return read(tensor).item()
    # Counters are integers in some optimizers; read() knows floats only, so their bits pass through it as such.
    same_width = {"int64": "float64", "int32": "float32"}.get(tensor.info.dtype)
    if same_width is None:
        return None
    bits = tensor.array if isinstance(tensor, MemoryTensor) else read(_relabelled(tensor, same_width))
    return float(bits.view(tensor.info.dtype).item())


def _relabelled(tensor: FileTensor | StreamTensor, dtype: str) -> FileTensor | StreamTensor:
    return replace(tensor, info=replace(tensor.info, dtype=dtype))


def hyper_parameters(group: Mapping[Any, Any]) -> dict[str, Any]:
    """The plain values of a parameter group: numbers, strings, bools, None and tuples of them."""
    plain: dict[str, Any] = {}
    for key, value in group.items():
        if not isinstance(key, str) or key in ("params", "param_names"):
            continue
        if isinstance(value, bool | str) or value is None:
            plain[key] = value
        elif isinstance(value, list | tuple) and len(value) <= 16:
            plain[key] = tuple(number_of(item) for item in value)
        elif (number := number_of(value)) is not None:
            plain[key] = number
    return plain
