"""Gradient diagnostics: norms, clip rates and direction changes of any gradient file or checkpoint.

Importing gradscope loads nothing else: each name below is fetched when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradscope.api import check, compare, inspect, simulate
    from gradscope.check_results import Check
    from gradscope.comparison_results import Comparison
    from gradscope.errors import GradscopeError
    from gradscope.recording.recorder import Recorder as Recorder
    from gradscope.results import Inspection, Simulation
    from gradscope.spread import Spread

# Said here, so that a trace tells which version made it even where gradscope runs from its source tree.
__version__ = "0.1.0"

# Recorder, which needs torch, is left out: `import *` would load it.
__all__ = [
    "Check",
    "Comparison",
    "GradscopeError",
    "Inspection",
    "Simulation",
    "Spread",
    "__version__",
    "check",
    "compare",
    "inspect",
    "simulate",
]

_HOMES = {
    "Check": "gradscope.check_results",
    "Comparison": "gradscope.comparison_results",
    "GradscopeError": "gradscope.errors",
    "Inspection": "gradscope.results",
    "Recorder": "gradscope.recording.recorder",
    "Simulation": "gradscope.results",
    "Spread": "gradscope.spread",
    "check": "gradscope.api",
    "compare": "gradscope.api",
    "inspect": "gradscope.api",
    "simulate": "gradscope.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name == "Recorder":
        # In a recorded command another recorder is made the moment torch is there: not halfway through that module.
        import_module("torch")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOMES})
