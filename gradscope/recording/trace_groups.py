"""What the metadata of a trace says of tensors and clip groups, while the training is met piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from types import FrameType

from torch import Tensor

from gradscope.recording.clip_calls import ClipCall
from gradscope.recording.clip_groups import WatchedGroup, common_prefix
from gradscope.recording.frameworks import framework_of
from gradscope.recording.meter import Meter
from gradscope.recording.naming import ParameterNames
from gradscope.recording.placement import describe, fsdp_shards, returned_is_partial
from gradscope.recording.updates import UpdateNorms
from gradscope.trace.schema import RecordedGroup, RecordedTensor, TraceMetadata


class TraceGroups:
    """Adds tensors and groups to ``metadata`` as they are met, and calls ``changed`` then.

    ``include`` are globs of the names that are recorded; None: all.
    """

    def __init__(self, metadata: TraceMetadata, include: Sequence[str] | None, changed: Callable[[], None]) -> None:
        self._metadata = metadata
        self._include = include
        self._changed = changed
        self._names = ParameterNames()
        self._numbers_of: dict[tuple[WatchedGroup, ...], int] = {}
        self._of_name: dict[str, list[int]] = {}

    def describe(
        self, parameters: list[Tensor], frame: FrameType | None, function: str | None, site: str
    ) -> WatchedGroup:
        """A group that is met first, for ``GroupBook``."""
        if self._metadata.framework is None:
            self._metadata.framework = framework_of(frame)
        group = WatchedGroup(function, site, [], [])
        self.extend(group, parameters, frame)
        group.owned = self._names.have_an_optimizer(parameters)
        return group

    def extend(self, group: WatchedGroup, parameters: list[Tensor], frame: FrameType | None) -> None:
        """Parameters that a group gains, for ``GroupBook``."""
        first = len(group.ids)
        names = self._names.name(parameters, frame)
        group.remember(parameters)
        held = [ref() for ref in group.refs]
        group.smallest = min(range(len(held)), key=lambda i: math.inf if (p := held[i]) is None else p.numel())
        kept = [i for i, name in enumerate(names) if self._included(name)]
        if len(kept) < len(names) or group.kept is not None:
            group.kept = [*(group.kept or range(first)), *(first + i for i in kept)]
        group.names.extend(names[i] for i in kept)
        shards = fsdp_shards()
        group.tensors.extend(self._define(describe(names[i], parameters[i], shards)) for i in kept)
        if group.names:
            recorded = [ref for i, ref in enumerate(group.refs) if group.kept is None or i in group.kept]
            group.meter = Meter(recorded)
            group.updates = UpdateNorms(recorded)
        for parts, index in self._numbers_of.items():
            if group in parts:
                self._metadata.groups[index].tensors = [tensor for part in parts for tensor in part.tensors]
        self._changed()

    def _included(self, name: str) -> bool:
        return self._include is None or any(fnmatchcase(name, glob) for glob in self._include)

    def _define(self, tensor: RecordedTensor) -> int:
        """The number of a tensor; one that takes the place of another of its name and shape takes its number too."""
        of_that_name = self._of_name.setdefault(tensor.name, [])
        for number in of_that_name:
            if self._metadata.tensors[number] == tensor:
                return number
        of_that_name.append(len(self._metadata.tensors))
        self._metadata.tensors.append(tensor)
        return of_that_name[-1]

    def number_of(self, call: ClipCall) -> int:
        """The number of the trace's group for ``call``, which gets one when it is first recorded."""
        alone = call.parts[0][0] if len(call.parts) == 1 else None
        if alone is not None and alone.number is not None:
            return alone.number
        parts = tuple([group for group, measured in call.parts if measured is not None])
        index = self._numbers_of.get(parts)
        if index is None:
            index = self._numbers_of[parts] = self._define_group(parts, call)
            if alone is not None:
                alone.number = index
            self._changed()
        return index

    def _define_group(self, parts: tuple[WatchedGroup, ...], call: ClipCall) -> int:
        tensors = [tensor for group in parts for tensor in group.tensors]
        for others, number in self._numbers_of.items():
            known = self._metadata.groups[number]
            same = known.tensors == tensors and known.function == call.function and known.call_site == call.where
            # A model that was built again at the same place goes on under its name.
            if same and not any(group.alive for group in others):
                return number
        watch, clipped_before = parts[0].watch, parts[0].watch.after_clipping if parts[0].watch else None
        self._metadata.groups.append(
            RecordedGroup(
                name=self._group_name(parts, call),
                tensors=tensors,
                function=call.function,
                call_site=call.where,
                optimizer=watch.name if watch is not None else None,
                after_clipping=clipped_before,
                returned_partial=returned_is_partial(call.total_norm),
            )
        )
        for group in parts:
            for position, why in group.meter.unmeasured.items() if group.meter else ():
                self._metadata.notes.append(f"The gradient of {group.names[position]} is left out: {why}.")
        if clipped_before:
            note = f"{clipped_before} clips inside its own optimizer: what is recorded is after its clipping."
            self._metadata.notes[:] = dict.fromkeys([*self._metadata.notes, note])
        return len(self._metadata.groups) - 1

    def _group_name(self, parts: tuple[WatchedGroup, ...], call: ClipCall) -> str:
        taken = {group.name for group in self._metadata.groups}
        beside_clipped = call.function is None and any(group.function for group in self._metadata.groups)
        names = [name for group in parts for name in group.names]
        shared = self._names.whole_root(names) or common_prefix(names)
        candidates = [shared or ("unclipped" if beside_clipped else "all"), f"{shared or 'all'} ({call.where})"]
        name = next((candidate for candidate in candidates if candidate not in taken), None)
        return name or f"{shared or 'all'} {len(taken) + 1}"

    def names_of(self, parameters: list[Tensor]) -> list[str]:
        """The names of parameters that were met before."""
        return self._names.name(parameters, None)
