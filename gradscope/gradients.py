"""The nouns: what a source of gradients holds, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gradscope.optimizer_state import AdamMoments, OptimizerState
from gradscope.spectrum import MagnitudeSpectrum
from gradscope.tensors import ClipGroup, TensorInfo
from gradscope.trace.schema import LintFinding

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SAVE_TENSORS = (
    "save the gradients yourself, one file per step, before clipping: safetensors.torch.save_file("
    '{n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"grads/{step}.safetensors")'
)
# The hint wherever gradients are wanted and missing.
SAVE_GRADIENTS = f"record the run: gradscope record -- python train.py; or {SAVE_TENSORS}"

SourceKind = Literal["gradients", "checkpoint", "trace", "norm-log"]


class Progress(Protocol):
    """Told how many bytes of how many were read; called from the reading thread."""

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Report that ``done_bytes`` of ``total_bytes`` are read."""


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What a source is: ``format`` is for people (``"SB3 PPO checkpoint"``), ``steps`` counts gradient steps.

    ``picked`` says which of several checkpoints this is, where only their directory was named.  ``arguments`` is what
    names the source on a command line beside its path (``"--batch rollout.safetensors --trust"``).
    """

    path: str
    kind: SourceKind
    format: str
    steps: int
    picked: str | None = None
    arguments: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GroupTotals:
    """What the gradient that each clip group met itself amounts to; all arrays are [groups].

    ``present`` (bool) says which groups there are at the step.  ``sum_squares`` and ``max_abs`` (float64) are over the
    finite elements, ``nonfinite`` counts the others.  Of tensors that several groups hold, each has its own here.
    """

    present: NDArray[np.bool_]
    sum_squares: FloatArray
    max_abs: FloatArray
    nonfinite: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class RecordedClip:
    """What a recording knows of a step beside its gradient.

    ``time`` is in seconds since the epoch.  ``max_norm``, ``clip_value`` (NaN where nothing clipped so) and
    ``returned_norm`` (NaN where nothing was returned) are float64 [groups], ``stepped`` int8 [groups]: 1 yes, 0 no,
    -1 not known.  ``weight_norm`` and ``update_norm`` are float64 [tensors], NaN where they were not measured.
    ``norm_type`` is the p of each group's clip call, float64 [groups]; None: 2 throughout.  ``totals`` are those of
    the gradients that the clip groups met; None: the step's own, every group being there.
    What a loss scale was still in is divided by it: the gradient, and with it its thresholds and returned norm.
    """

    time: float
    max_norm: FloatArray
    clip_value: FloatArray
    returned_norm: FloatArray
    stepped: NDArray[np.int8]
    weight_norm: FloatArray | None = None
    update_norm: FloatArray | None = None
    norm_type: FloatArray | None = None
    totals: GroupTotals | None = None

    @property
    def skipped(self) -> bool:
        """Whether an optimizer is known not to have stepped, and none is known to have."""
        return bool((self.stepped == 0).any() and not (self.stepped == 1).any())


@dataclass(frozen=True, slots=True, eq=False)
class GradientStep:
    """One optimizer step's gradient.  Arrays have one entry per tensor of the source, in its order.

    ``sum_squares`` (float64) and ``max_abs`` are over the finite elements; ``zeros``, ``nan`` and ``inf`` count
    elements.  ``spectra`` holds a spectrum for every tensor that has one at this step, and ``group_spectra`` one for
    every clip group of the source, in its order, where those were recorded instead.  ``read(i)`` returns tensor ``i``
    whole, as float64 or float32 of its own shape, where the source still has its elements.

    ``present`` (bool) says which tensors had a gradient at this step, None: all.  The others are zeros here, as
    clipping sees them, but tell nothing of those tensors.  ``samples``, where known, is of how many samples the
    gradient is the mean, none of which any other such step has: minibatches of one epoch.
    """

    index: int
    label: str
    sum_squares: FloatArray
    max_abs: FloatArray
    zeros: IntArray
    nan: IntArray
    inf: IntArray
    spectra: Sequence[MagnitudeSpectrum | None]
    read: Callable[[int], NDArray[np.floating]] | None = None
    group_spectra: Sequence[MagnitudeSpectrum | None] = ()
    recorded: RecordedClip | None = None
    present: NDArray[np.bool_] | None = None
    samples: int | None = None

    @classmethod
    def from_spectra(
        cls,
        index: int,
        label: str,
        spectra: Sequence[MagnitudeSpectrum],
        read: Callable[[int], NDArray[np.floating]] | None = None,
    ) -> GradientStep:
        """A step whose per-tensor numbers are those of ``spectra``, one per tensor."""
        return cls(
            index=index,
            label=label,
            sum_squares=np.array([s.sum_squares for s in spectra], dtype=np.float64),
            max_abs=np.array([s.max_abs for s in spectra], dtype=np.float64),
            zeros=np.array([s.zeros for s in spectra], dtype=np.int64),
            nan=np.array([s.nan for s in spectra], dtype=np.int64),
            inf=np.array([s.inf for s in spectra], dtype=np.int64),
            spectra=tuple(spectra),
            read=read,
        )

    @property
    def finite(self) -> bool:
        """Whether no element is NaN or Inf."""
        return not (self.nan.any() or self.inf.any())


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The parameters of a checkpoint: one spectrum per tensor; ``read(name)`` gives one whole."""

    tensors: tuple[TensorInfo, ...]
    spectra: tuple[MagnitudeSpectrum, ...]
    read: Callable[[str], NDArray[np.floating]]


@dataclass(eq=False)
class GradientSource(ABC):
    """Anything that gradients, weights or optimizer state can be read from.

    ``tensors`` describes the gradient tensors and is empty where the source holds none.  ``groups`` are its clip
    groups.  ``skipped`` names what was left out and why (``"step: int64"``); ``findings`` are sentences about what is
    wrong with the run, most important first, and ``notes`` what else the reader should know.  ``lint`` is what a
    recording noticed about how the run clips, one entry per rule; its sentences are among the findings.  ``ranks`` is
    how many processes trained, where that is known.  ``trained_otherwise`` says why parameters that an optimizer holds
    may have no gradient and be trained all the same.
    """

    info: SourceInfo
    tensors: tuple[TensorInfo, ...] = ()
    groups: tuple[ClipGroup, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    findings: tuple[str, ...] = ()
    lint: tuple[LintFinding, ...] = ()
    trained_otherwise: str | None = None
    ranks: int | None = None
    # What progress counts.
    read_unit: ClassVar[str] = "bytes"
    # Whether the steps followed one another in a run; the minibatches of one batch did not.
    in_time: ClassVar[bool] = True

    @property
    def step_numbers(self) -> Sequence[int] | IntArray:
        """The number of the step at each position, rising."""
        return range(self.info.steps)

    @abstractmethod
    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        """The steps whose positions are in ``steps``, in order; one is in memory at a time."""

    def reading_ahead(self, progress: Progress | None = None) -> AbstractContextManager[None]:
        """Within this context the first step may already be read in the background; nothing else changes."""
        return nullcontext()

    def weights(self, progress: Progress | None = None) -> Weights | None:
        """The parameters, where the source holds them."""
        return None

    def optimizers(self, progress: Progress | None = None) -> tuple[OptimizerState, ...]:
        """The optimizer states, where the source holds them."""
        return ()

    def adam_moments(self) -> Mapping[str, AdamMoments] | None:
        """What optimizers of the Adam family hold for each parameter, by name; None where there is none."""
        return None
