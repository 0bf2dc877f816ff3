"""From clip calls and optimizer steps to the rows of a trace.

A clip call is measured when it is made and waits for the optimizer that uses its gradient; what an optimizer updates
and no clip call covered is measured when it steps.  A step of the trace is a round: it ends when an optimizer that has
stepped in it steps again, so that the optimizers of one iteration (actor, critic, entropy coefficient) share a step.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gradscope._meter import SteadySteps
from gradscope.recording.clip_calls import ClipCall
from gradscope.recording.clip_groups import GroupBook, WatchedGroup, Witness, call_site
from gradscope.recording.lint import ClipLint
from gradscope.recording.naming import parameter_ids
from gradscope.recording.optimizers import OptimizerWatch
from gradscope.recording.sampling import Sampling
from gradscope.recording.scalars import take_down
from gradscope.recording.steady import STEPS_TO_BELIEVE, clip_call, expected, plans_after, witness_of

if TYPE_CHECKING:
    from gradscope._meter import ExpectedClip, RowBatch

INFINITY = float("inf")
# An optimizer that joins after so many steps of the others is taken for the beginning of another training.
STEPS_ALONE = 8
# A group clipped so often without a step has no optimizer that can be seen.
CLIPS_WITHOUT_STEP = 8
# Finds the line that steps an optimizer; looked for only where it is new.
FrameFinder = Callable[[], FrameType | None]


class Sink(Protocol):
    """Where the rows go."""

    def emit(self, step: int, call: ClipCall, stepped: Any, update_norms: list[Any]) -> None:
        """Take one row; ``stepped`` is a bool, None, or a tensor that is zero where the optimizer stepped."""

    def failed(self, error: BaseException) -> None:
        """Recording cannot go on."""

    def names_of(self, parameters: list[Tensor]) -> list[str]:
        """The names of parameters that were met before."""

    @property
    def steps_left(self) -> int:
        """How many more steps are to be recorded, -1: all."""


class Watcher:
    """Told by ``Interception`` what happens; tells ``sink`` the rows and ``lint`` what is wrong.

    ``steady`` sees steps that are like the last, and puts their rows straight into ``rows`` (None: sees none).
    """

    def __init__(
        self, sink: Sink, book: GroupBook, lint: ClipLint, sampling: Sampling, rows: RowBatch | None = None
    ) -> None:
        self.sink = sink
        self.step = 0
        self.fault: str | None = None
        self.steady = SteadySteps(rows, time.time, self._emit_steady, self._after_left_clip, self.broke)
        # What the fast path saw begin, before another thread did something that it had not expected.
        self._left_clip: ClipCall | None = None
        self._left_steps: dict[int, tuple[OptimizerWatch, list[ClipCall]]] = {}
        self._book = book
        self._lint = lint
        self._sampling = sampling
        self._active = True
        self._local = _Depth()
        self._lock = threading.RLock()
        self._calls: dict[WatchedGroup, ClipCall] = {}
        self._witnessed: dict[int, ClipCall] = {}
        self._optimizers: dict[int, OptimizerWatch] = {}
        self._stepped: list[OptimizerWatch] = []

    def watching(self) -> bool:
        """Whether a clip call made now is to be looked at."""
        return self._active and not self._local.depth and not self.steady.inside()

    def stepping(self) -> bool:
        """Whether an optimizer step made now is to be looked at."""
        return self._active

    def nested(self) -> _Depth:
        """Within this context clip calls of this thread are parts of one that was seen already."""
        return self._local

    def stop(self) -> None:
        """Look at nothing any more."""
        self._active = False
        self.steady.leave()

    def leave_steady(self) -> None:
        """Something is not as it was at the last steps: take over what the fast path has seen of this one."""
        if not self.steady.on:
            return
        with self._lock:
            inside_step = self.steady.stepping == threading.get_ident()
            left = self.steady.leave()
            if left is None:
                return
            watch, step, clips, seen, spectra = left
            watch.finished += step - watch.round
            watch.round = self.step = step
            watch.used = [witness_of(clip) for clip in clips]
            calls = [clip_call(clip, spectra) for clip in clips[:seen]]
            if self.steady.clipping:
                self._left_clip = calls[-1]
            if self.steady.stepping and calls:
                # Another thread is making the step, and concludes it.
                self._left_steps[self.steady.stepping] = watch, calls
                return
            for call in calls:
                self._calls[call.parts[0][0]] = call
            if inside_step and calls:
                # It has failed, or steps another optimizer.
                self._local.stepping.append(watch)
                watch.captured, watch.calls = True, calls

    def _emit_steady(self, step: int, clip: ExpectedClip, spectra: int, update_norms: Any) -> None:
        self.sink.emit(step, clip_call(clip, spectra), True, [] if update_norms is None else [update_norms])

    def _after_left_clip(self, total_norm: Any) -> None:
        call, self._left_clip = self._left_clip, None
        if call is not None:
            self.after_clip(call, total_norm)

    def _expect_more(self, watch: OptimizerWatch, calls: list[ClipCall], stepped: Any) -> None:
        """Have the fast path look at the next steps of ``watch``, if they will be like this one and those before."""
        groups = [call.parts[0][0] for call in calls]
        watch.equal_steps = watch.equal_steps + 1 if groups == watch.last_groups else 0
        watch.last_groups = groups
        optimizer = watch.ref()
        if (
            watch.equal_steps < STEPS_TO_BELIEVE
            or not self._sampling.records_all_after(self.step)
            or stepped is not True
            or optimizer is None
            or watch.never
            or watch.normalises
            or self._calls
            or self._local.stepping
            or self._stepped != [watch]
            or len(watch.used) != len(groups)
            or not all(call.steady for call in calls)
            or watch.rest(tuple([group.members for group in groups]))
        ):
            return
        clips = [clip for clip in map(expected, groups, watch.used) if clip is not None]
        if len(clips) == len(groups):
            plans = plans_after(self.step, self._sampling)
            self.steady.begin(watch, optimizer, clips, self.step, plans, self.sink.steps_left)

    # --- clip calls --------------------------------------------------------------------------------------------------

    def before_clip(
        self,
        function: str,
        parameters: list[Tensor],
        frame: FrameType | None,
        max_norm: Any = None,
        norm_type: Any = None,
        total_norm: Any = None,
        clip_value: Any = None,
    ) -> ClipCall | None:
        """Measure the gradients of ``parameters`` as the clip call is about to find them."""
        with self._lock:
            limit = None if max_norm is None else float(max_norm)
            if not parameters:
                self._lint.nothing_to_clip(function, call_site(frame), self.step, 0)
                return None
            group, whole = self._book.clipped(parameters, frame, function)
            where = group.call_site
            if group.watch is not None and group.watch.captured and _inside_step(frame):
                # A later evaluation of the closure: the step's gradient is that of the first.
                return None
            has_gradient = whole and parameters[group.smallest].grad is not None
            if not has_gradient and all(parameter.grad is None for parameter in parameters):
                self._lint.nothing_to_clip(function, where, self.step, len(parameters))
                return None
            watch = group.watch
            step = self.step + 1 if watch is not None and watch.round == self.step else self.step
            if clip_value is not None or (limit is not None and not 0.0 < limit < INFINITY):
                self._look_at_threshold(limit, clip_value, where, step, group)
            same = self._same_gradient(group)
            if same is not None:
                if same.function == function and same.max_norm != INFINITY:
                    self._lint.twice(function, where, step, self._name(group))
                same.combine(limit, clip_value)
                return same
            for used in (watch,) if watch is not None else self._optimizers.values():
                for witness in used.used:
                    if witness.confirms(group):
                        self._lint.after_step(function, where, step, self._name(group))
                        return None
            earlier = self._calls.get(group)
            if earlier is not None and not earlier.consumers:
                self._unused(group, earlier)
            call = ClipCall(
                function,
                where,
                [(group, self._measure(group, parameters, whole, step))],
                time.time(),
                limit,
                None if clip_value is None else float(clip_value),
                None if norm_type is None else float(norm_type),
                total_norm,
                take_down(total_norm),
            )
            combined = None if total_norm is None else self._combined(call)
            if combined is not None:
                combined.parts.extend(call.parts)
                call = combined
            # Anew at the end: rows go out in the order of their calls.
            self._calls.pop(group, None)
            self._calls[group] = call
            return call

    def _unused(self, group: WatchedGroup, call: ClipCall) -> None:
        """A call whose gradient no optimizer has used before the next: of an accumulated gradient, or of one that

        something else uses, which is not seen: an optimizer that is not torch's, or steps in compiled code.
        """
        if group.watch is not None and group.watch.finished:
            return
        group.waiting.append(call)
        if not group.owned or len(group.waiting) >= CLIPS_WITHOUT_STEP:
            group.owned = False
            self._write_unused(group)

    def _write_unused(self, group: WatchedGroup) -> None:
        waiting, group.waiting = group.waiting, []
        for call in waiting:
            self._finish([call], self._round_of(group), None)

    def after_clip(self, call: ClipCall, total_norm: Any) -> None:
        """Take down what the clip call returned."""
        if total_norm is not None and call.function != "clip_grads_with_norm_":
            call.total_norm = total_norm
            call.returned = take_down(total_norm)
        group = call.parts[-1][0]
        call.witness = Witness.of(group.refs[group.smallest]())
        self._witnessed[group.ids[group.smallest]] = call

    def _same_gradient(self, group: WatchedGroup) -> ClipCall | None:
        """The call that has clipped this very gradient already."""
        calls: Iterable[ClipCall | None] = self._calls.values()
        if len(self._calls) > len(group.ids):
            calls = map(self._witnessed.get, group.ids)
        for call in calls:
            if call is not None and call.witness and not call.consumers and call.witness.confirms(group):
                return call
        return None

    def _next_step(self, group: WatchedGroup) -> int:
        watch = group.watch
        return self.step + 1 if watch is not None and watch.round == self.step else self.step

    def _measure(self, group: WatchedGroup, parameters: list[Tensor], whole: bool, step: int) -> Any:
        plan = self._sampling.plan(step)
        if group.meter is None or not plan.due:
            return None
        return group.meter.take(group.gradients(parameters, whole), plan.spectra)

    def _look_at_threshold(
        self, limit: float | None, clip_value: Any, where: str, step: int, group: WatchedGroup
    ) -> None:
        # An infinite one is told when nothing else has clipped before the step: it is a way to log the norm.
        if limit is not None and not 0.0 < limit <= INFINITY:
            self._lint.threshold(limit, "max_norm", where, step, self._name(group))
        if clip_value is not None and not 0.0 < float(clip_value) < INFINITY:
            self._lint.threshold(float(clip_value), "clip_value", where, step, self._name(group))

    def _combined(self, call: ClipCall) -> ClipCall | None:
        """The call before this one that was given the same total norm."""
        group = call.parts[0][0]
        for other in reversed(self._calls.values()):
            if (
                other.function == call.function
                and not other.consumers
                and other.max_norm == call.max_norm
                and all(held is not group for held, _ in other.parts)
                and other.shares_norm(call)
            ):
                return other
        return None

    def _name(self, group: WatchedGroup) -> str | None:
        return group.names[0] if len(group.names) == 1 else group.call_site

    # --- optimizer steps ---------------------------------------------------------------------------------------------

    def broke(self, error: Exception) -> None:
        """Whatever goes wrong while watching ends the recording with one warning, and never the training."""
        self.stop()
        self.sink.failed(error)

    def before_step(self, optimizer: torch.optim.Optimizer, frame: FrameFinder) -> None:
        """``optimizer`` is about to use its gradients."""
        with self._lock:
            self._left_steps.pop(threading.get_ident(), None)
            watch = self._enter(optimizer, frame)
            if watch is not None:
                self._capture(watch, optimizer)

    def closure(
        self, optimizer: torch.optim.Optimizer, evaluate: Callable[[], Any], frame: FrameFinder
    ) -> Callable[[], Any]:
        """``evaluate``, watched: after its first evaluation the gradient is there."""
        with self._lock:
            self._enter(optimizer, frame)

        @functools.wraps(evaluate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            loss = evaluate(*args, **kwargs)
            try:
                self._evaluated(optimizer)
            except Exception as error:  # noqa: BLE001 - see broke
                self.broke(error)
            return loss

        return watched

    def _evaluated(self, optimizer: torch.optim.Optimizer) -> None:
        with self._lock:
            for watch in self._local.stepping:
                if watch is not None and watch.ref() is optimizer and not watch.captured:
                    self._capture(watch, optimizer)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer`` has stepped, or a fused one has decided not to."""
        with self._lock:
            left = self._left_steps.pop(threading.get_ident(), None)
            if left is not None:
                left[0].calls = left[1]
                self._conclude(left[0], True)
                return
            watch = self._local.stepping.pop() if self._local.stepping else None
            if watch is None or watch.ref() is not optimizer or not watch.captured:
                return
            found_inf = getattr(optimizer, "found_inf", None)
            self._conclude(watch, True if found_inf is None else found_inf)

    def finished(self, optimizer: torch.optim.Optimizer) -> int:
        """How many steps of ``optimizer`` have been seen."""
        self.leave_steady()
        with self._lock:
            return self._watch(optimizer).finished

    def after_scaled_step(self, optimizer: torch.optim.Optimizer, finished: int) -> None:
        """After ``GradScaler.step``, which leaves the optimizer alone where it found Inf or NaN: then none is added."""
        with self._lock:
            watch = self._watch(optimizer)
            if watch.finished == finished and self._active:
                self._capture(watch, optimizer)
                self._conclude(watch, False)

    def before_unscale(self, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        """A ``GradScaler`` is about to divide the gradients: what was clipped before was clipped scaled."""
        self.leave_steady()
        with self._lock:
            watch = self._optimizers.get(id(optimizer))
            members = watch.ids if watch is not None else frozenset(parameter_ids(optimizer))
            for call in dict.fromkeys(self._calls.values()):
                if not call.consumers and any(not members.isdisjoint(group.members) for group, _ in call.parts):
                    self._scaled(call, scaler.get_scale())

    def _scaled(self, call: ClipCall, scale: float) -> None:
        if scale == 1.0 or call.function is None:
            return
        call.grad_scale = scale
        group = call.parts[0][0]
        self._lint.scaled(call.where, scale, call.max_norm, self._next_step(group), self._name(group))

    def _watch(self, optimizer: torch.optim.Optimizer) -> OptimizerWatch:
        watch = self._optimizers.get(id(optimizer))
        if watch is None or watch.ref() is not optimizer:
            watch = self._optimizers[id(optimizer)] = OptimizerWatch.of(optimizer)
        watch.refresh(optimizer)
        return watch

    def _enter(self, optimizer: torch.optim.Optimizer, frame: FrameFinder) -> OptimizerWatch | None:
        """Begin a step; None where it is part of one of an optimizer around this one."""
        watch = self._watch(optimizer)
        inner = False
        if self._local.stepping:
            if watch in self._local.stepping:
                # Its last step ended in an exception.
                del self._local.stepping[self._local.stepping.index(watch) :]
            inner = any(outer is not None and not outer.ids.isdisjoint(watch.ids) for outer in self._local.stepping)
        self._local.stepping.append(None if inner else watch)
        watch.captured = False
        watch.frame = frame
        return None if inner else watch

    def _capture(self, watch: OptimizerWatch, optimizer: torch.optim.Optimizer) -> None:
        """Settle which clip calls this step uses, and measure what none of them covered."""
        watch.captured = True
        if watch.never:
            self._note_gradients(watch)
        step = self.step + 1 if watch.round == self.step else self.step
        calls = watch.calls = self._calls_of(watch)
        scale = getattr(optimizer, "grad_scale", None)
        clipped = False
        for call in calls:
            clipped = clipped or call.function is not None
            self._settle(call, watch, step)
            if scale is not None:
                self._scaled(call, float(scale))
        rest = watch.rest(tuple([group.members for call in calls for group, _ in call.parts]))
        if rest and any(parameter.grad is not None for parameter in rest):
            calls.append(self._unclipped(watch, rest, step, 1.0 if scale is None else float(scale), clipped))
        if self._sampling.plan(step).tenth:
            for call in calls:
                call.weigh()

    def _calls_of(self, watch: OptimizerWatch) -> list[ClipCall]:
        """The clip calls whose gradient ``watch`` uses, once each, in their order."""
        if len(self._calls) == 1:
            return [call for call in self._calls.values() if call.covers(watch)]
        return [call for call in dict.fromkeys(self._calls.values()) if call.covers(watch)]

    def _note_gradients(self, watch: OptimizerWatch) -> None:
        watch.note_gradients()
        if not watch.finished:
            waiting = [i for i in watch.never if watch.parameters[i].requires_grad]
            names = self.sink.names_of([watch.parameters[i] for i in waiting])
            watch.wait_for(dict(zip(waiting, names, strict=True)))

    def _settle(self, call: ClipCall, watch: OptimizerWatch, step: int) -> None:
        for group, _ in call.parts:
            group.watch = watch
            group.owned = True
            group.waiting.clear()
        if watch.normalises and call.max_norm is not None:
            self._lint.normalised(watch.name, call.where, step, self._name(call.parts[0][0]))

    def _unclipped(
        self, watch: OptimizerWatch, rest: list[Tensor], step: int, scale: float, beside_clipped: bool
    ) -> ClipCall:
        group, whole = self._book.unclipped(rest, (watch, beside_clipped), watch.frame)
        group.watch = watch
        call = ClipCall(None, group.call_site, [(group, self._measure(group, rest, whole, step))])
        call.time = time.time()
        call.grad_scale = scale
        call.witness = Witness.of(rest[group.smallest] if whole else None)
        self._calls[group] = call
        if beside_clipped:
            missing = [p for p in rest if p.grad is not None]
            self._lint.coverage(watch.name, self.sink.names_of(missing), len(watch.parameters), step)
        return call

    def _conclude(self, watch: OptimizerWatch, stepped: Any) -> None:
        """The step of ``watch`` is over: its rows go out."""
        if watch.round == self.step or (not watch.finished and self._another_training()):
            self.step += 1
            self._stepped.clear()
        self._stepped.append(watch)
        watch.round = self.step
        watch.finished += 1
        watch.captured = False
        calls, watch.calls = watch.calls, []
        watch.used = [call.witness for call in calls if call.witness is not None]
        self._finish([call for call in calls if not call.consumers], self.step, stepped, watch.ids)
        for call in calls:
            call.consumers.append(watch)
            # A row may wait a while; the gradient should not.
            call.witness = None
            for group, _ in call.parts:
                # A call over several optimizers waits for the others.
                if group.members <= watch.ids or call.function is None:
                    self._calls.pop(group, None)
                    self._witnessed.pop(group.ids[group.smallest], None)
            if call.max_norm == INFINITY:
                group = call.parts[0][0]
                self._lint.threshold(INFINITY, "max_norm", call.where, self.step, self._name(group))
        self._expect_more(watch, calls, stepped)

    def _another_training(self) -> bool:
        """Whether an optimizer that steps for the first time begins a training, and no part of one under way.

        It does if the optimizers of this step are no more, or have done without it for a while.
        """
        return bool(self._stepped) and all(
            watch.ref() is None or watch.finished >= STEPS_ALONE for watch in self._stepped
        )

    def _round_of(self, group: WatchedGroup) -> int:
        """The step of a gradient that no torch optimizer uses: one per clip call."""
        watch = group.watch
        if watch is None:
            watch = group.watch = OptimizerWatch(lambda: None, "", None)  # type: ignore[arg-type]
        if watch.round == self.step:
            self.step += 1
        watch.round = self.step
        return self.step

    def _finish(self, calls: list[ClipCall], step: int, stepped: Any, updated: frozenset[int] | None = None) -> None:
        if not self._sampling.plan(step).due:
            return
        for call in calls:
            self.sink.emit(step, call, stepped, call.update_norms(updated) if call.weight_norms else [])

    def finish(self) -> None:
        """The recording ends: rows of gradients that no torch optimizer uses go out."""
        self.leave_steady()
        with self._lock:
            waiting = [call for call in dict.fromkeys(self._calls.values()) if not call.consumers]
            for call in waiting:
                group = call.parts[0][0]
                # One clip that waits for its step is cut off; several are a training whose steps are not seen.
                if not group.owned or group.waiting:
                    group.waiting.append(call)
                    self._write_unused(group)
            self._calls.clear()
            self.stop()

    def optimizers(self) -> list[OptimizerWatch]:
        """Every optimizer that has stepped."""
        self.leave_steady()
        return [watch for watch in self._optimizers.values() if watch.finished]


def _inside_step(frame: FrameType | None) -> bool:
    """Whether an optimizer is in a step: one that has failed does not say when it ended."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.optim.optimizer":
            return True
        frame = frame.f_back
    return False


class _Depth(threading.local):
    """How deep this thread is inside clip calls, and the optimizers in whose steps it is (None: part of an outer's)."""

    def __init__(self) -> None:
        self.depth = 0
        self.stepping: list[OptimizerWatch | None] = []

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.depth -= 1
