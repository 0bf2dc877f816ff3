"""What is remembered of each optimizer while it trains."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor

from gradscope._meter import same_parameters
from gradscope.recording.clip_calls import ClipCall
from gradscope.recording.clip_groups import WatchedGroup, Witness
from gradscope.recording.placement import local

# They clip inside their own optimizers, before torch's optimizer is called with the result.
CLIPPING_FRAMEWORKS = {"deepspeed": "DeepSpeed", "megatron": "Megatron"}
FRAMES_SEARCHED = 16
# Their update does not depend on the length of the gradient.
NORMALISING = ("muon",)


@dataclass(eq=False, slots=True)
class OptimizerWatch:
    """One optimizer.  ``round`` is the step in which it last stepped, ``captured`` whether its gradient is taken.

    ``frame`` finds where it is stepped.  ``never`` are the parameters that never had a gradient so far, by position,
    ``unused`` their names after the first step, and ``sizes`` the norms that their weights had then.  ``equal_steps``
    in a row used the clip calls of ``last_groups``.
    """

    ref: weakref.ref[torch.optim.Optimizer]
    name: str
    after_clipping: str | None
    normalises: bool = False
    parameters: list[Tensor] = field(default_factory=list)
    ids: frozenset[int] = frozenset()
    never: list[int] = field(default_factory=list)
    unused: dict[int, str] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)
    round: int = -1
    finished: int = 0
    captured: bool = False
    frame: Callable[[], FrameType | None] = lambda: None
    equal_steps: int = 0
    last_groups: list[WatchedGroup] = field(default_factory=list)
    used: list[Witness] = field(default_factory=list)
    calls: list[ClipCall] = field(default_factory=list)
    rest_of: dict[tuple[frozenset[int], ...], list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> OptimizerWatch:
        """Begin to watch ``optimizer``, which is being stepped."""
        name = type(optimizer).__name__
        watch = cls(
            weakref.ref(optimizer), name, _clipped_before(sys._getframe(1)), name.lower().startswith(NORMALISING)
        )
        # The parameters live as long as their optimizer, and no longer for being watched.
        weakref.finalize(optimizer, watch.release).atexit = False
        return watch

    def release(self) -> None:
        """Let go of everything that belongs to the training."""
        self.unused = dict(zip(self._kept(), self.never_used(), strict=True))
        self.parameters.clear()
        self.rest_of.clear()
        self.used.clear()

    def changed(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether parameters were added or exchanged since ``refresh``."""
        return not same_parameters(optimizer, self.parameters)

    def refresh(self, optimizer: torch.optim.Optimizer) -> None:
        """Notice parameters that were added or exchanged since the last step."""
        if not self.changed(optimizer):
            return
        held = self.parameters
        known = self.ids - {id(held[i]) for i in self.never}
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.ids = frozenset(map(id, self.parameters))
        self.never = [i for i, parameter in enumerate(self.parameters) if id(parameter) not in known]
        self.rest_of.clear()

    def rest(self, members: tuple[frozenset[int], ...]) -> list[Tensor]:
        """The parameters that are in none of ``members``."""
        found = self.rest_of.get(members)
        if found is None:
            covered = frozenset().union(*members)
            found = self.rest_of[members] = [p for p in self.parameters if id(p) not in covered]
        return found

    def note_gradients(self) -> None:
        """Strike out the parameters that have a gradient now."""
        self.never = [i for i in self.never if self.parameters[i].grad is None]

    def wait_for(self, names: dict[int, str]) -> None:
        """These parameters, by position, have no gradient at the first step."""
        self.unused = names
        self.sizes = {i: _size(self.parameters[i]) for i in names}

    def never_used(self) -> list[str]:
        """The names of those that had none throughout, and are the weights that they were.

        What changed without a gradient is trained in another way: TRPO sets its actor by a line search.
        """
        return [self.unused[i] for i in self._kept()]

    def _kept(self) -> list[int]:
        waiting = [i for i in self.never if i in self.unused]
        return [i for i in waiting if i >= len(self.parameters) or _size(self.parameters[i]) == self.sizes[i]]


@torch.no_grad()
def _size(parameter: Tensor) -> float:
    """The L2 norm of a parameter; 0 where it has no elements to be looked at."""
    if parameter.device.type not in ("cpu", "cuda") or parameter.layout is not torch.strided or not parameter.numel():
        return 0.0
    return float(torch.linalg.vector_norm(local(parameter), dtype=torch.float64))


def _clipped_before(frame: FrameType | None) -> str | None:
    for _ in range(FRAMES_SEARCHED):
        if frame is None:
            return None
        framework = CLIPPING_FRAMEWORKS.get(frame.f_globals.get("__name__", "").partition(".")[0])
        if framework is not None:
            return framework
        frame = frame.f_back
    return None
