"""What a trace holds, on one page.

``NAME.gradscope/`` is a directory::

    trace.json           TraceMetadata of rank 0
    rank-00000.arrows    its rows: an Arrow IPC stream, append-only, one record batch per flush
    rank-00001.json      TraceMetadata of rank 1, and so on: ranks hold other shards of the same tensors
    rank-00001.arrows

The metadata is replaced atomically, and always before the first row that refers to what is new in it; tensors and
groups are only ever added, at the end.  Both are readable while a run is being recorded.

A **step** is one round of optimizer steps: it ends when an optimizer that has stepped in it steps again.  A **row** is
one clip group at one step; steps of one stream do not decrease.  The columns are those of ``COLUMNS``; list columns
have one entry per tensor of the group at that time, in its order (a group may gain tensors later on):

``step``            the step, counted from 0 whether or not it was recorded
``group``           index into ``TraceMetadata.groups``
``time``            seconds since the epoch
``max_norm``        υ of the clip call; null where nothing clipped by norm
``clip_value``      v of ``clip_grad_value_``; null where nothing clipped by value
``norm_type``       p of the clip call; null without one
``returned_norm``   what the library's clip call returned; null where it returned nothing
``grad_scale``      the loss scale still multiplied into the gradient as stored here; 1 otherwise.  The true gradient
                    is the stored one divided by it (norms, and the edges of the bins)
``stepped``         whether the optimizer stepped; null where that is not known
``sum_squares``     Σg² over the finite elements, float64; NaN: the tensor had no gradient at this step
``max_abs``         max |g| over the finite elements
``zeros``, ``nan``, ``inf``   counts of elements
``group_bins``      the magnitude spectrum of the whole group, see below; empty with ``detail="norms"``
``tensor_bins``     the spectra of its tensors one after the other, ``tensor_bin_counts`` bins each; empty where none
                    was taken at this step
``weight_norm``, ``update_norm``   ‖θ‖ before the optimizer step and ‖θ' − θ‖, float64; empty where not measured, NaN
                    for a tensor that was left out

Where several rows of a step hold the same tensor (it is in two clip groups), the first tells its gradient: the others
may have been measured after that one was clipped.  Each row tells what its own clip call was given.

A **bin** is ``*_code`` (which magnitudes: see ``trace.bins``), ``*_count`` (elements, uint32; a bin with more stands
twice), ``*_mean`` and ``*_spread`` (float32): with edges a ≤ |g| ≤ b, width w = b − a and mean μ of |g| in the bin,
mean = (μ − a)/w and spread = (Σg²/count − μ²)/w², each rounded to the nearest float32 in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = "gradscope.trace/1"
METADATA_FILE = "trace.json"
TENSOR_SPECTRA_EVERY = 10

Detail = Literal["default", "full", "norms"]

# name -> Arrow type; "list<T>" is a list column.
COLUMNS: dict[str, str] = {
    "step": "int64",
    "group": "int32",
    "time": "float64",
    "max_norm": "float64",
    "clip_value": "float64",
    "norm_type": "float64",
    "returned_norm": "float64",
    "grad_scale": "float64",
    "stepped": "bool",
    "sum_squares": "list<float64>",
    "max_abs": "list<float64>",
    "zeros": "list<int64>",
    "nan": "list<int64>",
    "inf": "list<int64>",
    "group_code": "list<uint16>",
    "group_count": "list<uint32>",
    "group_mean": "list<float32>",
    "group_spread": "list<float32>",
    "tensor_bin_counts": "list<int32>",
    "tensor_code": "list<uint16>",
    "tensor_count": "list<uint32>",
    "tensor_mean": "list<float32>",
    "tensor_spread": "list<float32>",
    "weight_norm": "list<float64>",
    "update_norm": "list<float64>",
}
NULLABLE = frozenset({"max_norm", "clip_value", "norm_type", "returned_norm", "stepped"})


@dataclass(slots=True)
class RecordedTensor:
    """One parameter.  ``shape`` is the whole parameter's, ``local_shape`` this rank's part of it.

    ``placements`` holds one entry per mesh dimension, ``"R"`` (replica), ``"S(dim)"`` (shard) or ``"P"`` (partial);
    ``mesh_shape`` and ``mesh_coordinate`` say where in the mesh this rank stands.  Ranks whose coordinate is 0 in every
    replicated dimension count; the others hold copies.  All three empty: an ordinary tensor, of which every rank holds
    a copy.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: str
    local_shape: tuple[int, ...] = ()
    placements: tuple[str, ...] = ()
    mesh_shape: tuple[int, ...] = ()
    mesh_coordinate: tuple[int, ...] = ()


@dataclass(slots=True)
class RecordedGroup:
    """The tensors (indices) that one clip call took its norm over, or that an optimizer updates without clipping.

    ``function`` is what clipped (``"clip_grad_norm_"``; None: nothing did), ``call_site`` where it was called
    (``"ppo.py:312"``), ``optimizer`` the class that updates the tensors.  ``after_clipping`` names the framework that
    had clipped the gradients before they could be seen.  ``returned_partial``: the returned norm is this rank's part;
    the whole one is the root of the sum of squares over the ranks that count.
    """

    name: str
    tensors: list[int]
    function: str | None = None
    call_site: str | None = None
    optimizer: str | None = None
    after_clipping: str | None = None
    returned_partial: bool = False


@dataclass(slots=True)
class LintFinding:
    """Something wrong with how a run clips: ``rule`` names it, ``message`` is one sentence for the user.

    ``count`` steps showed it, the first at ``first_step``; ``group`` is the clip group's name where there is one.
    """

    rule: str
    message: str
    count: int = 1
    first_step: int = 0
    group: str | None = None
    tensors: tuple[str, ...] = ()


@dataclass(slots=True)
class TraceMetadata:
    """What ``trace.json`` holds.  ``started`` and ``ended`` are seconds since the epoch; None: running, or cut off.

    ``run`` is the same for all ranks of one run; ``steps`` and ``dropped`` are set at the end.
    """

    schema: str = SCHEMA
    run: str = ""
    rank: int = 0
    world_size: int = 1
    pid: int = 0
    command: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    started: float = 0.0
    ended: float | None = None
    steps: int | None = None
    every: int = 1
    start: int = 0
    detail: Detail = "default"
    framework: str | None = None
    tensors: list[RecordedTensor] = field(default_factory=list)
    groups: list[RecordedGroup] = field(default_factory=list)
    findings: list[LintFinding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def stream_name(rank: int) -> str:
    """The file of a rank's rows."""
    return f"rank-{rank:05d}.arrows"


def metadata_name(rank: int) -> str:
    """The file of a rank's metadata."""
    return METADATA_FILE if rank == 0 else f"rank-{rank:05d}.json"
