"""The ranks of a run put together: whose part of which tensor counts, and which steps all of them hold."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import GradscopeError
from gradscope.trace.reader import RankTrace
from gradscope.trace.rows import FloatArray, IntArray
from gradscope.trace.schema import (
    METADATA_FILE,
    LintFinding,
    RecordedGroup,
    RecordedTensor,
    TraceMetadata,
    metadata_name,
    stream_name,
)

# All ranks compute the same numbers; only the order of a sum may differ.
SAME = 1e-6
# A step whose clip groups were seen together in none of this many steps before it is taken for incomplete.
FAMILIAR_STEPS = 64


@dataclass(frozen=True, slots=True, eq=False)
class CountingRank:
    """A rank of which something counts.

    ``tensor`` (int64) maps the tensors of its groups, one group after the other from ``starts`` on, to the run's
    tensors, -1 for a copy that does not count; ``group`` (int64) maps its groups, -1 where nothing of one counts.
    """

    trace: RankTrace
    tensor: IntArray
    starts: IntArray
    group: IntArray

    def counts_whole(self, group: int) -> bool:
        """Whether everything this rank holds of its group counts, so that the group's own bins do."""
        return bool((self.tensor[self.starts[group] : self.starts[group + 1]] >= 0).all())


@dataclass(frozen=True, slots=True, eq=False)
class RecordedRun:
    """A run as its ranks recorded it.

    ``metadata`` is that of the first rank.  ``tensors`` and ``groups`` (of indices into them) are those of all ranks,
    as far as something was recorded of them, and ``steps`` (int64, ascending) what all counting ranks hold.
    ``findings`` are those of all ranks, and what they differ in; ``notes`` are sentences for the reader.
    """

    path: Path
    metadata: TraceMetadata
    tensors: tuple[RecordedTensor, ...]
    groups: tuple[RecordedGroup, ...]
    steps: IntArray
    ranks: tuple[CountingRank, ...]
    findings: tuple[LintFinding, ...]
    notes: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> RecordedRun:
        """Open the trace in the directory ``path``.

        Raises GradscopeError where it is none, or is unreadable or damaged.
        """
        traces, notes = _traces_of_one_run(path)
        tensors, counted, said = _counted_tensors(traces)
        groups = _groups(traces, tensors, counted)
        ranks = tuple(rank for rank in map(_counting, traces, counted, [groups] * len(traces)) if rank is not None)
        steps, cut = _common_steps(ranks)
        return cls(
            path,
            traces[0].metadata,
            tuple(tensors),
            groups,
            steps,
            ranks,
            _findings(traces),
            (*dict.fromkeys(note for trace in traces for note in trace.metadata.notes), *notes, *said, *cut),
        )

    def max_norm(self, group: int) -> float | None:
        """The last υ in force for a group; None where nothing clipped it by norm, or only at infinity."""
        for rank in self.ranks:
            known = rank.trace.max_norm[rank.group[rank.trace.group] == group]
            known = known[np.isfinite(known)]
            if len(known):
                return float(known[-1])
        return None


# --- which ranks there are -------------------------------------------------------------------------------------------


def _traces_of_one_run(path: Path) -> tuple[list[RankTrace], list[str]]:
    names = sorted(os.listdir(path))
    numbers = sorted(int(found[1]) for name in names if (found := re.fullmatch(r"rank-(\d{5,9})\.arrows", name)))
    if not numbers:
        what = "no step was recorded" if METADATA_FILE in names else f"it has no {METADATA_FILE} and no stream"
        raise GradscopeError(str(path), f"is no complete gradscope trace: {what}")
    traces: list[RankTrace] = []
    strays: list[RankTrace] = []
    for number in numbers:
        # A rank that was killed before it could say anything.
        if metadata_name(number) not in names and len(numbers) > 1 and not (path / stream_name(number)).stat().st_size:
            continue
        trace = RankTrace.open(path, number)
        if trace.metadata.rank != number:
            raise GradscopeError(str(path / metadata_name(number)), f"is that of rank {trace.metadata.rank}")
        first = traces[0].metadata if traces else trace.metadata
        same = (trace.metadata.run, trace.metadata.world_size) == (first.run, first.world_size)
        (traces if same else strays).append(trace)
    if not traces:
        raise GradscopeError(str(path), "is no complete gradscope trace: no step was recorded")
    notes = [f"Rank {stray.metadata.rank} is of another run and left out." for stray in strays]
    notes += [text for trace in traces if (text := _dropped(trace))]
    return traces, notes + _missing(traces)


