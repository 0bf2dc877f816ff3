"""What a command looks at: the steps of ``--steps``, the clip groups of ``--groups``."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import GradscopeError
from gradscope.tensors import ClipGroup, TensorInfo

FEWEST_FOR_RECENT = 20
MOST_RECENT = 1000


def recent_part(total: int) -> slice:
    """The newest of ``total`` steps: all of a short run, else half of it, 20 to 1000 steps."""
    if total < FEWEST_FOR_RECENT:
        return slice(0, total)
    return slice(total - max(FEWEST_FOR_RECENT, min(MOST_RECENT, total // 2)), total)


def select_steps(steps: str | slice | None, total: int) -> range:
    """The positions that ``steps`` (``"A:B"``, Python slice rules) picks out of ``total``.

    Raises GradscopeError for another form, and where nothing is left.
    """
    if steps is None:
        return range(total)
    if isinstance(steps, str):
        parts = re.fullmatch(r"\s*(-?\d*)\s*:\s*(-?\d*)\s*", steps)
        if parts is None or "-" in parts.groups():
            raise GradscopeError(f"--steps {steps}", "not of the form A:B", "-1000: is the last thousand steps")
        steps = slice(*(int(part) if part else None for part in parts.groups()))
    if not isinstance(steps, slice) or not all(end is None or isinstance(end, int) for end in _ends(steps)):
        raise GradscopeError(f"--steps {steps}", "not of the form A:B", 'steps="10:20" or slice(10, 20)')
    if steps.step is not None and steps.step < 1:
        raise GradscopeError(f"--steps {steps}", "must go forwards")
    selected = range(total)[steps]
    if not selected:
        text = ":".join("" if end is None else str(end) for end in (steps.start, steps.stop))
        raise GradscopeError(f"--steps {text}", f"selects none of the {total:,} steps")
    return selected


def place_of_step(at: int, selected: range, numbers: Sequence[int] | NDArray[np.int64]) -> int:
    """Where the step numbered ``at`` stands among the ``selected`` ones; a negative number counts from their end.

    ``numbers`` are those of all steps, rising.  Raises GradscopeError where it is not among them; the error says which
    are.
    """
    if not isinstance(at, int):
        raise GradscopeError(f"--at {at}", "must be the number of a step")
    if -len(selected) <= at < 0:
        return len(selected) + at
    position = bisect_right(numbers, at) - 1
    if at >= 0 and position in selected and numbers[position] == at:
        return selected.index(position)
    first, last = int(numbers[selected[0]]), int(numbers[selected[-1]])
    if first < at < last:
        raise GradscopeError(f"--at {at}", f"is no step that was read; the one before it is {numbers[position]}")
    raise GradscopeError(f"--at {at}", f"steps run from {first} to {last}")


def _ends(steps: slice) -> tuple[object, ...]:
    return steps.start, steps.stop, steps.step


def first_groups(groups: Sequence[ClipGroup]) -> NDArray[np.bool_]:
    """Which of ``groups`` (bool [groups]) share no tensor with one before them."""
    taken: set[str] = set()
    first = []
    for group in groups:
        first.append(taken.isdisjoint(group.tensors))
        taken.update(group.tensors)
    return np.array(first, dtype=np.bool_)


def regroup(tensors: Sequence[TensorInfo], groups: Mapping[str, str]) -> tuple[ClipGroup, ...]:
    """Clip groups made by glob, name → pattern.  A tensor goes to the first that matches; the others form ``rest``.

    Raises GradscopeError for a pattern that no remaining tensor matches.
    """
    if not isinstance(groups, Mapping) or not all(isinstance(text, str) for pair in groups.items() for text in pair):
        raise GradscopeError("--groups", "must map names to globs", "groups={'actor': 'actor.*', 'critic': 'critic.*'}")
    left = [tensor.name for tensor in tensors]
    made = []
    for name, pattern in groups.items():
        members = tuple(tensor for tensor in left if fnmatchcase(tensor, pattern))
        if not members:
            known = ", ".join(left[:3]) or "nothing is left"
            raise GradscopeError(f"--groups {name}={pattern}", "matches no tensor", f"tensors: {known} …")
        made.append(ClipGroup(name, members))
        left = [tensor for tensor in left if tensor not in members]
    if left:
        made.append(ClipGroup("rest", tuple(left)))
    return tuple(made)
