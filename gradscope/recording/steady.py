"""The fast path of the watcher: a training that does the same at every step.

Most loops clip the same parameters on the same lines before every step of one optimizer.  After a few equal steps the
watcher puts a ``SteadyStep`` in front of itself, which asks only whether this step is like the last, in a third of the
time.  Whatever is different sends it back to the watcher, which takes over what the step had seen so far.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradscope.recording.clip_calls import ClipCall
from gradscope.recording.clip_groups import WatchedGroup, Witness
from gradscope.recording.sampling import Sampling
from gradscope.recording.scalars import take_down

if TYPE_CHECKING:
    from gradscope.recording.optimizers import OptimizerWatch

CLIP = "clip_grad_norm_"
# Equal steps before the next is expected to be equal, too.
STEPS_TO_BELIEVE = 3
INFINITY = float("inf")


class SteadyStep:
    """Sees the next steps of one optimizer, each with the clip calls of ``groups``, in their order.

    ``sampling`` says what is measured of them, ``step`` is the number of the last step, ``seen`` are the clip calls
    since then; ``emit`` takes each when its step is made (see ``watcher.Sink``).  ``left`` is set, under ``lock``, when
    the watcher has taken over: another thread may do what makes it.
    """

    __slots__ = ("_emit", "_expected", "_optimizer", "_sampling", "left", "lock", "seen", "step", "stepping", "watch")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        watch: OptimizerWatch,
        groups: list[WatchedGroup],
        step: int,
        sampling: Sampling,
        emit: Callable[[int, ClipCall, Any, list[Any]], None],
        lock: threading.RLock,
    ) -> None:
        self.lock = lock
        self.left = False
        self.watch = watch
        self.step = step
        self.seen: list[ClipCall] = []
        self.stepping = False
        # Told apart by its number: the optimizer's life is its owner's.
        self._optimizer = id(optimizer)
        self._expected = groups
        self._sampling = sampling
        self._emit = emit

    def clip(self, parameters: list[Tensor], max_norm: Any, norm_type: Any, frame: FrameType) -> ClipCall | None:
        """The call, measured, if it is the expected one and of a new gradient; None where the watcher is to look."""
        with self.lock:
            seen = self.seen
            if self.left or len(seen) == len(self._expected):
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
            if smallest is None or (
                used is not None and used.gradient is smallest and used.version == smallest._version
            ):
                return None
            measured = group.meter.copied(gradients, self._sampling.plan(self.step + 1).spectra)
            if measured is None:
                return None
            call = ClipCall(CLIP, group.call_site, [(group, measured)], time.time(), max_norm, None, float(norm_type))
            # Its version is that after the call, which is still to be made.
            call.witness = Witness(group.ids[group.smallest], smallest, -1)
            seen.append(call)
            return call

    def clipped(self, call: ClipCall, total_norm: Any) -> None:
        """Take down what the call returned."""
        call.total_norm = total_norm
        call.returned = take_down(total_norm)
        if call.witness is not None:
            call.witness.version = call.witness.gradient._version
            call.parts[0][0].used = call.witness

    def before_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the step is the expected one."""
        with self.lock:
            if self.left or self.stepping or id(optimizer) != self._optimizer or len(self.seen) != len(self._expected):
                return False
            if self.watch.changed(optimizer):
                return False
            if self._sampling.plan(self.step + 1).tenth:
                for call in self.seen:
                    call.weigh()
            self.stepping = True
            return True

    def after_step(self) -> bool:
        """The step is made; False where the watcher has taken over since it began."""
        with self.lock:
            if self.left:
                return False
            self.stepping = False
            self.step += 1
            seen, self.seen = self.seen, []
            for call in seen:
                call.witness = None
                self._emit(self.step, call, True, call.update_norms() if call.weight_norms else [])
            return True
