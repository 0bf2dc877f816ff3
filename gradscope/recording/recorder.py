"""``Recorder``: records the gradients of everything that trains in this process while it is active."""

from __future__ import annotations

import atexit
import os
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradscope.errors import GradscopeError
from gradscope.recording.clip_calls import ClipCall
from gradscope.recording.clip_groups import GroupBook
from gradscope.recording.frameworks import versions
from gradscope.recording.interception import Interception
from gradscope.recording.lint import ClipLint
from gradscope.recording.nothing_recorded import why_no_step
from gradscope.recording.optimizers import OptimizerWatch
from gradscope.recording.ranks import common_run, rank_and_world
from gradscope.recording.recorder_options import name_globs, one_of, whole_number
from gradscope.recording.row_findings import look_at_norm, nonfinite_tensors
from gradscope.recording.rows import RowQueue
from gradscope.recording.sampling import Sampling
from gradscope.recording.settings import MADE, STOPPED
from gradscope.recording.trace_files import open_trace, remove_if_empty, run_of, steps_on_disk
from gradscope.recording.trace_groups import TraceGroups
from gradscope.recording.trace_names import recorder_trace
from gradscope.recording.watcher import Watcher
from gradscope.trace.measurement import Row
from gradscope.trace.schema import Detail, LintFinding, TraceMetadata

if TYPE_CHECKING:
    from gradscope.recording.settings import RecordSettings
    from gradscope.trace.pending_rows import PackedRows
    from gradscope.trace.writer import TraceWriter


COMPILED_NOTE = (
    "torch.compile compiled parts of this run: a clip call inside them is not seen, and what it clipped is recorded as "
    "clipped."
)