def _dropped(trace: RankTrace) -> str | None:
    if not trace.stream.dropped:
        return None
    name = trace.stream.path.name
    return f"{name} ends in {trace.stream.dropped:,} bytes of an unfinished batch, which are left out."


def _missing(traces: Sequence[RankTrace]) -> list[str]:
    world = traces[0].metadata.world_size
    present = {trace.metadata.rank for trace in traces}
    if len(present) == world:
        return []
    sharded = any(tensor.placements for trace in traces for tensor in trace.metadata.tensors)
    lacking = "the norms lack their shards" if sharded else "those that are here hold the same gradients"
    return [f"{world - len(present)} of {world} ranks are missing: {lacking}."]


# --- what of each rank counts ----------------------------------------------------------------------------------------


def _counted_tensors(traces: Sequence[RankTrace]) -> tuple[list[RecordedTensor], list[dict[int, int]], list[str]]:
    """The run's tensors, and for each rank its tensors that count: its index to the run's."""
    tensors: list[RecordedTensor] = []
    index: dict[str, int] = {}
    taken: set[tuple[str, tuple[int, ...]]] = set()
    counted: list[dict[int, int]] = [{} for _ in traces]
    partial: dict[str, None] = {}
    for trace, own in zip(traces, counted, strict=True):
        recorded = _tensors_with_rows(trace)
        for i in sorted(recorded):
            tensor = trace.metadata.tensors[i]
            if "P" in tensor.placements:
                partial[tensor.name] = None
                continue
            if tensor.name not in index:
                index[tensor.name] = len(tensors)
                tensors.append(tensor)
            first = tensors[index[tensor.name]]
            if first.shape != tensor.shape:
                raise GradscopeError(
                    str(trace.stream.path.parent),
                    f"{tensor.name!r} has shape {tensor.shape} at rank {trace.metadata.rank}, elsewhere {first.shape}",
                )
            part = (tensor.name, tensor.mesh_coordinate)
            if part not in taken and _stands_first_among_copies(tensor):
                taken.add(part)
                own[i] = index[tensor.name]
    return tensors, counted, _partial_note(list(partial))


def _tensors_with_rows(trace: RankTrace) -> set[int]:
    """What is recorded: metadata may name groups of which no row is written yet."""
    groups = trace.metadata.groups
    return {tensor for group in np.unique(trace.group) for tensor in groups[group].tensors}


def _stands_first_among_copies(tensor: RecordedTensor) -> bool:
    return all(
        coordinate == 0
        for placement, coordinate in zip(tensor.placements, tensor.mesh_coordinate, strict=True)
        if placement == "R"
    )


def _partial_note(names: list[str]) -> list[str]:
    if not names:
        return []
    which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return [
        f"Left out: {which}, of whose gradient each rank holds a summand; the norm of a sum is not known from the "
        "norms of its summands."
    ]


def _groups(
    traces: Sequence[RankTrace], tensors: Sequence[RecordedTensor], counted: Sequence[dict[int, int]]
) -> tuple[RecordedGroup, ...]:
    index = {tensor.name: i for i, tensor in enumerate(tensors)}
    groups: dict[str, RecordedGroup] = {}
    for trace, own in zip(traces, counted, strict=True):
        for number in np.unique(trace.group) if own else ():
            group = trace.metadata.groups[number]
            found = groups.setdefault(group.name, replace(group, tensors=[]))
            names = [trace.metadata.tensors[i].name for i in group.tensors]
            held = set(found.tensors)
            found.tensors.extend(index[name] for name in names if name in index and index[name] not in held)
    return tuple(group for group in groups.values() if group.tensors)


def _counting(trace: RankTrace, own: dict[int, int], groups: Sequence[RecordedGroup]) -> CountingRank | None:
    if not own:
        return None
    index = {group.name: i for i, group in enumerate(groups)}
    mine = trace.metadata.groups
    tensor = np.array([own.get(i, -1) for group in mine for i in group.tensors], dtype=np.int64)
    starts = np.cumsum([0, *(len(group.tensors) for group in mine)], dtype=np.int64)
    counts = [any(i in own for i in group.tensors) for group in mine]
    numbers = [index.get(group.name, -1) if here else -1 for group, here in zip(mine, counts, strict=True)]
    return CountingRank(trace, tensor, starts, np.array(numbers, dtype=np.int64))


