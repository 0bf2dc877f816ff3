"""Which framework trains, and which versions of what."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

from gradscope.recording.frames import variables

# Top-level package -> what people call it and the distribution that holds it.
_FRAMEWORKS = {
    "stable_baselines3": ("SB3", "stable_baselines3"),
    "sb3_contrib": ("SB3", "sb3_contrib"),
    "rsl_rl": ("rsl_rl", "rsl-rl-lib"),
    "lightning": ("Lightning", "lightning"),
    "pytorch_lightning": ("Lightning", "pytorch-lightning"),
    "transformers": ("Transformers", "transformers"),
    "accelerate": ("Accelerate", "accelerate"),
}
_REINFORCEMENT_LEARNING = ("SB3", "rsl_rl")
_FRAMES_SEARCHED = 40


def framework_of(frame: FrameType | None) -> str | None:
    """What trains in ``frame`` or outside it (``"SB3 PPO"``, ``"Transformers"``); None for a loop of the user's own."""
    found = None
    for _ in range(_FRAMES_SEARCHED):
        if frame is None:
            break
        name = _FRAMEWORKS.get(frame.f_globals.get("__name__", "").partition(".")[0], (None, ""))[0]
        if name in _REINFORCEMENT_LEARNING:
            algorithm = variables(frame).get("self")
            return name if algorithm is None else f"{name} {type(algorithm).__name__}"
        # The outermost one drives: a Trainer steps through Accelerate.
        found = name or found
        frame = frame.f_back
    return found


def versions() -> dict[str, str]:
    """The versions of Python, gradscope, torch and the frameworks that are loaded."""
    from gradscope import __version__

    found = {"python": platform.python_version(), "gradscope": __version__}
    loaded = [held for package, (_, held) in _FRAMEWORKS.items() if package in sys.modules]
    for distribution in ("torch", *loaded):
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            found[distribution] = "unknown"
    return found
