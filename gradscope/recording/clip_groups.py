"""Which clip call is which: a group of parameters, told by the line that clips them and by the parameters themselves.

The line alone is not enough (a trainer clips every group on one line, a loop over groups is one line too), nor are the
parameters (code that passes only those with a gradient passes another list every time): calls from one line whose
parameters overlap by half are one group, and it gains the new ones.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from gradscope.recording.clip_calls import ClipCall
    from gradscope.recording.meter import Meter
    from gradscope.recording.optimizers import OptimizerWatch
    from gradscope.recording.updates import UpdateNorms


@dataclass(eq=False, slots=True)
class WatchedGroup:
    """The parameters of one clip call, weakly held.

    ``kept`` are the positions of those that are recorded (None: all), ``names`` and ``tensors`` their names and numbers
    in the trace's metadata.  ``smallest`` is the position of the smallest parameter, whose gradient tells cheaply
    whether anything changed.  ``waiting`` are calls that no optimizer has used.  ``site`` is what the book tells the
    group by, ``number`` what the trace calls it where it is clipped by itself.  ``owned``: some optimizer updates them.
    """

    function: str | None
    call_site: str
    names: list[str]
    tensors: list[int]
    owned: bool = True
    kept: list[int] | None = None
    meter: Meter | None = None
    refs: list[weakref.ref[Tensor]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    smallest: int = 0
    members: frozenset[int] = frozenset()
    site: Hashable = None
    number: int | None = None
    watch: OptimizerWatch | None = None
    waiting: list[ClipCall] = field(default_factory=list)
    positions: dict[int, int] = field(default_factory=dict)
    updates: UpdateNorms | None = None

    def gradients(self, parameters: Sequence[Tensor], whole: bool) -> list[Tensor | None]:
        """The gradients of ``parameters`` that are recorded, in the order of the group.

        ``whole``: they are all of its parameters in its order, and not some in any order.
        """
        if whole:
            found = [parameter.grad for parameter in parameters]
        else:
            found = [None] * len(self.ids)
            for parameter in parameters:
                found[self.positions[id(parameter)]] = parameter.grad
        return found if self.kept is None else [found[position] for position in self.kept]

    @property
    def alive(self) -> bool:
        """Whether any of its parameters is."""
        return any(ref() is not None for ref in self.refs)

    def remember(self, parameters: Sequence[Tensor]) -> None:
        """Hold ``parameters`` weakly, after those held already."""
        for parameter in parameters:
            self.positions[id(parameter)] = len(self.ids)
            self.ids.append(id(parameter))
            self.refs.append(weakref.ref(parameter))
        self.members = frozenset(self.ids)


@dataclass(slots=True, eq=False)
class Witness:
    """One gradient of a group, and its version: as long as neither has changed, nor has the group's gradient."""

    parameter: int
    gradient: Tensor
    version: int

    @classmethod
    def of(cls, parameter: Tensor | None) -> Witness | None:
        """A witness for ``parameter`` as it stands; None where it has no gradient, or one of inference mode."""
        gradient = None if parameter is None else parameter.grad
        if gradient is None or gradient.is_inference():
            return None
        return cls(id(parameter), gradient, gradient._version)

    def confirms(self, group: WatchedGroup) -> bool:
        """Whether ``group`` holds the parameter, and its gradient is the same as then."""
        position = group.positions.get(self.parameter)
        if position is None:
            return False
        parameter = group.refs[position]()
        return parameter is not None and parameter.grad is self.gradient and self.gradient._version == self.version


# How the book gets a new group: (parameters, frame, function, call site) -> its description.
NewGroup = Callable[[list[Tensor], "FrameType | None", "str | None", str], WatchedGroup]


class GroupBook:
    """Finds the group of a clip call in about a microsecond; ``new`` makes one where it is met first."""

    def __init__(self, new: NewGroup, grow: Callable[[WatchedGroup, list[Tensor], FrameType | None], None]) -> None:
        self._new = new
        self._grow = grow
        self._at: dict[Hashable, list[WatchedGroup]] = {}
        # By site and first parameter: a loop that clips every parameter by itself makes many groups at one site.
        self._beginning: dict[Hashable, list[WatchedGroup]] = {}

    def clipped(self, parameters: list[Tensor], frame: FrameType | None, function: str) -> tuple[WatchedGroup, bool]:
        """The group of a clip call in ``frame``, and whether its parameters are all of the group's, in its order."""
        key = None if frame is None else (frame.f_code, frame.f_lasti)
        return self._known(key, parameters) or self._met(key, parameters, frame, function)

    def unclipped(
        self, parameters: list[Tensor], key: Hashable, frame: Callable[[], FrameType | None]
    ) -> tuple[WatchedGroup, bool]:
        """The group of what an optimizer, told by ``key``, updates without clipping; ``frame`` finds where it steps."""
        return self._known(key, parameters) or self._met(key, parameters, frame(), None)

    def _known(self, key: Hashable, parameters: list[Tensor]) -> tuple[WatchedGroup, bool] | None:
        ids = list(map(id, parameters))
        for group in self._beginning.get((key, ids[0]), ()):
            if group.ids == ids and group.refs[0]() is parameters[0] and group.refs[-1]() is parameters[-1]:
                return group, True
        return None

    def _met(
        self, key: Hashable, parameters: list[Tensor], frame: FrameType | None, function: str | None
    ) -> tuple[WatchedGroup, bool]:
        """A group whose parameters are not those of the last time, or one that is met first."""
        here = self._at.setdefault(key, [])
        ids = list(map(id, parameters))
        for group in here:
            alive = {i for i, ref in zip(group.ids, group.refs, strict=True) if ref() is not None}
            shared = len(alive.intersection(ids))
            if shared and 2 * shared >= min(len(alive), len(ids)):
                unknown = [p for p in parameters if id(p) not in alive]
                if unknown:
                    self._grow(group, unknown, frame)
                return group, group.ids == ids
        group = self._new(parameters, frame, function, call_site(frame))
        group.site = key
        here.append(group)
        self._beginning.setdefault((key, ids[0]), []).append(group)
        return group, True


def call_site(frame: FrameType | None) -> str:
    """``file.py:line``, as a reader looks it up."""
    if frame is None:
        return "?"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def common_prefix(names: Sequence[str]) -> str | None:
    """The dotted parts that all ``names`` begin with, or the one name there is; None where they share none."""
    if len(names) == 1:
        return names[0]
    shared: list[str] = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or None
