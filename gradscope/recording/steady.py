"""The fast path of the watcher: a training that does the same at every step.

Most loops clip the same parameters on the same lines before every step of one optimizer.  After a few equal steps the
watcher puts a ``SteadyStep`` in front of itself, which asks only whether this step is like the last, in a third of the
time.  Whatever is different sends it back to the watcher, which takes over what the step had seen so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradscope.recording.clip_calls import ClipCall
from gradscope.recording.clip_groups import WatchedGroup, Witness
from gradscope.recording.scalars import take_down

if TYPE_CHECKING:
    from gradscope.recording.optimizers import OptimizerWatch

CLIP = "clip_grad_norm_"
# Equal steps before the next is expected to be equal, too.
STEPS_TO_BELIEVE = 3
INFINITY = float("inf")


class SteadyStep:
    """Sees the next ``steps`` steps of one optimizer, each with the clip calls of ``groups``, in their order.

    ``spectra`` is what is measured of them (see ``Plan``), ``step`` the number of the last step, ``seen`` the clip
    calls since then; ``conclude`` takes those of a step.
    """

    __slots__ = ("_conclude", "_expected", "_left", "_optimizer", "_spectra", "seen", "step", "stepping", "watch")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        watch: OptimizerWatch,
        groups: list[WatchedGroup],
        step: int,
        steps: int,
        spectra: int,
        conclude: Callable[[int, list[ClipCall]], None],
    ) -> None:
        self.watch = watch
        self.step = step
        self.seen: list[ClipCall] = []
        self.stepping = False
        # Told apart by its number: the optimizer's life is its owner's.
        self._optimizer = id(optimizer)
        self._expected = groups
        self._left = steps
        self._spectra = spectra
        self._conclude = conclude

    def clip(self, parameters: list[Tensor], max_norm: Any, norm_type: Any, frame: FrameType) -> ClipCall | None:
        """The call, measured, if it is the expected one and of a new gradient; None where the watcher is to look."""
        seen = self.seen
        if len(seen) == len(self._expected):
            return None
        group = self._expected[len(seen)]
        if (
            group.site != (frame.f_code, frame.f_lasti)
            or list(map(id, parameters)) != group.ids
            or type(max_norm) is not float
            or not 0.0 < max_norm < INFINITY
            or group.meter is None
        ):
            return None
        gradients = [parameter.grad for parameter in parameters]
        smallest = gradients[group.smallest]
        used = group.used
        if smallest is None or (used is not None and used.gradient is smallest and used.version == smallest._version):
            return None
        measured = group.meter.copied(gradients, self._spectra)
        if measured is None:
            return None
        call = ClipCall(CLIP, group.call_site, [(group, measured)], time.time(), max_norm, None, float(norm_type))
        seen.append(call)
        return call

    def clipped(self, call: ClipCall, total_norm: Any) -> None:
        """Take down what the call returned."""
        call.total_norm = total_norm
        call.returned = take_down(total_norm)
        group = call.parts[0][0]
        call.witness = group.used = Witness.of(group.refs[group.smallest]())

    def before_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the step is the expected one."""
        if id(optimizer) != self._optimizer or len(self.seen) != len(self._expected) or self.stepping:
            return False
        if self.watch.changed(optimizer):
            return False
        self.stepping = True
        return True

    def after_step(self) -> bool:
        """The step is made; whether more are expected."""
        self.stepping = False
        self.step += 1
        seen, self.seen = self.seen, []
        self._conclude(self.step, seen)
        self._left -= 1
        return self._left > 0
