"""Parameters in memory: a torch module's, or those in mappings and lists, whose gradients are their ``.grad``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from gradscope.errors import GradscopeError
from gradscope.sources.gradient_names import GRADIENT_WORDS

READABLE = (
    "give a path, a quoted glob or a list of paths; a mapping of names to arrays or tensors, or a list of such "
    "mappings (one step each); a module, or list(module.named_parameters())"
)


def named_tensors(source: Any, what: str) -> Any:
    """``source`` as it is if it is an array, a mapping or a list; a module, or (name, tensor) pairs, as a mapping.

    Raises:
        GradscopeError: it is something else or empty, or two pairs have one name.
    """
    if callable(getattr(source, "named_parameters", None)):
        return dict(source.named_parameters())
    if isinstance(source, Iterator):
        kind = type(source).__name__
        raise GradscopeError(what, f"is a {kind}, which can be read only once: put it into a list", READABLE)
    if not (isinstance(source, Mapping | list | tuple) or (hasattr(source, "__array__") and hasattr(source, "dtype"))):
        raise GradscopeError(what, f"is of type {type(source).__name__}: it holds no floating-point tensors", READABLE)
    if isinstance(source, Mapping | list | tuple) and not source:
        raise GradscopeError(what, "is empty: it holds no floating-point tensors", READABLE)
    return _of_pairs(source, what) if _is_list_of_pairs(source) else source


def _is_list_of_pairs(source: object) -> bool:
    return isinstance(source, list | tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in source
    )


def _of_pairs(pairs: Any, what: str) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise GradscopeError(what, f"holds two tensors named {name!r}")
        mapping[name] = value
    return mapping


def is_parameter(value: object) -> bool:
    """Whether ``value`` is a torch tensor that backward() gives a gradient to, or did: a leaf, not a result."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor) or not value.is_leaf:
        return False
    return bool(isinstance(value, torch.nn.Parameter) or value.requires_grad or value.grad is not None)


def parameters_in(source: Any) -> list[Any]:
    """The parameters in ``source``, if it is their gradients that are meant.

    Where it holds gradients by name beside the parameters (``{"w.grad": …, "w": …}``), those are meant: the list is
    empty then.
    """
    found, seen = [], set()
    stack: list[tuple[Any, bool]] = [(source, False)]
    while stack:
        value, is_gradient = stack.pop()
        if is_parameter(value):
            found.append(value)
        elif isinstance(value, Mapping | list | tuple) and not hasattr(value, "__array__"):
            if id(value) in seen:
                continue
            seen.add(id(value))
            named = value.items() if isinstance(value, Mapping) else ((None, part) for part in value)
            stack += [(part, is_gradient or _says_gradient(name)) for name, part in named]
        elif is_gradient and hasattr(value, "dtype"):
            return []
    return found


def _says_gradient(name: object) -> bool:
    parts = name.split(".") if isinstance(name, str) else [""]
    return parts[0] in GRADIENT_WORDS or parts[-1] in GRADIENT_WORDS


def require_gradients(parameters: list[Any], what: str) -> None:
    """Whether any of ``parameters`` has a gradient.

    Raises:
        GradscopeError: none has.
    """
    if all(parameter.grad is None for parameter in parameters):
        count = "its parameter has no gradient" if len(parameters) == 1 else "none of its parameters has a gradient"
        raise GradscopeError(
            what,
            f"{count} (.grad is None)",
            'look after loss.backward() and before optimizer.zero_grad(); as_="weights" reads the values',
        )
