"""Tensors in memory: numpy, torch and JAX arrays in mappings and lists, made into a tree."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gradscope.errors import GradscopeError
from gradscope.sources.formats.numpy_arrays import array_in_memory
from gradscope.sources.formats.tree import MAX_DEPTH, Leaf, Tree, UnreadableTensor
from gradscope.sources.parameters import is_parameter
from gradscope.sources.stored import MemoryTensor

# torch has no bfloat16 for numpy: the bits travel as integers of the same width.
TORCH_BITS = {"bfloat16": "int16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


def tree_of(value: Any, what: str) -> Tree:
    """``value`` with its arrays as ``MemoryTensor``: no copy where they lie in the CPU's memory.

    Raises:
        GradscopeError: it is nested more than 200 deep.
    """
    return _converted(value, what, _leaf, 0, {})


def gradient_tree_of(value: Any, what: str) -> Tree:
    """The same with the gradient of each parameter (None where it has none) in its place; other tensors are buffers.

    Raises:
        GradscopeError: it is nested more than 200 deep.
    """
    return _converted(value, what, _gradient_leaf, 0, {})


def _converted(value: Any, what: str, leaf: Callable[[Any], Tree], depth: int, done: dict[int, Tree]) -> Tree:
    if depth > MAX_DEPTH:
        raise GradscopeError(what, f"is nested more than {MAX_DEPTH} deep")
    # Parts that are shared many times over are converted once.
    if isinstance(value, Mapping | list | tuple) and not hasattr(value, "__array__"):
        if id(value) not in done:
            parts = value.items() if isinstance(value, Mapping) else enumerate(value)
            made = {key: _converted(part, what, leaf, depth + 1, done) for key, part in parts}
            done[id(value)] = made if isinstance(value, Mapping) else list(made.values())
        return done[id(value)]
    return leaf(value)


def _gradient_leaf(value: Any) -> Tree:
    if is_parameter(value):
        return _leaf(value.grad)
    leaf = _leaf(value)
    return UnreadableTensor("no parameter") if isinstance(leaf, MemoryTensor) else leaf


def _leaf(value: Any) -> Tree:
    if _is_torch_tensor(value):
        return _torch_leaf(value)
    if isinstance(value, np.ndarray):
        return _numpy_leaf(value)
    if isinstance(value, np.generic):
        return value.item()
    # JAX, TensorFlow and cupy arrays say how they become numpy's.
    if hasattr(value, "__array__") and hasattr(value, "dtype"):
        return _numpy_leaf(np.asarray(value))
    return value


def _is_torch_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _torch_leaf(tensor: Any) -> Leaf:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if str(tensor.layout) != "torch.strided":
        return UnreadableTensor("sparse tensor")
    if tensor.is_quantized or tensor.is_nested:
        return UnreadableTensor("quantized tensor" if tensor.is_quantized else "nested tensor")
    if tensor.is_meta:
        return UnreadableTensor("meta tensor without elements")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if bits := TORCH_BITS.get(dtype):
        return array_in_memory(tensor.view(getattr(sys.modules["torch"], bits)).numpy(), dtype)
    try:
        return array_in_memory(tensor.numpy())
    except TypeError:
        return UnreadableTensor(dtype)


def _numpy_leaf(array: np.ndarray[Any, Any]) -> Leaf:
    return UnreadableTensor("array of Python objects") if array.dtype.hasobject else array_in_memory(array)