class Recorder:
    """Records every optimizer step made while it is active, in all threads of this process::

        with gradscope.Recorder("run.gradscope"):
            train()

    Clip calls (``clip_grad_norm_``, ``clip_grad_value_``, ``clip_grads_with_norm_``, FSDP's own) and optimizer steps of
    torch are seen, whatever name they were imported by; a clip or step inside ``torch.compile``'d code is not.  The
    trace is made when the first step is recorded.  Each of several ranks writes its own stream into the same directory;
    a second run in the same place takes ``NAME-2.gradscope``.

    Whatever goes wrong with recording ends the recording with one line on stderr, never the training.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        every: int = 1,
        start: int = 0,
        max_steps: int | None = None,
        include: Sequence[str] | None = None,
        detail: Detail = "default",
        stop_on: str | None = None,
        force: bool = False,
        command: Sequence[str] | None = None,
        quiet: bool = False,
        launched: RecordSettings | None = None,
    ) -> None:
        """Record to the directory ``path`` (``.gradscope`` is added where it is missing), once.

        Every ``every``-th step from ``start`` on is recorded, at most ``max_steps`` of them; ``include`` are globs of
        tensor names.  ``detail`` is ``"default"`` (norms and group spectra at every step, tensor spectra at every
        10th), ``"full"`` (all at every step) or ``"norms"``.  ``stop_on="nonfinite"`` raises FloatingPointError out of
        the first optimizer step that used NaN or Inf.  ``force`` replaces a trace of that name once a step is recorded.
        ``launched`` is what ``gradscope record`` passes on.

        Raises GradscopeError for unusable options, where ``path`` exists and ``force`` is not given, and where nothing
        can be made there.
        """
        one_of("detail", detail, ("default", "full", "norms"))
        one_of("stop_on", stop_on, (None, "nonfinite"))
        self._sampling = Sampling(whole_number("every", every, 1), whole_number("start", start, 0), detail)
        self._max_steps = None if max_steps is None else whole_number("max_steps", max_steps, 1)
        self._include = name_globs(include)
        self.path = recorder_trace(path, force) if launched is None else Path(launched.path)
        self._force = force
        self._stop_on = stop_on
        self._quiet = quiet or launched is not None
        self._launched = launched
        self._command = list(command) if command is not None else sys.orig_argv
        self._interception: Interception | None = None
        self._started = False
        self._pid = self._first_pid = os.getpid()
        self._begin()

    def _begin(self) -> None:
        self._metadata = TraceMetadata(
            run=self._launched.launch if self._launched else uuid.uuid4().hex,
            command=list(self._command),
            started=time.time(),
            every=self._sampling.every,
            start=self._sampling.start,
            detail=self._sampling.detail,
        )
        self._writer: TraceWriter | None = None
        self._ended_early: str | None = None
        self._groups = TraceGroups(self._metadata, self._include, self._changed)
        self._graphs_before = _graphs_compiled()
        # To stop at a step, its row has to be looked at.
        self._rows = RowQueue(self._write, self._write_plain if self._stop_on is None else None)
        self._lint = ClipLint(self._metadata.findings, self._changed)
        book = GroupBook(self._groups.describe, self._groups.extend)
        self._watcher = Watcher(self, book, self._lint, self._sampling, self._rows.batch)

    @property
    def findings(self) -> tuple[LintFinding, ...]:
        """What is wrong with the clipping, as far as it has been seen."""
        return tuple(self._metadata.findings)

    @property
    def steps(self) -> int:
        """Steps recorded so far."""
        return self._rows.steps

    @property
    def optimizers_stepped(self) -> bool:
        """Whether any optimizer has stepped, recorded or not."""
        return bool(self._watcher.optimizers())

    @property
    def why_nothing_was_recorded(self) -> str | None:
        """One line; None where a step was recorded."""
        if self.steps:
            return None
        started = self._watcher.step >= self._sampling.start
        named = bool(self._metadata.tensors)
        return self._ended_early or why_no_step(self.optimizers_stepped, started, self._include, named)

    def start(self) -> None:
        """Attach to torch.

        Raises GradscopeError the second time: one recorder makes one recording.
        """
        if self._started:
            raise GradscopeError(f"Recorder({self.path.name!r})", "records once", "make another Recorder")
        self._started = True
        self._attach()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def _attach(self) -> None:
        self._interception = Interception(self._watcher)
        self._interception.install()

    def _forked(self) -> None:
        """A forked child that trains makes a trace of its own; the parent's rows are the parent's."""
        if self._interception is None or self._pid == os.getpid():
            return
        self._interception.remove()
        self._pid = os.getpid()
        self._begin()
        self._attach()

    def stop(self) -> None:
        """Detach, write what is pending and say what was found; more than once does no harm."""
        if self._interception is None or self._pid != os.getpid():
            return
        self._interception.remove()
        self._interception = None
        self._watcher.finish()
        self._rows.finish()
        if _graphs_compiled() > self._graphs_before and any(group.function is None for group in self._metadata.groups):
            self._metadata.notes.append(COMPILED_NOTE)
        for watch in self._watcher.optimizers():
            self._note_unused(watch)
        self._close()
        if not self._quiet:
            why = self.why_nothing_was_recorded
            # A forked child seldom trains, and what failed has been told.
            if why is not None and self._ended_early is None and self._pid == self._first_pid:
                _tell(f"nothing was recorded: {why}")
            for finding in self._metadata.findings:
                _tell(finding.message)

    def __enter__(self) -> Recorder:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # --- rows --------------------------------------------------------------------------------------------------------

    def emit(self, step: int, call: ClipCall, stepped: Any, update_norms: list[Any]) -> None:
        """Take one row from the watcher (see ``watcher.Sink``)."""
        if not call.measured:
            return
        if self.steps_left == 0 and step != self._rows.last_step:
            self._watcher.stop()
            return
        self._rows.put(step, self._groups.number_of(call), call, stepped, update_norms)
        # Otherwise the writer's thread drains them, many at a time.
        if self._writer is None or self._stop_on is not None:
            self._rows.drain()

    @property
    def steps_left(self) -> int:
        """How many more steps are to be recorded, -1: all (see ``watcher.Sink``)."""
        return -1 if self._max_steps is None else self._max_steps - self.steps

    def _drain(self) -> None:
        """In the writer's thread, where an error would be seen by nobody."""
        try:
            self._rows.drain()
        except Exception as error:  # noqa: BLE001
            self._watcher.stop()
            self.failed(error)

    def failed(self, error: BaseException) -> None:
        """Recording cannot go on (see ``watcher.Sink``)."""
        if os.environ.get("GRADSCOPE_DEBUG"):
            raise error
        self._say(f"recording stopped: {type(error).__name__}: {error}")
        # The rows until then are whole, unless it is they that cannot be written.
        with suppress(Exception):
            self._rows.finish()
        self._close()

    def _write(self, row: Row, call: ClipCall) -> None:
        if self._writer is None:
            self._writer = self._open()
        self._look_at(row, call)
        self._writer.append(row)
        self._end_if_failed(self._writer)

    def _write_plain(self, rows: PackedRows) -> None:
        if self._writer is None:
            self._writer = self._open()
        self._writer.extend(rows)
        self._end_if_failed(self._writer)

    def _end_if_failed(self, writer: TraceWriter) -> None:
        if writer.error is not None:
            self._watcher.stop()
            self._close()

    def _open(self) -> TraceWriter:
        metadata = self._metadata
        metadata.rank, metadata.world_size = rank_and_world()
        metadata.pid = os.getpid()
        metadata.versions = versions()
        if self._launched is not None:
            metadata.extra["launch"] = self._launched.launch
        elif metadata.world_size > 1:
            metadata.run = common_run()
        self.path, writer = open_trace(self.path, metadata, self._force)
        writer.meanwhile = self._rows.measure_for
        writer.before_flush = self._drain
        if self._launched is not None:
            self._launched.leave_note(MADE, str(self.path))
        # Registered after the writer's own, and so before it: the end is still to be written down.
        atexit.register(self.stop)
        return writer

    def _close(self) -> None:
        writer = self._writer
        if writer is None or self._metadata.ended is not None:
            return
        self._metadata.ended = time.time()
        # Not all of them were written if a write has failed.
        self._metadata.steps = self.steps if writer.error is None else None
        writer.close()
        if writer.error is not None and self._ended_early is None:
            self._say(f"recording stopped{self._what_is_left(writer.error)}")
        # A launcher is still to read what was found.
        if self._ended_early is not None and self._launched is None and self._metadata.world_size == 1:
            remove_if_empty(self.path, self._metadata.run)

    def _what_is_left(self, error: str) -> str:
        if not self.path.exists() or run_of(self.path) not in (None, self._metadata.run):
            return f": {self.path} has disappeared"
        return f" after {steps_on_disk(self.path)} of {self.steps} steps: {error}"

    def _say(self, what: str) -> None:
        self._ended_early = what
        if self._launched is not None:
            self._launched.leave_note(STOPPED, what)
        _tell(what)

    def _changed(self) -> None:
        if self._writer is not None:
            self._writer.metadata_changed()

    def _look_at(self, row: Row, call: ClipCall) -> None:
        if row.stepped is False:
            return
        group = self._metadata.groups[row.group]
        if self._include is None:
            look_at_norm(row, call, group, self._lint)
        if self._stop_on == "nonfinite":
            faults = nonfinite_tensors(row)
            if faults:
                names = [self._metadata.tensors[group.tensors[i]].name for i in faults]
                self._watcher.fault = f"step {row.step}: the gradient of {', '.join(names[:3])} holds NaN or Inf"

    def names_of(self, parameters: list[Tensor]) -> list[str]:
        """The names of parameters that were met before (see ``watcher.Sink``)."""
        return self._groups.names_of(parameters)

    def _note_unused(self, watch: OptimizerWatch) -> None:
        unused = watch.never_used()
        if unused:
            self._lint.unused(watch.name, unused, self._rows.last_step)


def _graphs_compiled() -> int:
    """How many graphs torch.compile has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"].get("unique_graphs", 0))


def _tell(what: str) -> None:
    """A line on stderr, where anybody still listens."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(f"gradscope: {what}", file=sys.stderr, flush=True)
