"""Gradients that somebody dumped: one step per file, or per mapping in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource, GradientStep, Progress, SourceInfo, Weights
from gradscope.sources.formats.contents import Contents, read_contents
from gradscope.sources.formats.numpy_arrays import BITS
from gradscope.sources.formats.safetensors_files import merge_shards
from gradscope.sources.gradient_names import NamedTensors, gradients_of
from gradscope.sources.read_ahead import ReadAhead
from gradscope.sources.step_files import StepFile
from gradscope.sources.stored import MemoryTensor, StoredTensor, read, scan
from gradscope.tensors import ClipGroup, TensorInfo

GROUP = "all"
# Less than this is read before a thread has started.
WORTH_A_THREAD = 64 << 20


@dataclass(frozen=True, slots=True)
class DumpedStep:
    """One step before it is read: ``what`` names it in errors, ``load`` opens it."""

    label: str
    what: str
    load: Callable[[], Contents]

    def gradients(self) -> NamedTensors:
        """Its tensors, still where they are stored."""
        return gradients_of(self.load().tree, self.what)


def dumped_step(step: StepFile) -> DumpedStep:
    """A step whose files are opened when it is its turn."""
    return DumpedStep(step.label, str(step.paths[0]), lambda: load_files(step.paths))


def load_files(paths: Sequence[Path]) -> Contents:
    """One file, or the shards of one step together.

    Raises:
        GradscopeError: a file is unreadable, or two shards hold a tensor of one name.
    """
    if len(paths) == 1:
        return read_contents(paths[0])
    shards = [(path, read_contents(path)) for path in paths]
    for path, contents in shards:
        if not isinstance(contents.tree, dict):
            raise GradscopeError(str(path), "is no mapping of tensors, as a shard should be")
    return Contents(merge_shards((path, contents.tree) for path, contents in shards), f"sharded {shards[0][1].format}")


@dataclass(eq=False)
class GradientDumps(GradientSource):
    """A sequence of gradient dumps, of which the first tells the tensors and every other must agree with it.

    Only the first is opened to begin with; each of the others when it is read, one at a time.
    """

    dumps: tuple[DumpedStep, ...] = ()
    first: NamedTensors | None = field(default=None, repr=False)
    weight_source: GradientSource | None = field(default=None, repr=False)
    ahead: ReadAhead[GradientStep] | None = field(default=None, repr=False, init=False)

    @classmethod
    def of(
        cls,
        dumps: Sequence[DumpedStep],
        path: str,
        contents: Contents,
        weights: GradientSource | None = None,
        notes: tuple[str, ...] = (),
    ) -> GradientDumps:
        """The dumps in order; ``contents`` is what the first of them holds, ``weights`` supplies the parameters.

        Raises:
            GradscopeError: the first holds no floating-point tensor.
        """
        first = gradients_of(contents.tree, dumps[0].what)
        names = tuple(first.gradients)
        return cls(
            info=SourceInfo(path, "gradients", f"gradient dumps ({contents.format})", len(dumps)),
            tensors=tuple(tensor.info for tensor in first.gradients.values()),
            groups=(ClipGroup(GROUP, names),),
            skipped=first.skipped,
            notes=notes,
            dumps=tuple(dumps),
            first=first,
            weight_source=weights,
        )

    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        """The steps at these positions; each file is opened when it is its turn.

        Raises:
            GradscopeError: a file is unreadable, or disagrees with the first in names or shapes.
        """
        total = self._step_bytes
        for done, position in enumerate(steps):
            if position == 0 and self.ahead is not None:
                ahead, self.ahead = self.ahead, None
                yield ahead.result()
                continue
            yield self._read_step(position, _part_of(progress, done * total, len(steps) * total))

    @contextmanager
    def reading_ahead(self, progress: Progress | None = None) -> Iterator[None]:
        """Within this context the first step is read in the background, if it is worth a thread."""
        if self._step_bytes < WORTH_A_THREAD:
            yield
            return
        # Of many steps the first is too small a part to be told of.
        told = progress if len(self.dumps) == 1 else None
        ahead = self.ahead = ReadAhead(lambda tell: self._read_step(0, tell), told)
        try:
            yield
        finally:
            ahead.stop()
            self.ahead = None

    def _read_step(self, position: int, progress: Progress | None) -> GradientStep:
        tensors = self._load(position)
        spectra = scan(tensors, progress)
        return GradientStep.from_spectra(position, self.dumps[position].label, spectra, _reader(tensors))

    @property
    def _step_bytes(self) -> int:
        return sum(info.numel * BITS[info.dtype].itemsize for info in self.tensors)

    def weights(self, progress: Progress | None = None) -> Weights | None:
        """The parameters: those given beside the dumps, or those found in the first of them if it has all."""
        if self.weight_source is not None:
            return self.weight_source.weights(progress)
        own = self.first.weights if self.first is not None else {}
        if set(own) != {info.name for info in self.tensors}:
            return None
        ordered = [own[info.name] for info in self.tensors]
        return Weights(tuple(tensor.info for tensor in ordered), tuple(scan(ordered, progress)), lambda n: read(own[n]))

    def _load(self, position: int) -> list[StoredTensor]:
        """The tensors of one step in the source's order, after checking that they are the same as in the first."""
        dump = self.dumps[position]
        found = self.first if position == 0 and self.first is not None else dump.gradients()
        return [self._matching(info, found, dump.what) for info in self._agreed(found, dump.what)]

    def _agreed(self, found: NamedTensors, what: str) -> tuple[TensorInfo, ...]:
        names = {info.name for info in self.tensors}
        extra = next((name for name in found.gradients if name not in names), None)
        if extra is not None:
            raise GradscopeError(what, f"has a gradient {extra!r}, which {self.dumps[0].label} lacks")
        return self.tensors

    def _matching(self, info: TensorInfo, found: NamedTensors, what: str) -> StoredTensor:
        tensor = found.gradients.get(info.name)
        if tensor is None and info.name in found.absent:
            # A parameter that this step's loss did not reach: clipping sees it as zero.
            return MemoryTensor(info, np.zeros(info.shape, BITS[info.dtype]))
        if tensor is None:
            raise GradscopeError(what, f"lacks the gradient {info.name!r}, which {self.dumps[0].label} has")
        if tensor.info.shape != info.shape:
            raise GradscopeError(
                what,
                f"{info.name!r} has shape {_shape(tensor.info.shape)}, "
                f"in {self.dumps[0].label} it has {_shape(info.shape)}",
            )
        return tensor


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _part_of(progress: Progress | None, done: int, total: int) -> Progress | None:
    """Progress through one step, told as progress through all of them."""
    if progress is None:
        return None
    return lambda done_bytes, _total_bytes: progress(min(done + done_bytes, total), total)


def _reader(tensors: Sequence[StoredTensor]) -> Callable[[int], NDArray[np.floating]]:
    return lambda index: read(tensors[index])
