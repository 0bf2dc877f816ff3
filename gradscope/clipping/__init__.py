"""Every clip policy, and the notation that names them.

``POLICIES`` and ``check_notation`` load without numpy, so that a command line can list and check policies cheaply; the
policies themselves are loaded when first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradscope.clipping.catalogue import POLICIES, Argument, PolicyRule
from gradscope.clipping.parsing import check_notation, parse_policy

if TYPE_CHECKING:
    from gradscope.clipping.policy import Convention, ElementPolicy, Policy, ScalePolicy

__all__ = [
    "POLICIES",
    "Argument",
    "Convention",
    "ElementPolicy",
    "Policy",
    "PolicyRule",
    "ScalePolicy",
    "check_notation",
    "parse_policy",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("gradscope.clipping.policy"), name)
