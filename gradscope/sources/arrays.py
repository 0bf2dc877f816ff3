"""Tensors in memory: numpy, torch and JAX arrays in mappings, lists and modules, made into a tree."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradscope.errors import GradscopeError
from gradscope.sources.formats.numpy_arrays import array_in_memory
from gradscope.sources.formats.tree import MAX_DEPTH, Leaf, Tree, UnreadableTensor

# torch has no bfloat16 for numpy: the bits travel as integers of the same width.
TORCH_BITS = {"bfloat16": "int16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


def is_module(value: object) -> bool:
    """Whether ``value`` has parameters with gradients, as ``torch.nn.Module`` has."""
    return callable(getattr(value, "named_parameters", None))


def gradients_of_module(module: Any) -> dict[str, Any]:
    """Each parameter's ``.grad`` by name; None where it has none."""
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def parameters_of_module(module: Any) -> dict[str, Any]:
    """Each parameter by name."""
    return dict(module.named_parameters())


def tree_of(value: Any, what: str) -> Tree:
    """``value`` with its arrays as ``MemoryTensor``: no copy where they lie in the CPU's memory.

    Raises:
        GradscopeError: it is nested more than 200 deep.
    """
    return _converted(value, what, 0, {})


def _converted(value: Any, what: str, depth: int, done: dict[int, Tree]) -> Tree:
    if depth > MAX_DEPTH:
        raise GradscopeError(what, f"is nested more than {MAX_DEPTH} deep")
    # Parts that are shared many times over are converted once.
    if isinstance(value, Mapping | list | tuple) and not hasattr(value, "__array__"):
        if id(value) not in done:
            done[id(value)] = _converted_container(value, what, depth + 1, done)
        return done[id(value)]
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


def _converted_container(value: Any, what: str, depth: int, done: dict[int, Tree]) -> Tree:
    if isinstance(value, Mapping):
        return {key: _converted(part, what, depth, done) for key, part in value.items()}
    return [_converted(part, what, depth, done) for part in value]


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