# --- which steps there are -------------------------------------------------------------------------------------------


def _common_steps(ranks: Sequence[CountingRank]) -> tuple[IntArray, list[str]]:
    held = [_complete_steps(rank.trace) for rank in ranks]
    if not held:
        return np.empty(0, dtype=np.int64), []
    common = held[0]
    for steps in held[1:]:
        common = np.intersect1d(common, steps, assume_unique=True)
    most = max(map(len, held))
    if len(common) == most:
        return common, []
    return common, [f"{most - len(common):,} steps that not all ranks hold are left out."]


def _complete_steps(trace: RankTrace) -> IntArray:
    steps, starts = np.unique(trace.step, return_index=True)
    if trace.stream.ended or len(steps) < 2:
        return steps
    last = frozenset(trace.group[starts[-1] :])
    before = range(max(0, len(steps) - 1 - FAMILIAR_STEPS), len(steps) - 1)
    familiar = {frozenset(trace.group[starts[i] : starts[i + 1]]) for i in before}
    return steps if last in familiar else steps[:-1]


# --- whether the ranks agree -----------------------------------------------------------------------------------------


def _findings(traces: Sequence[RankTrace]) -> tuple[LintFinding, ...]:
    """What was found while recording, once for all ranks, and what they differ in."""
    found = [finding for trace in traces for finding in trace.metadata.findings]
    distinct = {(finding.rule, finding.group): finding for finding in reversed([*found, *_differences(traces)])}
    return tuple(reversed(distinct.values()))


def _differences(traces: Sequence[RankTrace]) -> list[LintFinding]:
    """At most one finding per group and kind: replicas with other gradients, ranks that were given other norms."""
    first, found = traces[0], []
    for number, group in enumerate(first.metadata.groups):
        for other in traces[1:]:
            names = [g.name for g in other.metadata.groups]
            if group.name not in names:
                continue
            pairs = _same_steps(first, number, other, names.index(group.name))
            finding = _differing(first, other, group, pairs)
            if finding is not None:
                found.append(finding)
                break
    return found


def _same_steps(first: RankTrace, group: int, other: RankTrace, other_group: int) -> tuple[IntArray, IntArray]:
    """Rows of the two ranks for the same step and group."""
    rows, others = np.flatnonzero(first.group == group), np.flatnonzero(other.group == other_group)
    _, at, other_at = np.intersect1d(first.step[rows], other.step[others], return_indices=True)
    return rows[at], others[other_at]


def _differing(
    first: RankTrace, other: RankTrace, group: RecordedGroup, rows: tuple[IntArray, IntArray]
) -> LintFinding | None:
    norms = [np.sqrt(trace.sum_squares[own]) for trace, own in zip((first, other), rows, strict=True)]
    given = [trace.returned_norm[own] for trace, own in zip((first, other), rows, strict=True)]
    copies = not any(first.metadata.tensors[i].placements for i in group.tensors)
    if copies and (apart := _apart(*norms)).any():
        pair, what = norms, "the ranks hold different gradients of the same parameters: norm"
    elif not group.returned_partial and (apart := _apart(*given)).any():
        pair, what = given, "the ranks clip by different norms: clip call returned"
    else:
        return None
    at, ranks = int(np.flatnonzero(apart)[0]), (first.metadata.rank, other.metadata.rank)
    step = int(first.step[rows[0][at]])
    values = [f"{float(side[at]):.6g} at rank {rank}" for side, rank in zip(pair, ranks, strict=True)]
    message = (
        f"Group {group.name}: {what} {values[0]}, {values[1]} in step {step:,}, and likewise in "
        f"{int(apart.sum()):,} of {len(apart):,} steps; every rank then takes another step."
    )
    return LintFinding("ranks-differ", message, int(apart.sum()), step, group.name)


def _apart(one: FloatArray, other: FloatArray) -> NDArray[np.bool_]:
    return ~np.isclose(one, other, rtol=SAME, atol=0.0, equal_nan=True)
